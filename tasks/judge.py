"""Judge: verifiers give the rollouts their rewards. This module plans, and counts; workers run the verifiers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from storage.artifacts.shards import read_parquet
from storage.errors import OpdError
from storage.identity import Identity, omit_at
from storage.query.figures import Sums, errors_of, sums
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.inputs.judging import LATE_LEAST, TOOK_LONGER, JudgeConfig, JudgeFunction, given_to
from tasks.inputs.verifiers import verifier_digest
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.sharded import ShardedStage
from tasks.stage import Context, Prompts, Rollouts, Work, prompt_inputs
from tasks.workers.jobs import ArtifactRef, JudgeJob, JudgeShard, config_json

__all__ = ["STAGE", "TABLE", "VERSION", "EarlierRewards", "JudgeConfig", "judge_work", "sources_of"]

VERSION = 1
STAGE = "judge"
TABLE = "rewards"
SPLIT = "train"
_BINARY_THRESHOLD = 0.5
_SHOWN = 3
"""Reasons that a message lists."""


class _JudgeIdentity(Identity):
    config: JudgeConfig
    sources: list[str | None]
    plugins: dict[str, str] = Field({}, json_schema_extra=omit_at({}))
    ignores_failed: bool = Field(False, json_schema_extra=omit_at(False))
    """Whether a verifier of weight 0 that fails leaves the reward (an earlier version: no reward)."""


def sources_of(config: JudgeConfig) -> list[str | None]:
    """Per verifier the digest of its function's file, None for others. ConfigError for a function that is not found, or takes
    other parameters."""
    for verifier in config.verifiers:
        if isinstance(verifier, JudgeFunction):
            given_to(verifier)
    return [verifier_digest(verifier) for verifier in config.verifiers]


def judge_work(
    config: JudgeConfig,
    rollouts: Rollouts,
    prompts: Prompts,
    plugins: Mapping[str, str] = NO_PLUGINS,
    earlier: EarlierRewards | None = None,
) -> Work:
    """The rewards of one round's rollouts. `plugins`: the run's, name -> digest of the source. With `earlier`, a note where these
    completions were judged by other code of the functions.

    Output "judge": table rewards, with the shards and the order of the rollouts. Meta: `metrics` (see `metrics_of`), `failures`
    (reason -> samples without a reward for it, the most frequent). A sample whose verifier fails, takes too long or ends its
    process has a null reward and a reason, unless the verifier's weight is 0. Raises ConfigError for a function that is not
    found; the work raises OpdError, and keeps nothing, where no sample has a reward, or where verifiers were stopped at their
    limit at more than half of at least `LATE_LEAST` samples."""
    inputs = {"rollouts": rollouts.content["rollouts"], **prompt_inputs(prompts, SPLIT)}
    functions = [verifier for verifier in config.verifiers if isinstance(verifier, JudgeFunction)]
    if any("tokens" in given_to(verifier) for verifier in functions):
        inputs["vocabulary"] = prompts.content["vocabulary"]
    sources = sources_of(config)
    identity = _JudgeIdentity(
        config=config,
        sources=sources,
        plugins=used_plugins(plugins, "judge", config=config),
        ignores_failed=any(verifier.weight == 0 for verifier in config.verifiers),
    )
    spec = ArtifactSpec.of(STAGE, VERSION, identity, inputs)

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders[STAGE], ctx, config, sources, rollouts, prompts)

    again = None if earlier is None else earlier.by_other_code(spec, config, sources)
    return Work(STAGE, {STAGE: spec}, build, notes=() if again is None else (again,))


class EarlierRewards:
    """The rewards that are in a store when it is first asked. One object serves all rounds of a call: what the rounds before have
    judged meanwhile is of other completions."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @functools.cached_property
    def _by_inputs(self) -> dict[tuple[tuple[str, str], ...], list[Artifact]]:
        found: dict[tuple[tuple[str, str], ...], list[Artifact]] = {}
        for artifact in self._store.list(STAGE):
            found.setdefault(tuple(sorted(artifact.inputs.items())), []).append(artifact)
        return found

    def by_other_code(self, spec: ArtifactSpec, config: JudgeConfig, sources: Sequence[str | None]) -> str | None:
        """What to say where nothing but the code of functions differs from rewards of the same completions; None where there are
        none such, or `spec` itself is there."""
        if not any(sources) or self._store.get(spec.stage, spec.key) is not None:
            return None
        for artifact in self._by_inputs.get(tuple(sorted(spec.inputs.items())), ()):
            before = artifact.identity.get("sources")
            if before is None or artifact.version != spec.version:
                continue
            if artifact.identity | {"sources": None} == spec.identity | {"sources": None}:
                changed = [name for name, then, now in zip(config.names, before, sources, strict=True) if then != now]
                return (
                    f"the code of {' and '.join(map(repr, changed))} has changed since these completions were judged, so they are"
                    f" judged again; the earlier rewards stay in the store ({artifact})"
                )
        return None


