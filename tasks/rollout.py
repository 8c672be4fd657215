"""Rollout: the student writes completions of the round's prompts. This module plans and commits; sampler workers write shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from storage.artifacts.batches import BATCHES
from storage.artifacts.shards import read_parquet
from storage.errors import ConfigError, InputError
from storage.identity import Identity, derive_seed, omit_at
from storage.query.figures import errors_of, sums
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.behaviours import Behaviour, Completion, Read, Start
from tasks.engines.drafts import Drafted, draft_of, read_drafts, require_drafts
from tasks.engines.writing import Writing, rollout_rows, text_of
from tasks.inputs.rounds import SPLIT, prompts_for_round
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.rollout_config import RolloutConfig
from tasks.sharded import ShardedStage, distinct
from tasks.stage import (
    Context,
    Prompts,
    Student,
    Teacher,
    Work,
    mask_inputs,
    masked_ids,
    merged_stop_ids,
    model_inputs,
    prompt_inputs,
    stop_inputs,
)
from tasks.workers.jobs import ArtifactRef, ModelRef, Request, SampleJob, SampleShard, Sampling, config_json

VERSION = 1
VALUES_VERSION = 1
"""Of the tables of behaviours."""
STAGE = "rollout"
TABLE = "rollouts"


class _RolloutIdentity(Identity):
    config: RolloutConfig
    seed: int
    round: int
    plugins: dict[str, str] = Field({}, json_schema_extra=omit_at({}))


def rollout_work(
    config: RolloutConfig,
    student: Student,
    prompts: Prompts,
    seed: int,
    round: int,
    plugins: Mapping[str, str] = NO_PLUGINS,
    teacher: Teacher | None = None,
    drafts: Artifact | None = None,
) -> Work:
    """The rollouts of one round (from 1): `prompts_per_round` prompts of the split train, `num_generations` each.
    `plugins`: the run's, name -> digest of the source. `teacher` and `drafts` (completions that the teacher wrote) enter the key
    and are read only where the behaviour reads them; `config.behaviour` is the one that holds for the round (`Behaviour.at`).

    Output "rollout": table rollouts; meta: metrics (mean_length in tokens and clipped_ratio, with their errors as in an
    evaluation; tokens), proofs of the engines' weights. Where the behaviour has a table of its own, that is a second output of
    the table's name with the same shards; meta: metrics of the behaviour.
    Raises InputError when a prompt with its completion exceeds the student's positions, ConfigError without what the behaviour
    reads."""
    # all that a completion depends on; the checkpoint's generation config decides which tokens "eos" means
    behaviour = config.behaviour
    inputs = model_inputs(student, "student:")
    if not behaviour.draws:  # its tokenizer decodes the texts
        inputs = {"student:tokenizer": inputs["student:tokenizer"]}
    inputs |= prompt_inputs(prompts, SPLIT) | stop_inputs(prompts)
    read = Reads(
        _needed(behaviour, "teacher", teacher),
        _needed(behaviour, "drafts", drafts),
    )
    if read.teacher is not None:
        inputs |= model_inputs(read.teacher, "teacher:")
    if read.drafts is not None:
        inputs["drafts"] = read.drafts.content["drafts"]
    if read.teacher is not None or read.drafts is not None:
        inputs |= mask_inputs(prompts)
    used = used_plugins(plugins, "sampler", config=config)
    identity = _RolloutIdentity(config=config, seed=seed, round=round, plugins=used)
    outputs = {STAGE: ArtifactSpec.of(STAGE, VERSION, identity, inputs)}
    if (table := behaviour.table) is not None:
        version = VALUES_VERSION
        outputs[table.name] = ArtifactSpec.of(table.name, version, identity, inputs, (table,), "rollouts")

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders, ctx, config, student, prompts, seed, round, read, outputs[STAGE])

    return Work(STAGE, outputs, build)


@dataclass(frozen=True)
class Reads:
    """What the round's behaviour reads beside the student."""

    teacher: Artifact | None = None
    drafts: Artifact | None = None


def _needed(behaviour: Behaviour, what: Read, given: Artifact | None) -> Artifact | None:
    if what not in behaviour.reads:
        return None
    if given is None:
        raise ConfigError(f"rollout.behaviour: {behaviour.kind!r} reads the {what}, but this stage was given none")
    return given


