"""Supervise: student and teacher score the rollouts, and the scores become signals. This module plans, finds the signals that
exist, and commits; workers run the models. One pass of the models writes all missing signals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from pydantic import Field

from storage.artifacts.shards import read_parquet
from storage.errors import ConfigError, InputError
from storage.identity import Identity, omit_at
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.engines.teacher import LocalTeacher, TeacherField
from tasks.losses.needs import SignalNeed
from tasks.plugins import NO_PLUGINS
from tasks.rollout_config import Dtype
from tasks.routing import teacher_of_prompts
from tasks.sharded import ShardedStage
from tasks.signals import Inputs, Written, require_usable, signal_named
from tasks.signals.mask import SpecialTokens, mask_rules
from tasks.stage import Context, Contexts, Prompts, Rollouts, Student, Teacher, Work, merged_stop_ids
from tasks.workers.jobs import (
    ArtifactRef,
    MaskRules,
    ModelRef,
    ScoreJob,
    ScoreShard,
    ScoringDistribution,
    ShardDone,
    SignalOutput,
    config_json,
)


class SuperviseConfig(Identity):
    """How rollouts are scored. The objective, not this config, decides which signals are made."""

    dtype: Dtype = Field(
        "float32", description="both models' weights and arithmetic; probabilities are always computed in float32"
    )
    encoding: Literal["exact", "compact", "packed"] = Field(
        "exact",
        description="of top-K lists; compact rounds their log-probabilities to float16, packed to 1/64 nats in less than half the"
        " disk of exact",
    )
    tail_mass: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="cut the teacher's lists off where its mass outside is at most this: fewer than k entries at tokens of which"
        " it is sure. The rest is in the bucket, so the objective's lists of the teacher need outside: bucket",
        json_schema_extra=omit_at(None),
    )
    special_tokens: SpecialTokens = SpecialTokens()
    student: Literal["full", "none"] = Field(
        "full",
        description="none: the student is not run; for objectives that ask nothing of it. Its columns in `sampled` are null, the"
        " mask marks invalid values of teacher and sampler alone, and training logs no drift",
        json_schema_extra=omit_at("full"),
    )
    teacher: TeacherField = Field(
        LocalTeacher(),
        description="how the teacher is asked; none: it is not run, for objectives that read nothing of it. Its columns in"
        " `sampled` are null then, and training logs no KL to it",
        json_schema_extra=omit_at({"kind": "local"}),
    )


class Sampling(Protocol):
    """The part of a rollout's config that shapes the distribution sampled from."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...


def supervise_work(
    config: SuperviseConfig,
    rollouts: Rollouts,
    student: Student,
    teacher: Teacher,
    prompts: Prompts,
    needs: Sequence[SignalNeed],
    sampling: Sampling,
    store: Store | None = None,
    plugins: Mapping[str, str] = NO_PLUGINS,
    names: Sequence[str] = (),
    contexts: Contexts | None = None,
) -> Work:
    """The signals that an objective needs of one round's rollouts, each an artifact of its own. `plugins`: the run's, name ->
    digest of the source. `names`: the teacher's, where there are several (more than one: of one checkpoint); the signals then
    have rows of its own samples only, and shards may be empty. `contexts`: what the teacher reads before each completion, where
    samples have contexts of their own.

    Outputs: one per signal, of its name, with one table of that name that has the shards of the rollouts. Meta: see each
    signal. With a `store`, a committed list of more candidates serves where fewer are asked for (`Work.shared`). Raises
    ConfigError for a signal that is not registered, a list without k, and what the teacher's backend cannot answer."""
    made = tuple({need.name: need for need in needs}.values())
    if problems := signal_problems(config, made):
        raise ConfigError("; ".join(problems))
    how: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    if sampling.min_p:  # younger than version 0.1: left out of keys at 0
        how["min_p"] = sampling.min_p
    context = Inputs(config, rollouts, student, teacher, prompts, how, plugins, tuple(names), contexts)
    outputs: dict[str, ArtifactSpec] = {need.name: signal_named(need.name).spec(context, need.k) for need in made}
    shared: dict[str, str] = {}
    for need in made:
        if store is not None and need.k is not None and store.get(need.name, outputs[need.name].key) is None:
            larger = find_topk(store, outputs[need.name], need.k)
            if larger is not None:
                shared[need.name] = larger.key

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders, ctx, context)

    return Work("supervise", outputs, build, shared)


def signal_problems(config: SuperviseConfig, needs: Sequence[SignalNeed]) -> list[str]:
    """Why these signals cannot be made with this config, and what to do; checked when a config loads."""
    found = []
    for need in needs:
        try:
            signal = signal_named(need.name)
        except ConfigError as error:
            found.append(str(error))
            continue
        wanted = signal.asked(need.k, {}, config.student, config.teacher.asked)
        lacking = config.teacher.capabilities.lacking(wanted)
        if problem := signal.problem(need.k):
            found.append(problem)
        elif config.student == "none" and "student" in wanted.models:
            found.append(
                f"supervise.student: none, but the signal {need.name!r} of this objective is made by running the student;"
                " set supervise.student: full"
            )
        elif not config.teacher.asked and "teacher" in wanted.models:
            found.append(
                f"supervise.teacher: none, but the signal {need.name!r} of this objective is made by running the teacher; set"
                " supervise.teacher: {kind: local}"
            )
        elif lacking:
            found.append(
                f"supervise.teacher: kind {config.teacher.kind} cannot give {' and '.join(lacking)}, which the signal"
                f" {need.name!r} of this objective needs; choose kind: local, or another objective"
            )
    return found


