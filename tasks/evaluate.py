"""Evaluate: measures the student on held-out prompts. vLLM samples, transformers scores the KL, a verifier judges.

Workers write intermediate shards (completions, sums of the KL); this module judges and writes the table from both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, StringConstraints, model_validator

from storage.artifacts.shards import IntermediateShards, read_parquet
from storage.errors import CorruptArtifact, InputError
from storage.identity import Identity, derive_seed, omit_at
from storage.query.figures import errors_of, sums_of
from storage.schemas import COMPLETION_KL, schema_for
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.inputs.sources import PromptSource
from tasks.inputs.verifiers import ExactMatch, FunctionVerifier, VerifierConfig, verifier_digest, verify
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.rollout_config import Dtype, StopTokenIds
from tasks.routing import all_routes, teacher_of_prompts
from tasks.sharded import ShardedStage
from tasks.stage import (
    Context,
    Prompts,
    Student,
    Teacher,
    Work,
    merged_stop_ids,
    model_inputs,
    prompt_inputs,
    same_models,
    stop_inputs,
)
from tasks.workers.jobs import ArtifactRef, KLJob, KLShard, ModelRef, Request, SampleJob, SampleShard, Sampling

VERSION = 1
STAGE = "evaluate"
TABLE = "evaluations"
SPLIT = "eval"
COMPLETIONS = "rollouts"
"""Schema of the intermediate shards that the sampler writes."""
MODES: tuple[Literal["greedy", "sampled", "kl"], ...] = ("greedy", "sampled", "kl")


class EvaluationSet(Identity):
    """A further set of held-out prompts, measured beside the main one and kept apart from it. Sampling is that of `evaluate`."""

    prompts: PromptSource = Field(
        description="rendered and filtered as prompts.eval is; training rows are not left out of it"
    )
    verifier: VerifierConfig | None = Field(
        ExactMatch(), description="judges greedy and sampled completions; null: no accuracy"
    )
    limit: int | None = Field(None, ge=1, description="at most this many of its prompts; null: all")
    kl_prompts: int | None = Field(
        0, ge=0, description="prompts whose fresh temperature-1 rollouts give reverse_kl; null: all of them; 0: none"
    )


SetName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class EvaluateConfig(Identity):
    """What is measured of every round's student. Prompts and seeds are the same in every round."""

    prompts: int | None = Field(None, ge=1, description="at most this many held-out prompts; null: all")
    greedy: bool = Field(True, description="one completion per prompt by the likeliest tokens: accuracy_greedy")
    num_generations: int = Field(0, ge=0, description="sampled completions per prompt: accuracy_sampled; 0: none")
    temperature: float = Field(1.0, ge=0.01, le=2, description="of the sampled completions")
    top_p: float = Field(1.0, gt=0, le=1, description="of the sampled completions")
    top_k: int = Field(0, ge=0, description="of the sampled completions; 0: all tokens")
    kl_prompts: int | None = Field(
        None, ge=0, description="prompts whose fresh temperature-1 rollouts give reverse_kl; null: all of them; 0: none"
    )
    kl_generations: int = Field(1, ge=1, description="such rollouts per prompt")
    max_completion_length: int = Field(256, ge=1, description="tokens of a completion; longer ones are cut (clipped)")
    stop_token_ids: StopTokenIds = Field(
        "eos", description="ids that end a completion; eos: those of the student's tokenizer and generation config"
    )
    verifier: VerifierConfig | None = Field(
        ExactMatch(), description="judges greedy and sampled completions; null: no accuracy"
    )
    dtype: Dtype = Field("float32", description="of the engine and of the scorer")
    shard_prompts: int = Field(64, ge=1, description="prompts per shard: the unit of redo and of data parallelism")
    sets: dict[SetName, EvaluationSet] = Field(
        {},
        description="further sets by name, each measured in the rounds that are evaluated; their metrics are called"
        " evaluate_NAME_METRIC",
        json_schema_extra=omit_at({}),
    )

    @model_validator(mode="after")
    def _something(self) -> EvaluateConfig:
        if not any(self.generations(mode) for mode in MODES):
            raise ValueError("nothing to evaluate: set greedy, or num_generations, or kl_prompts")
        for name, one in self.sets.items():
            if not any(self.on(one).generations(mode) for mode in MODES):
                raise ValueError(
                    f"sets.{name}: nothing to evaluate: set evaluate.greedy, or evaluate.num_generations, or its kl_prompts"
                )
        return self

    @property
    def main(self) -> EvaluateConfig:
        """Without the sets: what the evaluation of the held-out prompts depends on."""
        return self.model_copy(update={"sets": {}})

    def on(self, one: EvaluationSet) -> EvaluateConfig:
        """What the evaluation on a set depends on."""
        own = {"prompts": one.limit, "verifier": one.verifier, "kl_prompts": one.kl_prompts}
        return self.model_copy(update={"sets": {}} | own)

    def generations(self, mode: str) -> int:
        """Completions per prompt in a mode; 0 where it is off."""
        if mode == "greedy":
            return int(self.greedy)
        return self.num_generations if mode == "sampled" else 0 if self.kl_prompts == 0 else self.kl_generations

    def sampling(self, mode: str) -> dict[str, Any]:
        """The fields of `tasks.workers.jobs.Sampling`, as JSON."""
        shape = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        if mode == "greedy":
            shape["temperature"] = 0.0
        if mode == "sampled":
            shape = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return shape | self.model_dump(mode="json", include={"max_completion_length", "stop_token_ids"})