def plan_samples(chosen: Sequence[str], config: RolloutConfig, seed: int, round: int) -> list[list[Request]]:
    """The samples of a round, shard by shard. Each has its own seed: H(seed, round, prompt id, sample index). If a
    prompt occurs twice in the round, its `sample_index` continues."""
    seen: Counter[str] = Counter()
    samples = []
    for prompt_id in chosen:
        for _ in range(config.num_generations):
            index = seen[prompt_id]
            seen[prompt_id] += 1
            sample_seed = derive_seed(seed, "rollout", round, prompt_id, index)
            samples.append(Request(f"{prompt_id}/{round}/{index}", prompt_id, index, sample_seed))
    size = config.shard_prompts * config.num_generations
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _build(
    builders: dict[str, Builder],
    ctx: Context,
    config: RolloutConfig,
    student: Artifact,
    prompts: Artifact,
    seed: int,
    round: int,
    read: Reads,
    rollouts: ArtifactSpec,
) -> None:
    """Sample what is missing of the rollouts and of the behaviour's own table: one sampling writes both."""
    behaviour = config.behaviour
    lengths = _prompt_lengths(ctx.store, prompts)
    plan = plan_samples(prompts_for_round(list(lengths), seed, round, config.prompts_per_round), config, seed, round)
    tables = {TABLE if name == STAGE else name: builder for name, builder in builders.items()}
    first = TABLE if TABLE in tables else next(iter(tables))
    stage = ShardedStage(
        ctx, STAGE, [len(requests) for requests in plan], tables, ("sampler", *(["pair"] if read.teacher else []))
    )
    committed = ctx.store.get(rollouts.stage, rollouts.key) if first != TABLE else None
    recorded = committed.provenance if committed is not None else None
    results = []
    source = _written_before(behaviour, prompts, read)
    foreign = masked_ids(prompts) if read.drafts else []
    drafts: Drafted = {}
    if source is not None:
        drafts = read_drafts(ctx.store, source, SPLIT, foreign)
        require_drafts(drafts, [request for shard in plan for request in shard])
    if not behaviour.draws:
        for number in stage.missing:
            builder = tables[TABLE]
            builder.write_shard(
                TABLE, number, _without_engine(config, plan[number], drafts, ctx.store, student, prompts)
            )
    elif stage.missing:
        stops = merged_stop_ids(prompts)
        sampling = Sampling(**config.sampling() | ({"stop_token_ids": stops, "merged": True} if stops else {}))
        values = tables.get(behaviour.table.name) if behaviour.table is not None else None
        job = SampleJob(
            store=str(ctx.store.root),
            target=ArtifactRef(tables[first].stage, tables[first].key),
            prompts=ArtifactRef.of(prompts),
            split=SPLIT,
            model=ModelRef.of(ctx.store, student),
            dtype=config.dtype,
            longest=max(lengths[r.prompt_id] for shard in plan for r in shard) + config.max_completion_length,
            log_table=first,
            behaviour=config_json(behaviour),
            values=ArtifactRef(values.stage, values.key) if values is not None else None,
            teacher=ModelRef.of(ctx.store, read.teacher) if read.teacher is not None else None,
            drafts=source,
            foreign=foreign,
            unmapped=_unmapped(ctx.store, prompts) if read.teacher is not None else [],
        )
        lacking = {number: [name for name in tables if number in stage.absent[name]] for number in stage.missing}
        shards = {n: SampleShard(n, sampling, requests, lacking.get(n)) for n, requests in enumerate(plan)}
        results = stage.sample(first, job, shards, stage.missing, recorded)
    batches = {BATCHES: recorded.get(BATCHES)} if recorded is not None else stage.batches(first)
    batches = batches if behaviour.draws else {}
    # the rollouts come last: until then they keep the record of the batches that both are of
    for name in sorted(tables, key=lambda name: name == TABLE):
        whole = 0 if tables[name].repairing else len(plan)
        if name == TABLE:
            meta: dict[str, Any] = {
                "metrics": _metrics(tables[name], whole),
                "stop_token_ids": next((r.stop_token_ids for r in results if r.stop_token_ids is not None), None),
                "weight_proofs": distinct([result.proof for result in results]),
            }
        else:
            rows = [row for path in tables[name].finished(name, whole) for row in read_parquet(path).to_pylist()]
            meta = {"metrics": dict(behaviour.metrics(rows))} if rows else {}
        stage.commit(name, meta, batches)


