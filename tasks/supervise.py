"""Supervise: what student and teacher say about the rollouts, as signals. transformers scores, in workers; this half
plans, finds what is there already, and commits. One pass of the models writes all signals that are missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from storage.artifacts.shards import read_parquet
from storage.errors import ConfigError, InputError
from storage.identity import Identity
from storage.schemas import MaskReason
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.losses.needs import SignalNeed
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.sharded import ShardedStage
from tasks.stage import Context, Work
from tasks.workers.jobs import (
    ArtifactRef,
    MaskRules,
    ModelRef,
    ScoreJob,
    ScoreShard,
    ScoringDistribution,
    SignalOutput,
)

VERSIONS = {"sampled": 1, "teacher_topk": 1, "student_topk": 1, "mask": 1}
TOPK = ("teacher_topk", "student_topk")
SPLIT = "train"
_BYTES = {"sampled": 20, "mask": 4, "teacher_topk": 8, "student_topk": 12}
"""Per completion token, and for top-K lists per candidate; before compression."""


class SpecialTokens(Identity):
    """Which completion tokens get the mask reason SPECIAL_TOKEN. Whether it masks them is for `train` to say."""

    mark: Literal["differing", "all"] = Field(
        "differing",
        description="differing: special tokens that mean something else to the teacher, by the tokenizer audit; all:"
        " every special token (without supervision of a matching end of sequence completions run away)",
    )
    tokens: tuple[str, ...] = Field((), description="further tokens, by name or text (<, think)")
    occurrence: Literal["all", "first"] = Field(
        "all", description="every occurrence, or the first of each token in a completion (Revisiting OPD)"
    )


class SuperviseConfig(Identity):
    """How rollouts are scored. Which signals are made is the objective's need, not a setting."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="both models' weights and arithmetic; probabilities are always computed in float32"
    )
    encoding: Literal["exact", "compact"] = Field(
        "exact", description="of top-K lists; compact rounds their log-probabilities to float16"
    )
    special_tokens: SpecialTokens = SpecialTokens()