class _EvaluateIdentity(Identity):
    config: EvaluateConfig
    seed: int
    verifier_source: str | None
    plugins: dict[str, str] = Field({}, json_schema_extra=omit_at({}))


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt. The teacher reads `teacher_token_ids` where they are given."""

    prompt_id: str
    token_ids: list[int]
    teacher_token_ids: list[int] | None
    answer: str | None
    teacher_id: str | None = None


@dataclass(frozen=True)
class Shard:
    """The completions of one mode for some prompts, prompt after prompt."""

    mode: str
    prompts: tuple[Prompt, ...]
    generations: int
    teacher: str | None = None
    """Of completions to be scored where there are several teachers: the name of the one whose prompts these all are."""

    @property
    def samples(self) -> list[tuple[Prompt, int]]:
        """(prompt, sample_index) of every completion."""
        return [(prompt, index) for prompt in self.prompts for index in range(self.generations)]

    def requests(self, seed: int) -> list[Request]:
        """The requests of the shard. Seeds: H(seed, mode, prompt id, sample index), without the round."""
        return [
            Request(
                f"{prompt.prompt_id}/{self.mode}/{index}",
                prompt.prompt_id,
                index,
                derive_seed(seed, "evaluate", self.mode, prompt.prompt_id, index),
            )
            for prompt, index in self.samples
        ]


def rank_of(prompt_id: str, seed: int) -> tuple[int, str]:
    """Sorts the held-out prompts; `EvaluateConfig.prompts` takes the first ones."""
    return derive_seed(seed, "evaluate", "prompts", prompt_id), prompt_id


def evaluate_work(
    config: EvaluateConfig,
    student: Student,
    teacher: Teacher | Mapping[str, Teacher],
    prompts: Prompts,
    seed: int,
    plugins: Mapping[str, str] = NO_PLUGINS,
) -> Work:
    """The evaluation of one student; its key leaves the round out, so an unchanged student is evaluated once.
    `plugins`: the run's, name -> digest of the source. `teacher`: the teacher, or several by name; the KL of a prompt is to its
    own.

    Output "evaluate": table evaluations. Meta: `metrics` accuracy_greedy and accuracy_sampled (shares of the judged
    completions, null where none was judged), reverse_kl (nats per token, exact over the vocabulary, on fresh rollouts
    at temperature 1; null where off), mean_length (tokens) and clipped_ratio of the same rollouts (else of the sampled,
    else of the greedy ones), each with its standard error over prompts NAME_se, NAME_n samples and NAME_prompts prompts
    (`storage.query.figures`); eval_tokens (all). With several teachers also each of them over the prompts of one teacher, as
    METRIC/TEACHER. Raises InputError without held-out prompts."""
    inputs = model_inputs(student, "student:")
    several = teacher if isinstance(teacher, Mapping) else {}
    models = {f"teacher:{name}": model for name, model in several.items()} or {"teacher": cast(Teacher, teacher)}
    if config.generations("kl"):
        inputs |= {
            f"{who}:{part}": m.content[part] for who, m in models.items() for part in ("weights", "architecture")
        }
    if f"prompts:{SPLIT}" not in prompts.content:
        raise _nothing_held_out()
    inputs |= prompt_inputs(prompts, SPLIT) | stop_inputs(prompts)
    if several:
        inputs["teachers"] = prompts.content[all_routes(SPLIT)]
    source = None if config.verifier is None else verifier_digest(config.verifier)
    roles = ("sampler", "scorer") if config.generations("kl") else ("sampler",)
    used = used_plugins(plugins, *roles, config=config)
    identity = _EvaluateIdentity(config=config, seed=seed, verifier_source=source, plugins=used)
    spec = ArtifactSpec.of(STAGE, VERSION, identity, inputs)

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders[STAGE], ctx, config, student, several or {None: cast(Teacher, teacher)}, prompts, seed)

    return Work(STAGE, {STAGE: spec}, build)


def plan_shards(prompts: Sequence[Prompt], config: EvaluateConfig, seed: int, routed: bool = False) -> list[Shard]:
    """All completions to request, shard by shard. A limit selects prompts by the seed, the same in every round; the prompts
    for the KL are among them. Where prompts name their teachers (`routed`), a shard for the KL has those of one teacher."""
    order = sorted(prompts, key=lambda p: rank_of(p.prompt_id, seed))
    chosen = order[: config.prompts]
    shards = []
    for mode in MODES:
        mine = chosen[: config.kl_prompts] if mode == "kl" else chosen
        if count := config.generations(mode):
            size = config.shard_prompts
            apart = routed and mode == "kl"
            for name in sorted({prompt.teacher_id or "" for prompt in mine}) if apart else [None]:
                own = [prompt for prompt in mine if name is None or prompt.teacher_id == name]
                shards += [Shard(mode, tuple(own[i : i + size]), count, name) for i in range(0, len(own), size)]
    return shards


def _build(
    builder: Builder,
    ctx: Context,
    config: EvaluateConfig,
    student: Artifact,
    teachers: Mapping[Any, Artifact],
    prompts: Artifact,
    seed: int,
) -> None:
    plan = plan_shards(_held_out(ctx.store, prompts), config, seed, routed=None not in teachers)
    stops = merged_stop_ids(prompts)
    sizes = [len(shard.samples) for shard in plan]
    stage = ShardedStage(ctx, STAGE, sizes, {TABLE: builder}, ("sampler", "scorer"))
    between = builder.intermediate()
    unsampled = [number for number in stage.missing if between.read(COMPLETIONS, number) is None]
    stage.expect({number: (number in unsampled) + (plan[number].mode == "kl") for number in stage.missing})
    if kept := sum(sizes[number] for number in stage.missing if number not in unsampled):
        ctx.say(STAGE, f"{kept} completions of an earlier attempt are there already")
    if unsampled:
        job = SampleJob(
            store=str(ctx.store.root),
            target=ArtifactRef(builder.stage, builder.key),
            prompts=ArtifactRef.of(prompts),
            split=SPLIT,
            model=ModelRef.of(ctx.store, student),
            dtype=config.dtype,
            longest=max(len(p.token_ids) for shard in plan for p in shard.prompts) + config.max_completion_length,
            log_table=TABLE,
            intermediate=True,
        )
        merged = {"stop_token_ids": stops, "merged": True} if stops else {}
        shards = {
            number: SampleShard(number, Sampling(**config.sampling(shard.mode) | merged), shard.requests(seed))
            for number, shard in enumerate(plan)
        }
        for number in unsampled:
            between.forget(COMPLETION_KL, number)  # of completions that are lost
        stage.sample(TABLE, job, shards, unsampled)
    _write(builder, plan, [n for n in stage.missing if plan[n].mode != "kl"], config)
    kl = [number for number in stage.missing if plan[number].mode == "kl"]
    if unscored := [number for number in kl if not _scored(between, number)]:
        for number in unscored:
            between.forget(COMPLETION_KL, number)
        ctx.workers.stage_done()  # on a GPU the scorer needs the sampler's memory; warm workers stay
        for names in same_models(teachers):  # one after the other
            items = [KLShard(number, sizes[number]) for number in unscored if plan[number].teacher in names]
            if not items:
                continue
            score = KLJob(
                store=str(ctx.store.root),
                target=ArtifactRef(builder.stage, builder.key),
                prompts=ArtifactRef.of(prompts),
                student=ModelRef.of(ctx.store, student),
                teacher=ModelRef.of(ctx.store, teachers[names[0]]),
                dtype=config.dtype,
                stop_ids=stops,
            )
            stage.run("scorer", score, items, written=lambda number: _scored(between, number))
    _write(builder, plan, kl, config)
    meta = {} if builder.repairing else _meta(builder, len(plan), _routes(ctx.store, prompts, teachers))
    if lost := meta.get("invalid_kl"):
        ctx.log(f"warning: the KL of {lost} completions is not finite; reverse_kl leaves them out")
    stage.commit(TABLE, meta, stage.batches(TABLE))


def _held_out(store: Store, prompts: Artifact) -> list[Prompt]:
    columns = ["prompt_id", "token_ids", "teacher_token_ids", "answer", "teacher_id"]
    table = store.read_table(prompts, "prompts", columns=[*columns, "split"])
    table = table.filter(pc.equal(table["split"], SPLIT)).select(columns)
    if table.num_rows == 0:
        raise _nothing_held_out()
    return [Prompt(**row) for row in table.to_pylist()]


def _routes(store: Store, prompts: Artifact, teachers: Mapping[Any, Artifact]) -> dict[str, str | None]:
    """By prompt_id the name of its teacher; empty where there is one."""
    return {} if None in teachers else teacher_of_prompts(store, prompts)


def _nothing_held_out() -> InputError:
    return InputError("evaluate: no held-out prompts; give prompts.eval a source")


def _scored(between: IntermediateShards, number: int) -> bool:
    """Whether there is a KL of each of the shard's completions."""
    completions, sums = between.read(COMPLETIONS, number), between.read(COMPLETION_KL, number)
    return completions is not None and sums is not None and completions["sample_id"].equals(sums["sample_id"])