def _written_before(behaviour: Behaviour, prompts: Artifact, read: Reads) -> ArtifactRef | None:
    """Where completions are that were written before; None for a behaviour that reads none."""
    if read.drafts is not None:
        return ArtifactRef.of(read.drafts)
    return ArtifactRef.of(prompts) if "completions" in behaviour.reads else None


def _unmapped(store: Store, prompts: Artifact) -> list[int]:
    """The masked ids whose token is not the same for both tokenizers; others are masked as different ends of sequence only."""
    masked = masked_ids(prompts)
    if not masked:
        return []
    table = store.read_table(prompts, "vocabulary", columns=["tokenizer", "id", "token"])
    table = table.filter(pc.is_in(table["id"], pa.array(masked, table["id"].type)))
    names: dict[int, list[str]] = {}
    for index, token in zip(table["id"].to_pylist(), table["token"].to_pylist(), strict=True):
        names.setdefault(index, []).append(token)
    return [index for index in masked if len(found := names.get(index, [])) < 2 or found[0] != found[1]]


def _without_engine(
    config: RolloutConfig,
    requests: Sequence[Request],
    drafts: Drafted,
    store: Store,
    student: Artifact,
    prompts: Artifact,
) -> pa.Table:
    """Rows of a shard for which the student draws nothing."""
    from tasks.inputs.shipped import load_tokenizer

    tokenizer = load_tokenizer(store.materialize(student))
    table = store.read_table(prompts, "prompts", columns=["prompt_id", "split", "token_ids"])
    table = table.filter(pc.equal(table["split"], SPLIT))
    tokens = dict(zip(table["prompt_id"].to_pylist(), table["token_ids"].to_pylist(), strict=True))
    completions = []
    for request in requests:
        ids = tuple(tokens[request.prompt_id])
        draft = draft_of(drafts, request, config.behaviour)
        start = Start(ids, config.max_completion_length, request.seed, draft=draft, index=request.sample_index)
        made = Writing(config.behaviour, start, request.sample_id, len(tokenizer), len(ids) + start.max_tokens).turn()
        if not isinstance(made, Completion):
            raise InputError(
                f"rollout.behaviour: {config.behaviour.kind!r} asks for an engine, but says that it draws nothing"
            )
        completions.append(made)
    return rollout_rows(
        requests, tokens, completions, config.behaviour, lambda made: text_of(tokenizer, made.token_ids)
    )


def _prompt_lengths(store: Store, prompts: Artifact) -> dict[str, int]:
    """prompt_id -> tokens, of the training prompts."""
    table = store.read_table(prompts, "prompts", columns=["prompt_id", "split", "token_ids"])
    table = table.filter(pc.equal(table["split"], SPLIT))
    return dict(zip(table["prompt_id"].to_pylist(), pc.list_value_length(table["token_ids"]).to_pylist(), strict=True))


def _metrics(builder: Builder, shards: int) -> dict[str, float | None]:
    """Over all shards, including those of an earlier, interrupted attempt. A repaired artifact keeps its recorded metrics."""
    if not shards:
        return {}
    columns = ["prompt_id", "completion_token_ids", "finish_reason"]
    table = pa.concat_tables([read_parquet(path, columns) for path in builder.finished(TABLE, shards)])
    lengths = pc.list_value_length(table["completion_token_ids"])
    clipped = pc.equal(table["finish_reason"], "length")
    by_prompt = {"mean_length": sums(table["prompt_id"], lengths), "clipped_ratio": sums(table["prompt_id"], clipped)}
    return {
        "mean_length": pc.mean(lengths).as_py(),
        "clipped_ratio": pc.mean(clipped.cast(pa.float64())).as_py(),
        "tokens": pc.sum(lengths).as_py(),
        **errors_of(by_prompt),
    }
