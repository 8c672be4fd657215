"""warmup: supervised fine-tuning before distillation, by the same trainer with the objective `sft`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.errors import InputError
from storage.store import Artifact, ArtifactSpec, Builder
from tasks.inputs.models import ModelSource, dropout_identity
from tasks.losses.config import SftConfig
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.routing import learned_by
from tasks.stage import Context, Prompts, Work, model_inputs
from tasks.trainer.config import WarmupConfig, forward_identity
from tasks.trainer.dispatch import run_and_commit
from tasks.workers.jobs import ArtifactRef, TrainOutputs, WarmupJob, config_json

__all__ = ["VERSION", "WarmupConfig", "warmup_work"]

VERSION = 1


def warmup_work(
    config: WarmupConfig,
    model: Artifact,
    prompts: Prompts,
    seed: int,
    source: ModelSource | None = None,
    plugins: Mapping[str, str] = NO_PLUGINS,
    teacher: str | None = None,
) -> Work:
    """Work with the outputs `student` (tree model; the teacher's warm-up makes one too) and `warmup` (training_steps).

    `teacher`: the model's name where it is one of several teachers: it learns the rows that name it, or none.
    `source`: of the model (see `train_work`). `plugins`: the run's, name -> digest of the source. Raises InputError when there
    are no prompts of the split `warmup`."""
    if "prompts:warmup" not in prompts.content:
        raise InputError("warmup: there are no prompts of split warmup; give prompts.warmup rows with a `completion`")
    objective = SftConfig()
    inputs = {
        **model_inputs(model),
        "prompts": prompts.content["prompts:warmup" if teacher is None else learned_by(teacher)],
    }
    identity: dict[str, Any] = {"config": config, "objective": objective, "seed": seed}
    identity |= forward_identity(config) | dropout_identity(source, config.dropout)
    if brought := used_plugins(plugins, "trainer"):
        identity["plugins"] = brought
    outputs = {name: ArtifactSpec.of(name, VERSION, identity, inputs) for name in ("student", "warmup")}

    def build(builders: dict[str, Builder], context: Context) -> None:
        job = WarmupJob(
            store=str(context.store.root),
            model=str(context.store.materialize(model, "model")),
            prompts=ArtifactRef.of(prompts),
            config=config_json(config),
            objective=config_json(objective),
            seed=seed,
            outputs=TrainOutputs(),
            teacher=teacher,
        )
        run_and_commit(job, outputs, builders, context)

    return Work("warmup", outputs, build)