def _write(builder: Builder, plan: Sequence[Shard], numbers: Sequence[int], config: EvaluateConfig) -> None:
    """Judge completions and write shards from the intermediate ones. CorruptArtifact where one is missing or damaged."""
    between = builder.intermediate()
    for number in numbers:
        completions = between.require(COMPLETIONS, number)
        sums = None
        if plan[number].mode == "kl":
            scored = between.require(COMPLETION_KL, number)
            if not completions["sample_id"].equals(scored["sample_id"]):
                between.forget(COMPLETION_KL, number)
                raise CorruptArtifact(
                    f"{between.path}: the KL of shard {number} is of other completions; it was removed, run again"
                )
            sums = scored["reverse_kl_sum"].to_pylist()
        builder.write_shard(TABLE, number, _rows(plan[number], completions, config, sums))


def _rows(shard: Shard, completions: pa.Table, config: EvaluateConfig, sums: Sequence[float | None] | None) -> pa.Table:
    rows = []
    columns = ("prompt_token_ids", "completion_token_ids", "completion_text", "finish_reason")
    made = zip(*(completions[name].to_pylist() for name in columns), strict=True)
    for place, ((prompt, index), (ids, completion, text, reason)) in enumerate(zip(shard.samples, made, strict=True)):
        correct = None if shard.mode == "kl" else _judge(config, text, prompt.answer)
        rows.append(
            {
                "prompt_id": prompt.prompt_id,
                "mode": shard.mode,
                "sample_index": index,
                "prompt_token_ids": ids,
                "completion_token_ids": completion,
                "completion_text": text,
                "finish_reason": reason,
                "verifier": None if config.verifier is None or correct is None else config.verifier.kind,
                "correct": correct,
                "reverse_kl_sum": None if sums is None else sums[place],
                "tokens": len(completion),
            }
        )
    return pa.Table.from_pylist(rows, schema=schema_for(TABLE))