def find_topk(store: Store, spec: ArtifactSpec, k: int) -> Artifact | None:
    """The smallest committed top-K artifact with more than `k` candidates that is otherwise what `spec` describes."""
    same = {name: value for name, value in spec.identity.items() if name != "k"}
    found = [
        artifact
        for artifact in store.list(spec.stage)
        if artifact.version == spec.version
        and artifact.inputs == spec.inputs
        and {name: value for name, value in artifact.identity.items() if name != "k"} == same
        and artifact.identity["k"] > k
    ]
    return min(found, key=lambda artifact: artifact.identity["k"], default=None)


def _build(builders: dict[str, Builder], ctx: Context, inputs: Inputs) -> None:
    rollouts = inputs.rollouts
    k = {name: builder.spec.identity.get("k") for name, builder in builders.items()}  # a list may be longer than needed
    sizes = _sizes(ctx.store, inputs)
    stage = ShardedStage(ctx, "supervise", sizes, builders, ("scorer",))
    _require_space(ctx, inputs, builders, k, sizes)
    outputs = {
        name: SignalOutput(
            name, ArtifactRef(name, builder.key), k[name], inputs.settings.encoding, inputs.settings.tail_mass
        )
        for name, builder in sorted(builders.items())
    }
    results: list[ShardDone] = []
    if stage.missing:
        items = [
            ScoreShard(shard, sizes[shard], [out for name, out in outputs.items() if shard in stage.absent[name]])
            for shard in stage.missing
        ]
        results, _ = stage.run("scorer", _job(ctx, inputs, builders), items)
    if outside := sum(result.outside_nucleus for result in results):
        ctx.log(f"supervise: {outside} sampled tokens lie just outside the set sampled from, by the scorer's rounding")
    _require_usable(ctx, builders, len(sizes))
    for name, builder in sorted(builders.items()):
        meta = {}
        if not builder.repairing:  # over all shards, including those of an earlier, interrupted attempt
            meta = dict(signal_named(name).meta(Written(builder.finished(name, len(sizes)), ctx.store, rollouts)))
            meta |= inputs.settings.teacher.record(ctx.store.root, inputs.teacher.content["weights"])
            if name == "sampled" and (listed := inputs.settings.teacher.entropy_candidates) is not None:
                meta["metrics"] = {**meta.get("metrics", {}), "teacher_entropy_candidates": listed}
        if meta.get("reasons", {}).get("invalid_value"):
            ctx.log(
                f"warning: {meta['reasons']['invalid_value']} tokens have invalid values; they are masked (reason 16)"
            )
        stage.commit(name, meta)


def _sizes(store: Store, inputs: Inputs) -> list[int]:
    """Samples to score per shard of the rollouts: all, or those of one teacher."""
    records = store.shards(inputs.rollouts, "rollouts")
    if not inputs.names:
        return [record.rows for record in records]
    of, names = teacher_of_prompts(store, inputs.prompts), set(inputs.names)
    readers = store.shard_readers(inputs.rollouts, "rollouts")
    ids = [read(["prompt_id"])["prompt_id"].to_pylist() for read in readers[: len(records)]]
    return [sum(of[prompt] in names for prompt in shard) for shard in ids]


def _require_usable(ctx: Context, builders: Mapping[str, Builder], shards: int) -> None:
    """Refuses signals of a broken model, and removes their shards: after a repair the models are asked again. What is made
    again (a repair, a replay) was accepted before."""
    made = {name: builder for name, builder in builders.items() if not builder.repairing}
    if ctx.recorded:
        return
    try:
        readers = {
            name: [partial(read_parquet, path) for path in builder.finished(name, shards)]
            for name, builder in made.items()
        }
        require_usable("supervise", readers, ctx.runtime.scorer.max_invalid)
    except InputError:
        for name, builder in made.items():
            builder.forget(name)
        raise


def _job(ctx: Context, inputs: Inputs, builders: Mapping[str, Builder]) -> ScoreJob:
    flags: ArtifactRef | None = None
    if "mask" in builders and "sampled" not in builders:
        committed = ctx.store.get("sampled", signal_named("sampled").spec(inputs, None).key)
        if committed is not None and ctx.store.evicted(committed) is None:
            flags = ArtifactRef.of(committed)
    needs_models = flags is None or set(builders) != {"mask"}
    mask = None
    if "mask" in builders:
        name = inputs.names[0] if inputs.names else None
        mask = MaskRules(**mask_rules(ctx.store, inputs.prompts, inputs.settings.special_tokens, name))
    return ScoreJob(
        store=str(ctx.store.root),
        rollouts=ArtifactRef.of(inputs.rollouts),
        prompts=ArtifactRef.of(inputs.prompts),
        student=ModelRef.of(ctx.store, inputs.student, needs_models),
        teacher=ModelRef.of(ctx.store, inputs.teacher, needs_models and inputs.settings.teacher.asked),
        dtype=inputs.settings.dtype,
        sampling=ScoringDistribution(**inputs.sampling),
        backend=config_json(inputs.settings.teacher),
        mask=mask,
        flags=flags,
        stop_ids=merged_stop_ids(inputs.prompts),
        names=list(inputs.names) or None,
        run_student=inputs.settings.student,
        contexts=None if inputs.contexts is None else ArtifactRef.of(inputs.contexts),
    )


def _require_space(
    ctx: Context, inputs: Inputs, builders: Iterable[str], k: dict[str, int | None], sizes: Sequence[int]
) -> None:
    share = sum(sizes) / max(1, sum(inputs.rollouts.rows.values()))
    tokens = (inputs.rollouts.meta.get("metrics", {}).get("tokens") or 0) * share
    needed = sum(signal_named(name).bytes_per_token(k[name]) for name in builders) * tokens
    ctx.store.require_space(int(needed), "the signals of this round (before compression)")