def _build(
    builder: Builder,
    ctx: Context,
    config: JudgeConfig,
    sources: list[str | None],
    rollouts: Rollouts,
    prompts: Prompts,
) -> None:
    sizes = [record.rows for record in ctx.store.shards(rollouts, "rollouts")]
    stage = ShardedStage(ctx, STAGE, sizes, {TABLE: builder}, (STAGE,))
    if stage.missing:
        job = JudgeJob(
            store=str(ctx.store.root),
            target=ArtifactRef(builder.stage, builder.key),
            rollouts=ArtifactRef.of(rollouts),
            prompts=ArtifactRef.of(prompts),
            config=config_json(config),
            sources=sources,
        )
        _, results = stage.run(STAGE, job, [JudgeShard(shard, sizes[shard]) for shard in stage.missing])
        ignored = sum((Counter(result.ignored) for result in results), Counter[str]())
        if ignored:
            ctx.say(
                STAGE,
                f"warning: verifiers of weight 0 gave no verdict at {sum(ignored.values())} completions, whose rewards stay"
                f" (their part is null): {_reasons(ignored)}",
            )
    meta: dict[str, Any] = {}
    if not builder.repairing:  # over all shards, including those of an earlier, interrupted attempt
        rows = pa.concat_tables([read_parquet(path) for path in builder.finished(TABLE, len(sizes))])
        failures = Counter(reason for reason in rows["failed"].to_pylist() if reason is not None)
        if rows.num_rows and sum(failures.values()) == rows.num_rows:
            if not ctx.recorded:
                builder.forget(TABLE)  # what failed outside (a service, a missing file) can be right at the next try
            raise OpdError(
                f"judge: none of {rows.num_rows} completions has a reward: {_reasons(failures)}; try the verifier with"
                " `opd check`, and see the log of the judge"
            )
        late = _count(failures, TOOK_LONGER)
        if not ctx.recorded and rows.num_rows >= LATE_LEAST and 2 * late > rows.num_rows:  # of all workers and attempts
            builder.forget(TABLE)
            raise OpdError(
                f"judge: verifiers were stopped at judge.timeout ({config.timeout:g} s) at {late} of {rows.num_rows} completions,"
                " and this round would train on the others alone; raise it, or mend or remove the verifier"
            )
        if failures:
            ctx.say(
                STAGE,
                f"warning: {sum(failures.values())} of {rows.num_rows} completions have no reward and count for no group:"
                f" {_reasons(failures)}",
            )
        columns = ["sample_id", "prompt_id", "completion_token_ids"]
        samples = ctx.store.read_table(rollouts, "rollouts", columns=columns)
        meta = {"metrics": metrics_of(config, rows, samples), "failures": dict(failures.most_common(20))}
    stage.commit(TABLE, meta)


def _reasons(failures: Counter[str]) -> str:
    shown = [f"{reason} ({count})" for reason, count in failures.most_common(_SHOWN)]
    more = f"; and {len(failures) - _SHOWN} other reasons" if len(failures) > _SHOWN else ""
    return "; ".join(shown) + more


