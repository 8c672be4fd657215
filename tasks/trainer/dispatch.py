"""The coordinating half of the trainer's stages, in the flow's process: a job out, artifacts in. No engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.checkpoints import KEPT
from storage.store import Artifact, ArtifactSpec, Builder
from tasks.figures import summary
from tasks.models import parameter_count
from tasks.stage import Context
from tasks.trainer.config import OptimizerSettings, TrainConfig, WarmupConfig

_TREES = {"student": "model", "trainer_state": "state"}


def place(artifact: Artifact) -> dict[str, str]:
    """How a job names an artifact that the worker reads from the store."""
    return {"stage": artifact.stage, "key": artifact.key}


def run_and_commit(
    job: dict[str, Any], specs: Mapping[str, ArtifactSpec], builders: Mapping[str, Builder], context: Context
) -> None:
    """Runs the job on the trainer and commits what `builders` hold: trees `student` and `trainer_state`, and the table
    training_steps of whatever else there is. Training is one whole: it is done again when any of them is missing."""
    outputs: dict[str, Any] = {}
    for name, builder in builders.items():
        if name in _TREES:
            outputs[name] = str(builder.directory(_TREES[name])) if builder.needs_tree(_TREES[name]) else None
        else:
            missing = builder.missing("training_steps", 1)
            outputs["steps"] = {"stage": builder.stage, "key": builder.key} if missing else None
    context.log(f"{job['op']}: {job['model']}")
    _require_space(job, "trainer_state" in builders, context)
    order = sorted(builders, key=lambda name: name != "student")  # the state names the student it belongs to
    numerics = context.runtime.numerics()
    last = builders[order[-1]].checkpoints(numerics)  # committed last, so that its checkpoints last as long as needed
    checkpoints = {"folder": str(last.folder), "settings": last.settings}
    [result] = context.workers.run(
        "trainer",
        [{**job, "store": str(context.store.root), "outputs": outputs, "checkpoints": checkpoints}],
        lambda _, done, total, figures=None: context.progress(done, total, "steps", figures),
    )
    for note in result.get("notes", ()):
        context.say(job["op"], note)
    if text := summary(result["metrics"]):
        context.log(f"{job['op']}: {result['steps']} steps: {text}")
    if invalid := result["metrics"].get("invalid_tokens"):
        context.log(f"warning: {job['op']}: {invalid} completion tokens have invalid values and were left out")
    provenance = {"numerics": numerics}
    meta = {"steps": result["steps"], "last_step": result["last_step"]}
    student: Artifact | None = None
    for name in order:
        if name == "student":
            student = builders[name].commit(meta=meta, provenance=provenance)
        elif name == "trainer_state":
            student = student or context.store.get(specs["student"].stage, specs["student"].key)
            weights = {"student_weights": student.content["weights"]} if student is not None else {}
            builders[name].commit(meta=meta | weights, provenance=provenance)
        else:
            builders[name].commit(
                meta=meta | {"metrics": result["metrics"]}, tables={"training_steps": 1}, provenance=provenance
            )


def training_bytes(parameters: int, settings: OptimizerSettings, states: int) -> int:
    """Upper estimate of what a job writes, in bytes: the student in its dtype, and `states` times float32 weights and two
    moments of all `parameters`, where not adapters alone are trained."""
    student = parameters * (2 if settings.dtype == "bfloat16" else 4)
    return student if settings.lora is not None else student + states * 12 * parameters


def _require_space(job: dict[str, Any], state: bool, context: Context) -> None:
    """Refuses to start what the disk has no room for: NotEnoughSpace."""
    settings: OptimizerSettings = (TrainConfig if job["op"] == "train" else WarmupConfig).model_validate(job["config"])
    states = state + (KEPT + 1 if context.runtime.trainer.checkpoint_minutes is not None else 0)
    needed = training_bytes(parameter_count(Path(job["model"])), settings, states)
    context.store.require_space(needed, f"{job['op']}: student, optimizer state, checkpoints")
