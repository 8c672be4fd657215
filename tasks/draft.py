"""Draft: the teacher writes completions of training prompts, once. Rollouts of later rounds begin with them, or are them
(`tasks/behaviours`: teacher_prefix, mixture)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow.compute as pc
from pydantic import Field

from storage.artifacts.shards import read_parquet
from storage.errors import InputError
from storage.identity import Identity, derive_seed, omit_at
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.behaviours.drafts import Drafts
from tasks.inputs.rounds import SPLIT, prompts_for_round
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.rollout_config import RolloutConfig
from tasks.sharded import ShardedStage, distinct
from tasks.stage import Context, Prompts, Teacher, Work, model_inputs, prompt_inputs
from tasks.workers.jobs import ArtifactRef, ModelRef, Request, SampleJob, SampleShard, Sampling

VERSION = 1
STAGE = "draft"
TABLE = "drafts"


class _DraftIdentity(Identity):
    drafts: Drafts
    max_completion_length: int
    shard_prompts: int
    dtype: str
    seed: int
    rounds: int | None
    prompts_per_round: int | None
    plugins: dict[str, str] = Field({}, json_schema_extra=omit_at({}))


def draft_work(
    config: Drafts,
    rollout: RolloutConfig,
    teacher: Teacher,
    prompts: Prompts,
    seed: int,
    rounds: int | None,
    plugins: Mapping[str, str] = NO_PLUGINS,
) -> Work:
    """The teacher's completions of the prompts of rounds 1 to `rounds` (None: of all training prompts), `config.per_prompt`
    each. `rollout`: length, dtype and shard size; `plugins`: the run's, name -> digest of the source.

    Output "draft": table drafts; meta: metrics (drafts, mean_length in tokens, clipped_ratio), proofs of the engines' weights.
    Raises InputError when a prompt with its completion exceeds the teacher's positions."""
    identity = _DraftIdentity(
        drafts=config,
        max_completion_length=rollout.max_completion_length,
        shard_prompts=rollout.shard_prompts,
        dtype=rollout.dtype,
        seed=seed,
        rounds=rounds,
        prompts_per_round=None if rounds is None else rollout.prompts_per_round,
        plugins=used_plugins(plugins, "sampler"),
    )
    inputs = model_inputs(teacher, "teacher:") | prompt_inputs(prompts, SPLIT)
    spec = ArtifactSpec.of(STAGE, VERSION, identity, inputs)

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders[STAGE], ctx, config, rollout, teacher, prompts, seed, rounds)

    return Work(STAGE, {STAGE: spec}, build)


def plan_drafts(
    prompt_ids: Sequence[str], config: Drafts, rollout: RolloutConfig, seed: int, rounds: int | None
) -> list[list[Request]]:
    """The drafts, shard by shard, in the order in which the rounds need their prompts. Seeds: H(seed, draft, prompt id,
    index)."""
    everything = list(prompt_ids) if rounds is None else []
    for number in range(1, (rounds or 0) + 1):
        everything += prompts_for_round(prompt_ids, seed, number, rollout.prompts_per_round)
    chosen = list(dict.fromkeys(everything))
    requests = [
        Request(f"{name}/draft/{index}", name, index, derive_seed(seed, "draft", name, index))
        for name in chosen
        for index in range(config.per_prompt)
    ]
    size = rollout.shard_prompts * config.per_prompt
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def _build(
    builder: Builder,
    ctx: Context,
    config: Drafts,
    rollout: RolloutConfig,
    teacher: Artifact,
    prompts: Artifact,
    seed: int,
    rounds: int | None,
) -> None:
    lengths = _teacher_lengths(ctx.store, prompts)
    plan = plan_drafts(list(lengths), config, rollout, seed, rounds)
    stage = ShardedStage(ctx, STAGE, [len(requests) for requests in plan], {TABLE: builder}, ("sampler",))
    results = []
    if stage.missing:
        sampling = Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            max_completion_length=rollout.max_completion_length,
            stop_token_ids="eos",
        )
        job = SampleJob(
            store=str(ctx.store.root),
            target=ArtifactRef(builder.stage, builder.key),
            prompts=ArtifactRef.of(prompts),
            split=SPLIT,
            model=ModelRef.of(ctx.store, teacher),
            dtype=rollout.dtype,
            longest=max(lengths[r.prompt_id] for shard in plan for r in shard) + rollout.max_completion_length,
            log_table=TABLE,
            table=TABLE,
            reader="teacher",
        )
        shards = {number: SampleShard(number, sampling, requests) for number, requests in enumerate(plan)}
        results = stage.sample(TABLE, job, shards, stage.missing)
    meta = {
        "metrics": {} if builder.repairing else _metrics(builder, len(plan)),
        "stop_token_ids": next((r.stop_token_ids for r in results if r.stop_token_ids is not None), None),
        "weight_proofs": distinct([result.proof for result in results]),
    }
    stage.commit(TABLE, meta, stage.batches(TABLE))


def _teacher_lengths(store: Store, prompts: Artifact) -> dict[str, int]:
    """prompt_id -> tokens as the teacher reads it, of the training prompts."""
    table = store.read_table(prompts, "prompts", columns=["prompt_id", "split", "token_ids", "teacher_token_ids"])
    table = table.filter(pc.equal(table["split"], SPLIT))
    if table.num_rows == 0:
        raise InputError(f"no prompt of the split {SPLIT!r} is left to write drafts for; see what prepare filtered")
    lengths = pc.list_value_length(pc.coalesce(table["teacher_token_ids"], table["token_ids"]))
    return dict(zip(table["prompt_id"].to_pylist(), lengths.to_pylist(), strict=True))


def _metrics(builder: Builder, shards: int) -> dict[str, float | None]:
    """Over all shards, including those of an earlier, interrupted attempt."""
    tables = [read_parquet(path, ["completion_token_ids", "finish_reason"]) for path in builder.finished(TABLE, shards)]
    lengths = [length for table in tables for length in pc.list_value_length(table["completion_token_ids"]).to_pylist()]
    clipped = [reason == "length" for table in tables for reason in table["finish_reason"].to_pylist()]
    return {
        "drafts": len(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "clipped_ratio": sum(clipped) / len(clipped),
        "tokens": sum(lengths),
    }