def _count(failures: Counter[str], part: str) -> int:
    """Of the reasons that have this part."""
    return sum(count for reason, count in failures.items() if part in reason)


def metrics_of(config: JudgeConfig, rewards: pa.Table, rollouts: pa.Table) -> dict[str, float | None]:
    """What a round's rewards are like. `rewards`, `rollouts`: rows of the same samples in the same order.

    reward: mean over judged samples; with several verifiers also reward/NAME, each unweighted. success_rate: share of the judged
    that are correct (`JudgeConfig.success_threshold`); length_correct, length_wrong: mean tokens of their completions. Each with
    its error over prompts (`figures.errors_of`). failed: samples without a reward; timed_out: those of them at which a verifier
    was stopped at its limit; failed/NAME: samples at which that verifier of weight 0 failed; feedback_cut: samples whose feedback
    was longer than `max_feedback`. groups: prompts; groups_without_signal: those whose judged rewards are all equal, or that have
    none. Null where nothing was counted."""
    judged = rewards["reward"].is_valid()
    reward, prompts = rewards["reward"].filter(judged), rollouts["prompt_id"].filter(judged)
    lengths = pc.list_value_length(rollouts["completion_token_ids"]).filter(judged)
    found: dict[str, Sums] = {"reward": sums(prompts, reward)}
    failures = Counter(reason for reason in rewards["failed"].to_pylist() if reason is not None)
    limit = config.max_feedback
    counts: dict[str, float | None] = {
        "failed": rewards.num_rows - len(reward),
        "timed_out": _count(failures, TOOK_LONGER),
        "feedback_cut": sum(len(text) > limit for text in rewards["feedback"].to_pylist() if text) if limit else 0,
    }
    if len(config.verifiers) > 1:
        parts = np.array(rewards["parts"].filter(judged).to_pylist(), float).reshape(-1, len(config.verifiers))
        for place, name in enumerate(config.names):
            known = ~np.isnan(parts[:, place])  # one of weight 0 may have failed
            if not config.verifiers[place].weight:
                counts[f"failed/{name}"] = int((~known).sum())
            found[f"reward/{name}"] = sums(
                prompts.filter(pa.array(known)), pa.chunked_array([pa.array(parts[known, place])])
            )
    threshold = threshold_of(config, reward)
    if threshold is not None:
        correct = pc.greater_equal(reward, threshold)
        found["success_rate"] = sums(prompts, correct)
        for name, chosen in (("length_correct", correct), ("length_wrong", pc.invert(correct))):
            found[name] = sums(prompts.filter(chosen), lengths.filter(chosen))
    groups, flat = groups_of(rewards["reward"], rollouts["prompt_id"])
    names = ("reward", "success_rate", "length_correct", "length_wrong", *(n for n in found if "/" in n))
    return {
        **{name: found[name].value if name in found else None for name in names},
        **counts,
        "groups": groups,
        "groups_without_signal": flat,
        **errors_of({name: of for name, of in found.items() if of.samples}),
    }


def threshold_of(config: JudgeConfig, rewards: pa.ChunkedArray) -> float | None:
    """The reward from which a completion is correct; None where that is not known."""
    if config.success_threshold is not None:
        return config.success_threshold
    binary = pc.all(pc.is_in(rewards, value_set=pa.array([0.0, 1.0]))).as_py()
    return _BINARY_THRESHOLD if binary else None


def groups_of(rewards: pa.ChunkedArray, prompts: pa.ChunkedArray) -> tuple[int, int]:
    """How many prompts there are, and how many of them without two different rewards (null: not judged)."""
    by_prompt: dict[str, set[float]] = {}
    for prompt, reward in zip(prompts.to_pylist(), rewards.to_pylist(), strict=True):
        known = by_prompt.setdefault(prompt, set())
        if reward is not None:
            known.add(reward)
    return len(by_prompt), sum(len(known) < 2 for known in by_prompt.values())
