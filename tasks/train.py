"""train: rollouts and their signals in, a better student out (and the state that the next round goes on from)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from storage.errors import InputError
from storage.store import Artifact, ArtifactSpec, Builder
from tasks.inputs.models import ModelSource, dropout_identity
from tasks.inputs.teachers import EmaStudent
from tasks.losses.config import AnyObjective
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.routing import all_routes, combined
from tasks.signals import require_usable, signal_named
from tasks.stage import (
    Context,
    Contexts,
    Judged,
    Prompts,
    Rollouts,
    Student,
    TrainerState,
    Work,
    merged_stop_ids,
    model_inputs,
    stop_inputs,
)
from tasks.trainer.config import TrainConfig, forward_identity
from tasks.trainer.dispatch import run_and_commit
from tasks.workers.jobs import ArtifactRef, TrainJob, TrainOutputs, WeightAverage, config_json

__all__ = ["VERSION", "TrainConfig", "train_work"]

VERSION = 1
LARGE_MISMATCH = 0.02
"""Mean |log-probability of the student - of the sampler| per token, in nats: engines in one 16-bit dtype stay around half of it,
float32 engines below 1e-5."""


def train_work(
    config: TrainConfig,
    objective: AnyObjective,
    student: Student,
    state: TrainerState | None,
    rollouts: Rollouts,
    signals: Signals,
    seed: int,
    round: int,
    source: ModelSource | None = None,
    average: EmaStudent | None = None,
    plugins: Mapping[str, str] = NO_PLUGINS,
    prompts: Prompts | None = None,
    routed: bool = False,
    contexts: Contexts | None = None,
    judged: Judged | None = None,
) -> Work:
    """Work with the outputs `student` (tree model), `trainer_state` (tree state), `train` (table training_steps) and, with an
    `average`, `teacher_ema` (tree model): the average of the student's weights after this round, which `trainer_state` holds.

    `signals`: by name one teacher's signals, or by any label those of several teachers, which have every sample once between
    them. `prompts`: they say which stop ids are merged, and where they name their teachers (`routed`) whose prompt each is;
    `train` then has the table teacher_steps. `judged`: the rewards; read where the objective needs them. `contexts`: of the
    samples, where they have their own; those without one are left out of the loss, unless the objective tells them apart
    (estimator credit).
    Steps, learning rate and moments go on from `state`; without one they start at step 0 from the student's weights.
    `source`: of the first student, whose config says whether dropout is to be turned off. `plugins`: the run's, name -> digest of
    the source.
    Raises InputError when the state belongs to another student, or a signal or the rewards that the objective needs are not
    given."""
    needed = {need.name: need for need in objective.needs().signals}
    given = by_signal(signals)
    missing = sorted(set(needed) - set(given))
    if missing:
        raise InputError(f"train: the objective needs the signal {missing[0]!r}; given are {sorted(given) or 'none'}")
    used = {name: given[name] for name in sorted(needed)}
    if state is not None and state.meta.get("student_weights") not in (None, student.content["weights"]):
        raise InputError(
            f"train: the trainer state {state.key} belongs to the student with weights"
            f" {state.meta['student_weights'][:12]}, not to {student.content['weights'][:12]}"
        )
    inputs = {
        **model_inputs(student),
        "rollouts": rollouts.content["rollouts"],
    }
    inputs |= {f"signal:{name}": combined([part.content[name] for part in parts]) for name, parts in used.items()}
    inputs |= stop_inputs(prompts)
    if routed:
        if prompts is None:
            raise InputError("train: routed needs the prompts, which say whose each is")
        inputs["teachers"] = prompts.content[all_routes("train")]
    rewards = judged if objective.needs().credit.reward else None
    if objective.needs().credit.reward:
        if judged is None:
            raise InputError("train: the objective needs the rewards of the stage `judge`, and none are given")
        inputs["rewards"] = judged.content["rewards"]
    if contexts is not None:
        inputs["contexts"] = contexts.content["contexts"]
    if state is not None:
        inputs["state"] = state.content["state"]
    identity: dict[str, Any] = {"config": config, "objective": objective, "seed": seed, "round": round}
    identity |= dropout_identity(source, config.dropout)
    loaded = [type(signal_named(name)) for name in used]
    identity |= forward_identity(config)
    if brought := used_plugins(plugins, "trainer", config=objective, classes=loaded):
        identity["plugins"] = brought
    names = ["student", "trainer_state", "train"]
    if average is not None:
        identity["teacher_ema"] = average
        names.append("teacher_ema")
    outputs = {name: ArtifactSpec.of(name, VERSION, identity, inputs) for name in names}

    def build(builders: dict[str, Builder], context: Context) -> None:
        if not context.recorded and not any(builder.repairing for builder in builders.values()):
            # of another run that accepts more, or of a version that did not ask
            for name, parts in used.items():  # each teacher alone: a broken one is not to hide behind the others
                for part in parts:
                    readers = {name: context.store.shard_readers(part, name)}  # a damaged shard moves to quarantine
                    require_usable("train", readers, context.runtime.scorer.max_invalid)
        if (warning := mismatch_warning(config, objective, given.get("sampled", []))) is not None:
            context.say("train", f"warning: {warning}")
        job = TrainJob(
            store=str(context.store.root),
            model=str(context.store.materialize(student, "model")),
            state=str(context.store.materialize(state, "state")) if state is not None else None,
            rollouts=ArtifactRef.of(rollouts),
            signals={name: [ArtifactRef.of(part) for part in parts] for name, parts in used.items()},
            prompts=ArtifactRef.of(prompts) if prompts is not None and routed else None,
            contexts=None if contexts is None else ArtifactRef.of(contexts),
            config=config_json(config),
            objective=config_json(objective),
            seed=seed,
            round=round,
            outputs=TrainOutputs(),
            stop_ids=merged_stop_ids(prompts),
            average=None if average is None else WeightAverage(average.decay, average.per),
            judged=ArtifactRef.of(rewards) if rewards is not None else None,
        )
        run_and_commit(job, outputs, builders, context)

    return Work("train", outputs, build)


Signals = Mapping[str, Artifact] | Mapping[str, Mapping[str, Artifact]]


def by_signal(signals: Signals) -> dict[str, list[Artifact]]:
    """By name of a signal the artifacts that hold it: one, or one per teacher."""
    found: dict[str, list[Artifact]] = {}
    for label, item in signals.items():
        for name, artifact in [(label, item)] if isinstance(item, Artifact) else sorted(item.items()):
            found.setdefault(name, []).append(artifact)
    return found


def mismatch_warning(config: TrainConfig, objective: AnyObjective, sampled: Sequence[Artifact]) -> str | None:
    """A warning where the sampler's log-probabilities are far from the scorer's, as `sampled` has measured it, and an objective
    that takes samples for the student's own does not correct for it; else None."""
    if config.importance_correction.kind != "none" or not objective.requires_untruncated_sampling:
        return None
    measured = [part.meta.get("metrics") or {} for part in sampled]
    metrics = max(measured, key=lambda found: found.get("sampler_mismatch_mean") or 0.0, default={})
    mean = metrics.get("sampler_mismatch_mean") or 0.0
    if mean <= LARGE_MISMATCH:
        return None
    return (
        f"the sampler's log-probabilities differ from the student's by {mean:.3f} nats per token (99%:"
        f" {metrics.get('sampler_mismatch_p99') or math.nan:.3f}), and this objective takes the samples for the student's own;"
        " train.importance_correction: {kind: truncated} weights the tokens for that, one dtype in rollout, supervise and train"
        " makes it smaller"
    )