def _judge(config: EvaluateConfig, text: str, answer: str | None) -> bool | None:
    """The verdict; null without a verifier, or without the answer that it compares with (a function may not need one)."""
    if config.verifier is None or (answer is None and not isinstance(config.verifier, FunctionVerifier)):
        return None
    return verify(config.verifier, text, answer)


def _meta(builder: Builder, shards: int, teacher_of: Mapping[str, str | None]) -> dict[str, Any]:
    """Over all shards, including those of an earlier, interrupted attempt. `teacher_of`: by prompt where there are several."""
    columns = ["prompt_id", "mode", "finish_reason", "correct", "reverse_kl_sum", "tokens"]
    table = pa.concat_tables([read_parquet(path, columns) for path in builder.finished(TABLE, shards)])
    metrics = _metrics(table)
    names = pa.array([teacher_of[prompt] for prompt in table["prompt_id"].to_pylist()] if teacher_of else [])
    for name in sorted(set(names.to_pylist())):
        metrics |= _metrics(table.filter(pc.equal(names, name)), f"/{name}")
    kl = table.filter(pc.equal(table["mode"], "kl"))
    return {
        "metrics": metrics,
        "invalid_kl": kl["reverse_kl_sum"].null_count,
        "judged": table.num_rows - table["correct"].null_count,
    }


