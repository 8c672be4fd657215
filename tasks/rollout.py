"""Rollout: the student writes completions of the round's prompts. Workers sample; this half plans and commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from storage.artifacts.shards import read_parquet
from storage.errors import InputError
from storage.identity import Identity, derive_seed, omit_at
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.rollout_config import RolloutConfig
from tasks.stage import Context, Work, model_inputs
from tasks.workers.pool import WorkerDied

VERSION = 1
STAGE = "rollout"
TABLE = "rollouts"
SPLIT = "train"
_SHOWN = 3


class _RolloutIdentity(Identity):
    config: RolloutConfig
    seed: int
    round: int
    plugins: dict[str, str] = Field({}, json_schema_extra=omit_at({}))


@dataclass(frozen=True)
class Sample:
    """One completion to ask for. A prompt that the round holds twice goes on counting its `sample_index`."""

    prompt_id: str
    sample_id: str
    sample_index: int
    seed: int


def rollout_work(
    config: RolloutConfig,
    student: Artifact,
    prompts: Artifact,
    seed: int,
    round: int,
    plugins: Mapping[str, str] = NO_PLUGINS,
) -> Work:
    """The rollouts of one round (from 1): `prompts_per_round` prompts of the split train, `num_generations` each.
    `plugins`: the run's, name -> digest of the source.

    Output "rollout": table rollouts; meta: metrics (mean_length and tokens in tokens, clipped_ratio), proofs of the
    engines' weights. Raises InputError when a prompt with its completion exceeds the student's positions."""
    # what a completion depends on: a checkpoint's generation config decides where "eos" ends it
    inputs = model_inputs(student, "student:")
    inputs["prompts"] = prompts.content[f"prompts:{SPLIT}"]
    used = used_plugins(plugins, "sampler")
    identity = _RolloutIdentity(config=config, seed=seed, round=round, plugins=used)
    spec = ArtifactSpec.of(STAGE, VERSION, identity, inputs)

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders[STAGE], ctx, config, student, prompts, seed, round)

    return Work(STAGE, {STAGE: spec}, build)


def prompts_for_round(prompt_ids: Sequence[str], seed: int, round: int, prompts_per_round: int) -> list[str]:
    """The prompts of a round (from 1), in order: rounds take turns on a seeded permutation, drawn anew for each epoch.

    A pure function of its arguments; the order of `prompt_ids` plays no part. A round that crosses the end of an
    epoch may hold a prompt twice."""
    if round < 1:
        raise ValueError(f"round {round}: rollouts begin with round 1")
    ids = sorted(set(prompt_ids))
    if not ids:
        raise InputError(f"no prompt of the split {SPLIT!r} is left to roll out; see what prepare filtered")
    start = (round - 1) * prompts_per_round
    chosen: list[str] = []
    while len(chosen) < prompts_per_round:
        epoch, offset = divmod(start + len(chosen), len(ids))
        order = sorted(ids, key=lambda name, epoch=epoch: (derive_seed(seed, "prompts", epoch, name), name))
        chosen += order[offset : offset + prompts_per_round - len(chosen)]
    return chosen


def plan_samples(chosen: Sequence[str], config: RolloutConfig, seed: int, round: int) -> list[list[Sample]]:
    """The samples of a round, shard by shard. Each has its own seed: H(seed, round, prompt id, sample index)."""
    seen: Counter[str] = Counter()
    samples = []
    for prompt_id in chosen:
        for _ in range(config.num_generations):
            index = seen[prompt_id]
            seen[prompt_id] += 1
            sample_seed = derive_seed(seed, "rollout", round, prompt_id, index)
            samples.append(Sample(prompt_id, f"{prompt_id}/{round}/{index}", index, sample_seed))
    size = config.shard_prompts * config.num_generations
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _build(
    builder: Builder, ctx: Context, config: RolloutConfig, student: Artifact, prompts: Artifact, seed: int, round: int
) -> None:
    tokens = _prompt_tokens(ctx.store, prompts)
    shards = plan_samples(prompts_for_round(list(tokens), seed, round, config.prompts_per_round), config, seed, round)
    missing = builder.missing(TABLE, len(shards))
    done = sum(len(samples) for shard, samples in enumerate(shards) if shard not in missing)
    total = sum(len(samples) for samples in shards)
    if missing and done:
        ctx.say("rollout", f"{done} of {total} samples are there already")
    ctx.progress(done, total, "samples")
    ctx.begin_shards(builder, TABLE, missing, len(shards), "sampler")
    common = {
        "op": "rollout_shard",
        "store": str(ctx.store.root),
        "stage": builder.stage,
        "key": builder.key,
        "model": str(ctx.store.materialize(student)) if missing else "",
        "weights": student.content["weights"],
        "dtype": config.dtype,
        "sampling": config.sampling(),
    }
    jobs = [common | _shard_job(shard, shards[shard], tokens) for shard in missing]
    counts = [0] * len(jobs)

    def on_progress(job: int, samples: int, _total: int) -> None:
        counts[job] = samples
        ctx.progress(done + sum(counts), total, "samples")

    try:
        results = ctx.workers.run("sampler", jobs, on_progress)
    except WorkerDied as error:
        job = jobs[error.job]
        finished = builder.parts(TABLE, job["shard"]).read()
        raise error.losing([s["sample_id"] for s in job["samples"]], finished, f"shard {job['shard']}") from error
    if kept := sum(result.get("kept", 0) for result in results):
        ctx.say("rollout", f"{kept} samples of workers that ended early were kept")
    builder.commit(
        meta={
            "metrics": _metrics(builder, 0 if builder.repairing else len(shards)),
            "stop_token_ids": results[0]["stop_token_ids"] if results else None,
            "weight_proofs": _distinct([result["proof"] for result in results]),
        },
        tables={TABLE: len(shards)},
        provenance=builder.made_at(TABLE, len(shards)),
    )


def _prompt_tokens(store: Store, prompts: Artifact) -> dict[str, list[int]]:
    table = store.read_table(prompts, "prompts", columns=["prompt_id", "split", "token_ids"])
    table = table.filter(pc.equal(table["split"], SPLIT))
    return dict(zip(table["prompt_id"].to_pylist(), table["token_ids"].to_pylist(), strict=True))


def _shard_job(shard: int, samples: Sequence[Sample], tokens: dict[str, list[int]]) -> dict[str, Any]:
    ids = list(dict.fromkeys(sample.prompt_id for sample in samples))
    position = {prompt_id: index for index, prompt_id in enumerate(ids)}
    return {
        "shard": shard,
        "prompts": [{"prompt_id": prompt_id, "token_ids": tokens[prompt_id]} for prompt_id in ids],
        "samples": [
            {"sample_id": s.sample_id, "prompt": position[s.prompt_id], "sample_index": s.sample_index, "seed": s.seed}
            for s in samples
        ],
    }


def _metrics(builder: Builder, shards: int) -> dict[str, float | int]:
    """Over all shards, those of an earlier, interrupted attempt too. A repaired artifact keeps its recorded metrics."""
    if not shards:
        return {}
    columns = ["completion_token_ids", "finish_reason"]
    table = pa.concat_tables([read_parquet(path, columns) for path in builder.finished(TABLE, shards)])
    lengths = pc.list_value_length(table["completion_token_ids"])
    return {
        "mean_length": pc.mean(lengths).as_py(),
        "clipped_ratio": pc.mean(pc.equal(table["finish_reason"], "length").cast(pa.float64())).as_py(),
        "tokens": pc.sum(lengths).as_py(),
    }


def _distinct(proofs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [proof for index, proof in enumerate(proofs) if proof not in proofs[:index]]
