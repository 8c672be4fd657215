"""The part of `train` and `warmup` that runs in the flow's process: sends the job and commits the artifacts. No engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from storage.artifacts.artifact import provenance
from storage.artifacts.checkpoints import KEPT, Checkpoints
from storage.artifacts.digests import weights_digest
from storage.errors import ConfigError, CorruptArtifact
from storage.identity import canonical_json
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.inputs.models import parameter_count
from tasks.signals import signal_named
from tasks.stage import Context
from tasks.trainer.config import OptimizerSettings, TrainConfig, WarmupConfig
from tasks.workers.jobs import ArtifactRef, CheckpointPlace, TrainJob, TrainOutputs, TrainResult, WarmupJob
from tasks.workers.metrics import Metrics, left_out, summary

_MUCH = 0.9
"""Share of an adapters' update lost to rounding that is worth a warning."""
_COMPLETION_BYTES = 32
"""Per completion token in mapped files, beside the signals: its id, whether it is in the loss, the sampler's log-probability, and
where its lists are."""
_TREES = {"student": "model", "trainer_state": "state", "teacher_ema": "model"}


def run_and_commit(
    job: TrainJob | WarmupJob, specs: Mapping[str, ArtifactSpec], builders: Mapping[str, Builder], context: Context
) -> None:
    """Runs the job on the trainer and commits the outputs in `builders`: the trees `student`, `trainer_state` and `teacher_ema`,
    and the table training_steps (with several teachers teacher_steps too) of any other. Training is atomic: if any output is
    missing it reruns, and must reproduce the outputs that exist.

    Raises ConfigError, before training, if the others were made at other numerics; CorruptArtifact, before committing
    anything, if the new student's weights differ from theirs."""
    folders = {
        name: str(builder.directory(tree)) if builder.needs_tree(tree) else None
        for name, tree in _TREES.items()
        if (builder := builders.get(name)) is not None
    }
    steps = None
    several = isinstance(job, TrainJob) and job.prompts is not None
    tables = ("training_steps", "teacher_steps") if several else ("training_steps",)
    for name, builder in builders.items():
        if name not in _TREES:
            for table in tables:
                builder.forget(table)  # it may be from a training with other weights
            absent = any(builder.missing(table, 1) for table in tables)
            steps = ArtifactRef(builder.stage, builder.key) if absent else None
    # an existing student is exported again, for comparison
    exported = folders.get("student") or str(next(iter(builders.values())).scratch())
    others = {name: folder for name, folder in folders.items() if name != "student"}
    outputs = TrainOutputs(student=exported, steps=steps, **others)
    context.log(f"{job.stage}: {job.model}")
    earlier = _earlier(specs, builders, context)
    if earlier is not None:
        _require_same_numerics(job, earlier, list(builders), context)
    _require_space(job, "trainer_state" in builders, context)
    order = sorted(builders, key=lambda name: name != "student")  # the other outputs record its weights
    numerics = context.runtime.numerics("trainer")
    last = builders[order[-1]].checkpoints(numerics)  # committed last, so that its checkpoints last as long as needed
    checkpoints = CheckpointPlace(str(last.folder), msgspec.Raw(canonical_json(dict(last.settings)).encode()))

    planned = 0

    def heard(done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
        nonlocal planned
        planned = max(planned, total)
        if note is not None:
            context.say(job.stage, note)
        context.progress(done, total, "steps", metrics)

    sent = msgspec.structs.replace(job, outputs=outputs, checkpoints=checkpoints)
    result: TrainResult = context.workers.run("trainer", sent, heard)
    if text := summary(result.metrics):
        context.log(f"{job.stage}: {result.steps} steps: {text}")
    if result.steps < planned:
        context.say(job.stage, _ended_early(job, result, planned))
    if empty := result.metrics.get("empty_steps"):
        context.say(
            job.stage,
            f"warning: {empty:,.0f} of {result.steps:,} steps had no counted token and changed nothing:"
            f" {left_out(result.metrics)[0]}; see train.mask_reasons and the lengths of the completions",
        )
    if invalid := result.metrics.get("invalid_tokens"):
        context.log(f"warning: {job.stage}: {invalid:.0f} completion tokens have invalid values and were left out")
    if (hidden := result.metrics.get("update_rounded_away") or 0.0) > _MUCH:
        context.say(
            job.stage,
            f"warning: train.dtype: bfloat16 cannot represent {hidden:.0%} of the adapters' update; the student is what training"
            " computed with, but it moves in few weights. dtype: float32 or a larger lr keeps more of the update",
        )
    weights: str | None = None
    if earlier is not None:
        weights = weights_digest(exported)
        _require_same_weights(job, earlier, weights, list(builders), last)
    provenance = {"numerics": numerics}
    meta = {"steps": result.steps, "last_step": result.last_step}
    for name in order:
        if name == "student":
            builders[name].commit(meta=meta, provenance=provenance)
            weights = weights or builders[name].made.get("weights")
            continue
        weights = weights or weights_digest(exported)
        belongs = {"student_weights": weights}
        if name in _TREES:
            builders[name].commit(meta=meta | belongs, provenance=provenance)
        else:
            own = meta | belongs | {"metrics": result.metrics}
            builders[name].commit(meta=own, tables=dict.fromkeys(tables, 1), provenance=provenance)


def _ended_early(job: TrainJob | WarmupJob, result: TrainResult, planned: int) -> str:
    """Why a training has fewer steps than planned: a warm-up at its `stop_loss`, a round at its `max_drift`."""
    name, field, unit = ("drift", "max_drift", "drift") if isinstance(job, TrainJob) else ("loss", "stop_loss", "loss")
    value = result.metrics.get(f"{name}_last")
    at = f" at {unit} {value:.3g}" if value is not None else ""
    return f"ended{at} after {result.steps:,} of {planned:,} steps ({field})"


def _weights(artifact: Artifact) -> str | None:
    """Digest of the student's weights, from any output of the training."""
    return artifact.meta.get("student_weights") or artifact.content.get("weights")


def _earlier(specs: Mapping[str, ArtifactSpec], builders: Mapping[str, Builder], context: Context) -> Artifact | None:
    """An output of the same training that is or was committed (the student first), or None."""
    for name, spec in specs.items():
        builder = builders.get(name)
        artifact = builder.recorded if builder is not None else context.store.get(spec.stage, spec.key)
        if artifact is not None and _weights(artifact) is not None:
            return artifact
    return None


def _require_same_numerics(job: TrainJob | WarmupJob, earlier: Artifact, missing: list[str], context: Context) -> None:
    if differ := context.runtime.training_differs(earlier.provenance.get("numerics") or {}):
        raise ConfigError(
            f"{job.stage}: {' and '.join(sorted(missing))} is missing and must be made with the settings of"
            f" {earlier.stage}/{earlier.key}: {'; '.join(differ)}. Use the old settings for this: opd resume NAME"
            f" --set FIELD=VALUE. {_beside(job)}"
        )


def _require_same_weights(
    job: TrainJob | WarmupJob, earlier: Artifact, weights: str, missing: list[str], checkpoints: Checkpoints
) -> None:
    before = str(_weights(earlier))
    if weights == before:
        return
    checkpoints.discard()  # the next training must not continue from them
    then, now = ({**origin, **origin.get("libraries", {})} for origin in (earlier.provenance, provenance()))
    names = sorted((then.keys() | now.keys()) - {"libraries", "numerics"})
    differ = [f"{name} {then.get(name)}, now {now.get(name)}" for name in names if then.get(name) != now.get(name)]
    changed = f"Changed since: {'; '.join(differ)}" if differ else "No recorded setting has changed since"
    raise CorruptArtifact(
        f"{job.stage}: {' and '.join(sorted(missing))} was missing, and retraining gave weights {weights[:12]}, but"
        f" {earlier.stage}/{earlier.key} was trained with {before[:12]}; the new result was discarded. {changed}. With the old"
        f" versions: opd resume NAME. {_beside(job)}"
    )


def _beside(job: TrainJob | WarmupJob) -> str:
    """The command that continues without them and keeps everything committed."""
    new = f"--name NEW --set seed={job.seed + 1}"
    command = f"opd fork NAME@{job.round - 1} {new}" if job.round else f"opd run CONFIG {new}"
    return f"If that is impossible, repeat the round in another run: {command}"


def training_bytes(parameters: int, settings: OptimizerSettings, states: int, averaged: bool = False) -> int:
    """Upper estimate of a job's output in bytes: the student in its dtype, and `states` times float32 weights and two moments
    of all `parameters` (not with adapters). `averaged`: with an average in each state, and exported."""
    student = parameters * (2 if settings.dtype == "bfloat16" else 4) * (2 if averaged else 1)
    return student if settings.lora is not None else student + states * (16 if averaged else 12) * parameters


def _require_space(job: TrainJob | WarmupJob, state: bool, context: Context) -> None:
    """Raises NotEnoughSpace if the job's output does not fit on the disk."""
    config: type[OptimizerSettings] = TrainConfig if isinstance(job, TrainJob) else WarmupConfig
    settings = config.model_validate_json(bytes(job.config))
    states = state + (KEPT + 1 if context.runtime.trainer.checkpoint_minutes is not None else 0)
    needed = training_bytes(parameter_count(Path(job.model)), settings, states, job.average is not None)
    if isinstance(job, TrainJob):
        needed += round_bytes(job, context.store)
    context.store.require_space(needed, f"{job.stage}: student, optimizer state, checkpoints, the round's data")


def round_bytes(job: TrainJob, store: Store) -> int:
    """Estimate of the files that the ranks map while they train (`columns.py`), from the mean length of the completions; 0 where
    that is not recorded."""
    rollouts = store.require(job.rollouts.stage, job.rollouts.key)
    length = (rollouts.meta.get("metrics") or {}).get("mean_length") or 0.0
    per_token = _COMPLETION_BYTES
    for name, places in job.signals.items():
        made = store.require(places[0].stage, places[0].key)
        per_token += signal_named(name).bytes_per_token(made.identity.get("k"))
    return int(rollouts.rows["rollouts"] * length * per_token)
