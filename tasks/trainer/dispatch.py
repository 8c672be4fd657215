"""The part of `train` and `warmup` that runs in the flow's process: sends the job and commits the artifacts. No engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.artifacts.artifact import provenance
from storage.artifacts.checkpoints import KEPT, Checkpoints
from storage.artifacts.digests import weights_digest
from storage.errors import ConfigError, CorruptArtifact
from storage.store import Artifact, ArtifactSpec, Builder
from tasks.inputs.models import parameter_count
from tasks.stage import Context
from tasks.trainer.config import OptimizerSettings, TrainConfig, WarmupConfig
from tasks.workers.metrics import Metrics, summary

_TREES = {"student": "model", "trainer_state": "state"}


def place(artifact: Artifact) -> dict[str, str]:
    """The reference by which a job names an artifact in the store."""
    return {"stage": artifact.stage, "key": artifact.key}


def run_and_commit(
    job: dict[str, Any], specs: Mapping[str, ArtifactSpec], builders: Mapping[str, Builder], context: Context
) -> None:
    """Runs the job on the trainer and commits the outputs in `builders`: the trees `student` and `trainer_state`, and the table
    training_steps of any other. Training is atomic: if any output is missing it reruns, and must reproduce the outputs that
    exist.

    Raises ConfigError, before training, if the others were made at other numerics; CorruptArtifact, before committing
    anything, if the new student's weights differ from theirs."""
    outputs: dict[str, Any] = {}
    for name, builder in builders.items():
        if name in _TREES:
            outputs[name] = str(builder.directory(_TREES[name])) if builder.needs_tree(_TREES[name]) else None
        else:
            builder.forget("training_steps")  # it may be from a training with other weights
            missing = builder.missing("training_steps", 1)
            outputs["steps"] = {"stage": builder.stage, "key": builder.key} if missing else None
    # an existing student is exported again, for comparison
    outputs["student"] = outputs.get("student") or str(next(iter(builders.values())).scratch())
    context.log(f"{job['op']}: {job['model']}")
    earlier = _earlier(specs, builders, context)
    if earlier is not None:
        _require_same_numerics(job, earlier, list(builders), context)
    _require_space(job, "trainer_state" in builders, context)
    order = sorted(builders, key=lambda name: name != "student")  # the other outputs record its weights
    numerics = context.runtime.numerics("trainer")
    last = builders[order[-1]].checkpoints(
        numerics
    )  # committed last, so that its checkpoints exist as long as they are needed
    checkpoints = {"folder": str(last.folder), "settings": last.settings}

    def on_progress(_: int, done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
        if note is not None:
            context.say(job["op"], note)
        context.progress(done, total, "steps", metrics)

    [result] = context.workers.run(
        "trainer",
        [{**job, "store": str(context.store.root), "outputs": outputs, "checkpoints": checkpoints}],
        on_progress,
    )
    if text := summary(result["metrics"]):
        context.log(f"{job['op']}: {result['steps']} steps: {text}")
    if invalid := result["metrics"].get("invalid_tokens"):
        context.log(f"warning: {job['op']}: {invalid} completion tokens have invalid values and were left out")
    weights = weights_digest(outputs["student"])
    if earlier is not None:
        _require_same_weights(job, earlier, weights, list(builders), last)
    made_at = {"numerics": numerics}
    meta, belongs = {"steps": result["steps"], "last_step": result["last_step"]}, {"student_weights": weights}
    for name in order:
        if name == "student":
            builders[name].commit(meta=meta, provenance=made_at)
        elif name == "trainer_state":
            builders[name].commit(meta=meta | belongs, provenance=made_at)
        else:
            own = meta | belongs | {"metrics": result["metrics"]}
            builders[name].commit(meta=own, tables={"training_steps": 1}, provenance=made_at)


def _weights(artifact: Artifact) -> str | None:
    """Digest of the trained weights, from any output of the training."""
    return artifact.content.get("weights") or artifact.meta.get("student_weights")


def _earlier(specs: Mapping[str, ArtifactSpec], builders: Mapping[str, Builder], context: Context) -> Artifact | None:
    """An output of the same training that is or was committed (the student first), or None."""
    for name, spec in specs.items():
        builder = builders.get(name)
        artifact = builder.recorded if builder is not None else context.store.get(spec.stage, spec.key)
        if artifact is not None and _weights(artifact) is not None:
            return artifact
    return None


def _require_same_numerics(job: dict[str, Any], earlier: Artifact, missing: list[str], context: Context) -> None:
    if differ := context.runtime.training_differs(earlier.provenance.get("numerics") or {}):
        raise ConfigError(
            f"{job['op']}: {' and '.join(sorted(missing))} is missing and must be made with the settings of {earlier}:"
            f" {'; '.join(differ)}. Use the old settings for this: opd resume NAME --set FIELD=VALUE. {_beside(job)}"
        )


def _require_same_weights(
    job: dict[str, Any], earlier: Artifact, weights: str, missing: list[str], checkpoints: Checkpoints
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
        f"{job['op']}: {' and '.join(sorted(missing))} was missing, and retraining gave weights {weights[:12]}, but {earlier}"
        f" was trained with {before[:12]}; the new result was discarded. {changed}. With the old versions: opd resume NAME."
        f" {_beside(job)}"
    )


def _beside(job: dict[str, Any]) -> str:
    """The command that continues without them and keeps everything committed."""
    new = f"--name NEW --set seed={job['seed'] + 1}"
    command = f"opd fork NAME@{job['round'] - 1} {new}" if job["round"] else f"opd run CONFIG {new}"
    return f"If that is impossible, repeat the round in another run: {command}"


def training_bytes(parameters: int, settings: OptimizerSettings, states: int) -> int:
    """Upper estimate of a job's output in bytes: the student in its dtype, and `states` times float32 weights and two moments
    of all `parameters` (not with adapters)."""
    student = parameters * (2 if settings.dtype == "bfloat16" else 4)
    return student if settings.lora is not None else student + states * 12 * parameters


def _require_space(job: dict[str, Any], state: bool, context: Context) -> None:
    """Raises NotEnoughSpace if the job's output does not fit on the disk."""
    settings: OptimizerSettings = (TrainConfig if job["op"] == "train" else WarmupConfig).model_validate(job["config"])
    states = state + (KEPT + 1 if context.runtime.trainer.checkpoint_minutes is not None else 0)
    needed = training_bytes(parameter_count(Path(job["model"])), settings, states)
    context.store.require_space(needed, f"{job['op']}: student, optimizer state, checkpoints")
