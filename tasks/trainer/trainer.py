"""The trainer: serves `train` and `warmup` jobs, on every rank at once.

A job does not affect the next one: seeds, weights and engine are created for each job, so a job gives the same bits in a
warm worker and in a fresh one."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import nn

from storage.errors import InputError
from storage.identity import derive_seed
from storage.schemas import MaskReason, schema_for
from storage.store import Store
from tasks.engines.hf_folder import model_rows
from tasks.inputs.teachers import EmaStudent
from tasks.losses.build import make_objective
from tasks.losses.config import ObjectiveConfig
from tasks.losses.head import ChunkedHead
from tasks.trainer import state
from tasks.trainer.batching import Step, plan_steps
from tasks.trainer.columns import shared
from tasks.trainer.config import NoCorrection, OptimizerSettings, TrainConfig, TruncatedCorrection, WarmupConfig
from tasks.trainer.data import Samples
from tasks.trainer.engine import Engine, load_for, start
from tasks.trainer.export import export_student, rehearse_export
from tasks.trainer.loop import BY_TEACHER, Plan, by_teacher, pinned, run_steps
from tasks.trainer.midround import Keeper
from tasks.trainer.model import TrainModule, Weights, trainable
from tasks.trainer.planning import planner_of
from tasks.trainer.reading import collect_round, collect_targets
from tasks.workers.jobs import TrainJob, TrainResult, WarmupJob
from tasks.workers.main import Link
from tasks.workers.memory import give_back
from tasks.workers.metrics import Progress, summarised

_OBJECTIVE: TypeAdapter[Any] = TypeAdapter(ObjectiveConfig)


@dataclass(frozen=True)
class TrainingJob:
    """The data and settings of a job, for either op."""

    settings: OptimizerSettings
    objective: Any
    samples: Samples
    samples_per_step: int
    total_samples: int
    metrics_every: int = 1
    metrics_share: float = 1.0
    max_drift: float | None = None
    drift_estimator: str | None = None
    stop_loss: float | None = None
    weights: Weights | None = None
    stop_ids: tuple[int, ...] = ()


class Trainer:
    """Handler of the role `trainer`. Settings: `runtime.trainer`, device and threads."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device = start()
        gc.collect()
        gc.freeze()  # every engine collects garbage several times: 0.2 s each over all that was imported

    def handle(self, job: TrainJob | WarmupJob, link: Link) -> TrainResult:
        """Collective: every rank gets the same job; rank 0's result counts."""
        with pinned(int(self.settings["threads"])), ExitStack() as until:
            return self._train(job, self.settings, link.progress, until)

    def close(self) -> None:
        """Leaves the process group of the ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _train(
        self, job: TrainJob | WarmupJob, runtime: dict[str, Any], progress: Progress, until: ExitStack
    ) -> TrainResult:
        torch.manual_seed(derive_seed(job.seed, "train", job.round))
        store = Store(job.store)
        training = _train_job(job, store, until) if isinstance(job, TrainJob) else _warmup_job(job, store, until)
        settings = training.settings
        student = Path(job.model)
        resumed = Path(job.state) if job.state else None
        lora = settings.lora.model_dump(mode="json") if settings.lora else None
        first_step = state.read(resumed, lora).step if resumed is not None else 0
        base = resumed / "base" if resumed is not None and settings.lora else student
        steps = plan_steps(
            job.seed,
            job.round,
            len(training.samples),
            training.samples_per_step,
            training.total_samples,
            training.samples.pairs,
        )
        refuse_lost_steps(training.samples, steps, job.round)
        memory: Mapping[str, np.ndarray] = {} if resumed is None else state.read_memory(resumed)
        planner = planner_of(training.objective, training.samples, memory)
        average = None if job.average is None else EmaStudent(decay=job.average.decay, per=job.average.per)
        keeper = Keeper(job, runtime["checkpoint_minutes"])
        midway = keeper.find(len(steps), progress)
        model = load_for(runtime["deepspeed"], settings, base)
        if dist.get_rank() == 0:
            rehearse_export(model, student)
        if settings.lora is not None:
            from tasks.trainer.lora import add_adapters  # peft's import takes a second

            add_adapters(model, settings.lora)
        parameters = trainable(model)
        tensors: state.Tensors | None = None
        if midway is not None:
            tensors = state.Tensors(midway.files, parameters, state.kinds(average is not None))
        elif resumed is not None:
            averaged = average is not None
            tensors = state.Tensors(state.files(resumed, averaged), parameters, state.kinds(averaged))
        if tensors is not None:
            state.load_weights(tensors, parameters)
        if runtime["activation_checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        provider = ChunkedHead(int(runtime["head_chunk_tokens"]))
        objective, share = make_objective(training.objective), training.metrics_share
        module = TrainModule(model, objective, provider, training.weights, training.stop_ids, share)
        if dist.get_rank() == 0 and module.loss_head.note:
            print(module.loss_head.note, flush=True)
        engine = Engine(module, parameters, settings, runtime["deepspeed"], self.device)
        try:
            if average is not None:
                engine.average(average)
            if tensors is not None:
                state.load(tensors, engine, midway.state.step if midway is not None else first_step)
                tensors = None  # unmaps the files: as large as the state
            else:
                engine.make_moments(0)
            plan = Plan(
                steps=steps,
                first_step=first_step,
                seed=job.seed,
                round=job.round,
                normalisation=training.objective.normalisation,
                normalisation_length=training.objective.normalisation_length,
                metrics_every=training.metrics_every,
                max_drift=training.max_drift,
                drift_estimator=training.drift_estimator,
                stop_loss=training.stop_loss,
                micro_batch_tokens=int(runtime["micro_batch_tokens"]),
                planner=planner,
            )
            own = {"round": job.round, "lora": lora}
            rows = run_steps(
                plan,
                training.samples,
                engine,
                module,
                settings,
                progress,
                midway.rows if midway is not None else [],
                partial(keeper.step_done, engine, own),
            )
            give_back()  # the activations, before the weights are copied to be written
            memory = {} if planner is None else planner.memory
            exported = self._write(job, engine, model, rows, settings, base, student, training.samples, memory)
        finally:
            engine.close()
            del engine, module, model, parameters
            give_back()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return _summary(rows, training.samples, exported, {} if planner is None else planner.metrics)

    def _write(
        self,
        job: TrainJob | WarmupJob,
        engine: Engine,
        model: nn.Module,
        rows: list[dict[str, Any]],
        settings: OptimizerSettings,
        base: Path,
        student: Path,
        samples: Samples,
        memory: Mapping[str, np.ndarray],
    ) -> dict[str, float]:
        outputs, metrics = job.outputs, dict[str, float]()
        if outputs.trainer_state:
            now = state.TrainerState(
                step=rows[-1]["step"],
                round=job.round,
                lr=rows[-1]["lr"],
                lora=settings.lora.model_dump(mode="json") if settings.lora else None,
            )
            frozen = base if settings.lora else None
            state.save(Path(outputs.trainer_state), engine, now, frozen, Path(job.store))
            if dist.get_rank() == 0:
                state.save_memory(Path(outputs.trainer_state), memory)
        if outputs.student:
            masters, target = state.full_tensors(engine, "master"), Path(outputs.student)
            trained: Iterator[Any] = iter(())
            if settings.lora is not None:
                from tasks.trainer.lora import require_trained, trained_weights

                trained = trained_weights(model)
            if dist.get_rank() == 0:
                metrics = export_student(target, base, student, masters, settings.dtype, settings.lora, trained)
            else:
                for _ in (*masters, *trained):  # the ranks gather together
                    pass
            if settings.lora is not None and dist.get_rank() == 0:
                require_trained(metrics["export_error"], float(self.settings["max_export_error"]))
        if outputs.teacher_ema:
            masters, target = state.full_tensors(engine, state.EMA), Path(outputs.teacher_ema)
            if dist.get_rank() == 0:
                export_student(target, base, student, masters, settings.dtype, settings.lora)
            else:
                for _ in masters:
                    pass
        if outputs.steps and dist.get_rank() == 0:
            table = pa.Table.from_pylist(rows, schema=schema_for("training_steps"))
            writer = Store(job.store).shard_writer(outputs.steps.stage, outputs.steps.key)
            writer.write_shard("training_steps", 0, table)
            if samples.teachers:
                by_teacher = [row for step in rows for row in step[BY_TEACHER]]
                table = pa.Table.from_pylist(by_teacher, schema=schema_for("teacher_steps"))
                writer.write_shard("teacher_steps", 0, table)
        return metrics


def _train_job(job: TrainJob, store: Store, until: ExitStack) -> TrainingJob:
    config = TrainConfig.model_validate_json(bytes(job.config))
    objective = _OBJECTIVE.validate_json(bytes(job.objective))
    reasons = [MaskReason[name.upper()] for name in config.mask_reasons]
    rows = model_rows(Path(job.model))
    apart = objective.estimator == "credit"  # it has terms for samples with and without a context
    collected = partial(collect_round, job, objective.needs(), reasons, rows, store, every_context=apart)
    samples = until.enter_context(shared(store.root, collected))
    correction, weights = config.importance_correction, None
    if not isinstance(correction, NoCorrection):
        over: Literal["behaviour_logprobs", "student_logprobs"]
        over = "behaviour_logprobs" if isinstance(correction, TruncatedCorrection) else "student_logprobs"
        weights = Weights(over, correction.cap)
        if over not in samples.floats:
            raise InputError(
                f"train.importance_correction: {correction.kind} needs sampled.{over}, which are null or were not asked for;"
                " let supervise compute them"
            )
    return TrainingJob(
        settings=config,
        objective=objective,
        samples=samples,
        samples_per_step=config.samples_per_step,
        total_samples=len(samples) * config.epochs_per_round,
        metrics_every=config.metrics_every,
        metrics_share=config.metrics_share,
        max_drift=config.max_drift,
        drift_estimator=config.drift_estimator,
        weights=weights,
        stop_ids=tuple(job.stop_ids),
    )


def _warmup_job(job: WarmupJob, store: Store, until: ExitStack) -> TrainingJob:
    config = WarmupConfig.model_validate_json(bytes(job.config))
    rows = model_rows(Path(job.model))
    samples = until.enter_context(shared(store.root, partial(collect_targets, job, rows, store)))
    return TrainingJob(
        settings=config,
        objective=_OBJECTIVE.validate_json(bytes(job.objective)),
        samples=samples,
        samples_per_step=config.samples_per_step,
        total_samples=config.samples_per_step * config.steps,
        metrics_every=config.metrics_every,
        stop_loss=config.stop_loss,
    )


def refuse_lost_steps(samples: Samples, steps: Sequence[Step], round: int) -> None:
    """InputError for a step that has no token to train on because of invalid values. A step whose tokens the data mask (special,
    truncated, unmapped, ...) is counted and reported instead."""
    if samples.lost is None:
        return
    for number, step in enumerate(steps, 1):
        rows = list(step.rows)
        if samples.kept[rows].sum() == 0 and (lost := int(samples.lost[rows].sum())):
            first = next(samples.ids[row] for row in rows if samples.lost[row])
            raise InputError(
                f"train: step {number} of round {round} has no token to train on: {lost:,} tokens have invalid values (NaN,"
                f" infinite or out of range; the first in sample {first!r}) and all others are masked. The teacher, the"
                " student or the sampler is broken; check them and have the round's signals made again"
            )


def _summary(
    rows: list[dict[str, Any]], samples: Samples, exported: dict[str, float], planned: dict[str, float]
) -> TrainResult:
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss"] * row["tokens"] for row in rows) / max(1, tokens)
    metrics = {
        "loss": loss,
        "tokens": float(tokens),
        "masked_tokens": float(sum(row.get("masked_tokens") or 0 for row in rows)),
        "empty_steps": float(sum(row["tokens"] == 0 for row in rows)),
        "invalid_tokens": samples.invalid,
        **({} if samples.contexts is None else {"without_context": float((~samples.contexts).sum())}),
        **planned,
        **summarised(rows),
        **by_teacher(rows),
        **exported,
    }
    return TrainResult(len(rows), rows[-1]["step"], metrics)