class Sampling(Protocol):
    """The part of a rollout's config that shapes the distribution sampled from."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...


def supervise_work(
    config: SuperviseConfig,
    rollouts: Artifact,
    student: Artifact,
    teacher: Artifact,
    prompts: Artifact,
    needs: Sequence[SignalNeed],
    sampling: Sampling,
    store: Store | None = None,
    plugins: Mapping[str, str] = NO_PLUGINS,
) -> Work:
    """The signals that an objective needs of one round's rollouts, each an artifact of its own. `plugins`: the run's, name ->
    digest of the source.

    Outputs "sampled", "teacher_topk", "student_topk", "mask", as needed: one table of the same name each, with the
    shards of the rollouts. With a `store`, a committed list of more candidates serves where fewer are asked for
    (`Work.shared`). Meta: `sampled` has the metrics sampler_mismatch_mean, _p99, _max (nats, |behaviour - sampling
    log-probabilities|), `teacher_topk` has teacher_mass, `mask` counts the tokens of every reason. Raises ConfigError
    for a list without k."""
    made = tuple({need.name: need for need in needs}.values())
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    context = _Inputs(config, rollouts, student, teacher, prompts, how, used_plugins(plugins, "scorer"))
    outputs: dict[str, ArtifactSpec] = {need.name: context.spec(need.name, need.k) for need in made}
    shared: dict[str, str] = {}
    for need in made:
        if store is not None and need.k is not None and store.get(need.name, outputs[need.name].key) is None:
            larger = find_topk(store, outputs[need.name], need.k)
            if larger is not None:
                shared[need.name] = larger.key

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders, ctx, context)

    return Work("supervise", outputs, build, shared)


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


class _Inputs:
    """What the signals are made from, and the identity that follows."""

    def __init__(
        self,
        config: SuperviseConfig,
        rollouts: Artifact,
        student: Artifact,
        teacher: Artifact,
        prompts: Artifact,
        sampling: dict[str, Any],
        plugins: dict[str, str],
    ) -> None:
        self.config, self.rollouts, self.student, self.teacher = config, rollouts, student, teacher
        self.prompts, self.sampling, self.plugins = prompts, sampling, plugins

    def spec(self, name: str, k: int | None = None) -> ArtifactSpec:
        """Each signal's key holds only what it depends on: the teacher's list not the student's weights, nothing but
        the mask the policy about special tokens. Marks of invalid values make the mask depend on both models."""
        if (k is None) == (name in TOPK):
            raise ConfigError(f"objective: the signal {name!r} {'needs' if name in TOPK else 'takes no'} k")
        identity: dict[str, Any] = {"dtype": self.config.dtype} | ({"plugins": self.plugins} if self.plugins else {})
        inputs = {"rollouts": self.rollouts.content["rollouts"], "prompts": self.prompts.content[f"prompts:{SPLIT}"]}
        # the student's config alone matters to the teacher's list: no candidate lies past the student's vocabulary
        models = [("teacher", self.teacher, "weights"), ("teacher", self.teacher, "architecture")]
        models += [("student", self.student, "architecture")]
        if name != "teacher_topk":
            models.append(("student", self.student, "weights"))
        inputs |= {f"{who}:{part}": model.content[part] for who, model, part in models}
        if name in TOPK:
            identity |= {"k": k, "encoding": self.config.encoding}
        elif name == "sampled":
            identity["sampling"] = self.sampling
        else:
            identity["special_tokens"] = self.config.special_tokens
            inputs |= {part: self.prompts.content[part] for part in ("audit", "vocabulary")}
        return ArtifactSpec.of(name, VERSIONS[name], identity, inputs)


def mask_rules(store: Store, prompts: Artifact, special_tokens: SpecialTokens) -> MaskRules:
    """The rules of the scorer's `mask_table`, from the tokenizers' audit and vocabularies in the `prepare` artifact.

    Raises InputError for a token that the student's tokenizer does not have, or prompts prepared without a teacher."""
    audit = prompts.meta.get("audit")
    if audit is None:
        raise InputError(
            f"prepare/{prompts.key}: its prompts were prepared without a teacher, so no tokens were compared"
        )
    vocabulary = store.read_table(prompts, "vocabulary", columns=["tokenizer", "id", "token", "text", "special"])
    special = set(vocabulary.filter(vocabulary["special"])["id"].to_pylist())
    unmapped = set(audit["masked_ids"])
    marked = special if special_tokens.mark == "all" else special & unmapped
    own = vocabulary.filter(pc.equal(vocabulary["tokenizer"], "student"))
    for name in special_tokens.tokens:
        marked = marked | _ids_of(name, own)
    return MaskRules(
        unmapped=sorted(unmapped),
        teacher_rows=audit["teacher"]["rows"],
        special=sorted(marked),
        occurrence=special_tokens.occurrence,
    )


def _ids_of(name: str, vocabulary: pa.Table) -> set[int]:
    columns = (vocabulary[column].to_pylist() for column in ("id", "token", "text"))
    rows = list(zip(*columns, strict=True))
    found = {index for index, token, text in rows if name in (token, text)}
    if not found:
        near = difflib.get_close_matches(name, [token for _, token, _ in rows], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"supervise.special_tokens.tokens: the student's tokenizer has no token {name!r}{hint}")
    return found


def _build(builders: dict[str, Builder], ctx: Context, inputs: _Inputs) -> None:
    rollouts = inputs.rollouts
    k = {name: builder.spec.identity.get("k") for name, builder in builders.items()}  # a list that served may be longer
    sizes = [record.rows for record in ctx.store.shards(rollouts, "rollouts")]
    stage = ShardedStage(ctx, "supervise", sizes, builders, ("scorer",))
    _require_space(ctx, rollouts, builders, k)
    outputs = {
        name: SignalOutput(name, ArtifactRef(name, builder.key), k[name], inputs.config.encoding)
        for name, builder in sorted(builders.items())
    }
    results = []
    if stage.missing:
        items = [
            ScoreShard(shard, sizes[shard], [out for name, out in outputs.items() if shard in stage.absent[name]])
            for shard in stage.missing
        ]
        results, _ = stage.run("scorer", _job(ctx, inputs, builders), items)
    if outside := sum(result.outside_nucleus for result in results):
        ctx.log(f"supervise: {outside} sampled tokens lie just outside the set sampled from, by the scorer's rounding")
    for name, builder in sorted(builders.items()):
        meta = {} if builder.repairing else _meta(name, builder, ctx.store, rollouts, len(sizes))
        if meta.get("reasons", {}).get("invalid_value"):
            ctx.log(
                f"warning: {meta['reasons']['invalid_value']} tokens have invalid values; they are masked (reason 16)"
            )
        stage.commit(name, meta)