def _metrics(table: pa.Table, suffix: str = "") -> dict[str, Any]:
    """The metrics of these rows, with their errors; `suffix` ends a metric's name."""
    by_mode = {mode: table.filter(pc.equal(table["mode"], mode)) for mode in MODES}
    shape = next((by_mode[mode] for mode in ("kl", "sampled", "greedy") if by_mode[mode].num_rows), table)
    kl = by_mode["kl"].filter(pc.is_valid(by_mode["kl"]["reverse_kl_sum"]))
    tokens = pc.sum(kl["tokens"]).as_py()
    metrics = {
        "accuracy_greedy": _share(by_mode["greedy"]["correct"]),
        "accuracy_sampled": _share(by_mode["sampled"]["correct"]),
        "reverse_kl": pc.sum(kl["reverse_kl_sum"]).as_py() / tokens if tokens else None,
        "mean_length": pc.mean(shape["tokens"]).as_py(),
        "clipped_ratio": _share(pc.equal(shape["finish_reason"], "length")),
        "eval_tokens": pc.sum(table["tokens"]).as_py(),
    }
    named = {f"{name}{suffix}": value for name, value in metrics.items()}
    return named | errors_of({f"{name}{suffix}": of for name, of in sums_of(table).items()})


def _share(verdicts: pa.ChunkedArray) -> float | None:
    """The share of true among those that are not null."""
    share: float | None = pc.mean(verdicts.cast(pa.float64())).as_py()
    return share