def _job(ctx: Context, inputs: _Inputs, builders: Mapping[str, Builder]) -> ScoreJob:
    flags: ArtifactRef | None = None
    if "mask" in builders and "sampled" not in builders:
        committed = ctx.store.get("sampled", inputs.spec("sampled").key)
        if committed is not None and ctx.store.evicted(committed) is None:
            flags = ArtifactRef.of(committed)
    needs_models = flags is None or set(builders) != {"mask"}
    return ScoreJob(
        store=str(ctx.store.root),
        rollouts=ArtifactRef.of(inputs.rollouts),
        prompts=ArtifactRef.of(inputs.prompts),
        student=ModelRef.of(ctx.store, inputs.student, needs_models),
        teacher=ModelRef.of(ctx.store, inputs.teacher, needs_models),
        dtype=inputs.config.dtype,
        sampling=ScoringDistribution(**inputs.sampling),
        mask=mask_rules(ctx.store, inputs.prompts, inputs.config.special_tokens) if "mask" in builders else None,
        flags=flags,
    )


def _require_space(ctx: Context, rollouts: Artifact, builders: Iterable[str], k: dict[str, int | None]) -> None:
    tokens = rollouts.meta.get("metrics", {}).get("tokens") or 0
    needed = sum(_BYTES[name] * (k[name] or 1) for name in builders) * tokens
    ctx.store.require_space(int(needed), "the signals of this round (before compression)")


# --- what is said of a signal ----------------------------------------------------------------------------------------


def _meta(name: str, builder: Builder, store: Store, rollouts: Artifact, shards: int) -> dict[str, Any]:
    """Over all shards, those of an earlier, interrupted attempt too."""
    files = builder.finished(name, shards)
    if name == "sampled":
        gaps = []
        for shard, path in enumerate(files):
            given = store.read_shard(rollouts, "rollouts", shard)["sampling_logprobs"]
            gaps.append(_mismatch(read_parquet(path, ["behaviour_logprobs"])["behaviour_logprobs"], given))
        return {"metrics": _summary(pa.chunked_array(gaps, pa.float32()))}
    if name == "teacher_topk":
        tails = pa.concat_tables([read_parquet(path, ["tail_logmass"]) for path in files])
        tail = pc.list_flatten(tails["tail_logmass"])
        mass = pc.subtract(1.0, pc.exp(tail.filter(pc.invert(pc.is_nan(tail))).cast(pa.float64())))
        return {"metrics": {"teacher_mass": pc.mean(mass).as_py()}}
    if name == "mask":
        tables = pa.concat_tables([read_parquet(path, ["mask_reasons"]) for path in files])
        reasons = pc.list_flatten(tables["mask_reasons"])
        counts = {
            (reason.name or "").lower(): pc.sum(pc.not_equal(pc.bit_wise_and(reasons, int(reason)), 0)).as_py() or 0
            for reason in MaskReason
        }
        return {"reasons": counts, "tokens": len(reasons), "metrics": {"invalid_tokens": counts["invalid_value"]}}
    return {}


def _mismatch(behaviour: pa.ChunkedArray, sampling: pa.ChunkedArray) -> pa.Array:
    """|behaviour - sampling log-probabilities| of every token that has both, as numbers."""
    here = pc.is_valid(behaviour)
    gap = pc.abs(pc.subtract(pc.list_flatten(behaviour.filter(here)), pc.list_flatten(sampling.filter(here))))
    return pa.concat_arrays(gap.filter(pc.is_finite(gap)).chunks or [pa.array([], pa.float32())])


def _summary(gaps: pa.ChunkedArray) -> dict[str, float | None]:
    percentile = pc.quantile(gaps, 0.99)[0].as_py() if len(gaps) else None
    return {
        "sampler_mismatch_mean": pc.mean(gaps).as_py(),
        "sampler_mismatch_p99": percentile,
        "sampler_mismatch_max": pc.max(gaps).as_py(),
    }
