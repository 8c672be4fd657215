"""The optimizer steps of one job. Every rank runs this with the same arguments and takes its part of every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from storage.disk.failpoints import failpoint
from storage.errors import OpdError
from storage.identity import derive_seed
from storage.schemas import TABLES
from tasks.trainer.batching import Step, split_step
from tasks.trainer.config import OptimizerSettings
from tasks.trainer.data import Samples, forward_batch, loss_denominators
from tasks.trainer.engine import Engine
from tasks.trainer.model import TokenStats, TrainModule
from tasks.trainer.planning import StepPlanner
from tasks.workers.metrics import Progress, latest, words

METRICS = tuple(column.name for column in TABLES["training_steps"].columns if column.nullable)
"""Columns with token means or percentiles; null where they were not computed."""
BY_TEACHER = "by_teacher"
"""Entry of a step's row with the step's rows of `teacher_steps`; it is in no column."""
_PLACES = {name: place for place, name in enumerate(METRICS)}
_TEACHER_METRICS = ("reverse_kl", "teacher_mass", "teacher_entropy")
_PERCENTILES = (("log_ratio_p05", 5), ("log_ratio_p50", 50), ("log_ratio_p95", 95))
_NAMED = 8
"""Maximum number of sample ids in an error."""
_RUNNING = 0.1
"""Weight of the newest step in the running mean of the loss."""


@dataclass(frozen=True)
class Plan:
    """The parameters of a job's loop."""

    steps: list[Step]
    first_step: int
    """Optimizer steps done before."""
    seed: int
    round: int
    normalisation: str
    normalisation_length: int | None
    metrics_every: int
    max_drift: float | None
    drift_estimator: str | None
    micro_batch_tokens: int
    stop_loss: float | None = None
    planner: StepPlanner | None = None


def run_steps(
    plan: Plan,
    samples: Samples,
    engine: Engine,
    module: TrainModule,
    settings: OptimizerSettings,
    progress: Progress,
    done: list[dict[str, Any]],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Runs the steps and returns their rows of `training_steps` (the same on every rank).

    `done`: rows of the steps before an interruption. `keep` is called with all rows after every step but the last, and may
    save them with the engine's state.
    Ends early after a step whose drift from the rollout-time student exceeds `max_drift`, or at which the running mean of
    the loss falls below `stop_loss`. Raises OpdError, naming samples, on every rank and before any weight changes, if a loss
    or a gradient is not finite."""
    table = list(done)
    running: float | None = None
    for row in done:
        running = _mean(running, row)
    known = latest(done)
    if plan.planner is not None:
        for number, step in enumerate(plan.steps[: len(done)]):
            plan.planner.repeat(step.rows, plan.first_step + number)
    for number, step in enumerate(plan.steps[len(done) :], len(done)):
        began = time.monotonic()
        now = plan.first_step + number + 1
        _seed(engine.device, derive_seed(plan.seed, "dropout", plan.round, now, dist.get_rank()))
        observe = plan.max_drift is not None or (now - 1) % plan.metrics_every == 0
        weights = loss_denominators(samples, step.rows, plan.normalisation, plan.normalisation_length)
        lengths = samples.forward_lengths[list(step.rows)].tolist()
        micros = split_step(lengths, engine.world, plan.micro_batch_tokens, step.together)[dist.get_rank()]
        planned = None if plan.planner is None else plan.planner(step.rows, now - 1)
        tally = Tally(engine.device, samples, step.rows)
        for place, micro in enumerate(micros):
            batch = forward_batch(samples, step.rows, weights, micro.places, micro.filler, engine.device, planned)
            loss = engine.accumulate(batch, observe, last=place == len(micros) - 1)
            tally.add(loss, module.loss_head.stats, batch.counts)
        tally.reduce()
        where = f"step {now} (round {plan.round}, epoch {step.epoch})"
        if tally.bad_places:
            raise OpdError(f"the loss is not finite at {where}; samples: {_names(samples, step, tally.bad_places)}")
        lr = settings.lr * settings.schedule.factor(now)
        norm = engine.step(lr)
        if norm is None:
            names = _names(samples, step, list(range(len(step.rows))))
            raise OpdError(
                f"the gradient is not finite at {where}, though the loss is ({tally.loss:.6g}); no weight has changed;"
                f" samples: {names}"
            )
        if engine.ema is not None:
            engine.ema.step_done()
        table.append(
            {
                "step": now,
                "round": plan.round,
                "epoch": step.epoch,
                "loss": tally.loss,
                "grad_norm": norm,
                "lr": lr,
                "samples": len(step.rows),
                "tokens": int(samples.kept[list(step.rows)].sum()),
                "seconds": time.monotonic() - began,
                **tally.means(),
                "masked_tokens": int((samples.completions.lengths - samples.kept)[list(step.rows)].sum()),
                **({BY_TEACHER: tally.by_teacher(now, plan.round)} if samples.teachers else {}),
            }
        )
        samples.drop_pages()
        known |= latest(table[-1:])
        progress(number + 1, len(plan.steps), known)
        if dist.get_rank() == 0 and ((now - 1) % plan.metrics_every == 0 or number + 1 == len(plan.steps)):
            print(f"round {plan.round} step {now}: {words(known)}", flush=True)
        drift = table[-1]["drift"]
        if plan.drift_estimator == "log_ratio" and table[-1]["log_ratio_mean"] is not None:
            drift = -table[-1]["log_ratio_mean"]
        drifted = plan.max_drift is not None and drift is not None and drift > plan.max_drift
        running = _mean(running, table[-1])
        failpoint("train.after_step")
        if drifted or (plan.stop_loss is not None and running is not None and running < plan.stop_loss):
            progress(number + 1, number + 1, known)
            break
        if number + 1 < len(plan.steps):
            keep(table)
    if engine.ema is not None:
        engine.ema.round_done()
    return table


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for the generators that a step draws from. That of every kind of accelerator that is not there costs a
    millisecond each time: torch keeps a stack trace for its later initialisation."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def by_teacher(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`tokens/NAME`, and means over the tokens of all steps: `loss/NAME`, `reverse_kl/NAME`; empty for one teacher."""
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for row in (row for step in rows for row in step.get(BY_TEACHER, ())):
        for name in ("loss", "reverse_kl"):
            if row[name] is not None:
                label = f"{name}/{row['teacher']}"
                sums[label] = sums.get(label, 0.0) + row[name] * row["tokens"]
                weights[label] = weights.get(label, 0) + row["tokens"]
        tokens = f"tokens/{row['teacher']}"
        sums[tokens] = sums.get(tokens, 0.0) + row["tokens"]
    return {label: total / weights.get(label, 1) for label, total in sums.items()}


def _mean(running: float | None, row: Mapping[str, Any]) -> float | None:
    """The running mean of the loss after a step; a step without a counted token has none."""
    if row["tokens"] == 0:
        return running
    return float(row["loss"]) if running is None else (1 - _RUNNING) * running + _RUNNING * float(row["loss"])


class Tally:
    """Sums of a step over micro-batches, then over ranks. `rows`: the samples of the step.

    Sums stay on the device until `reduce`: a micro-batch does not wait for the one before."""

    def __init__(self, device: torch.device, samples: Samples, rows: Sequence[int]) -> None:
        self.device, self._samples, self._rows = device, samples, list(rows)
        self.loss = 0.0
        self.bad_places: list[int] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._sums = torch.zeros((len(METRICS), 2), dtype=torch.float64, device=device)
        self._counted: list[tuple[torch.Tensor, TokenStats]] = []
        """Of micro-batches with tokens in the loss: whether the loss is finite, and the statistics."""
        self._by_teacher = torch.zeros((len(samples.teachers), 1 + len(_TEACHER_METRICS), 2), dtype=torch.float64)
        self._log_ratios: list[np.ndarray] = []

    def add(self, loss: torch.Tensor, stats: TokenStats | None, counts: bool) -> None:
        """Adds one micro-batch; `counts`: its tokens are in the loss."""
        assert stats is not None, "the loss head stores the statistics of its forward"
        self._loss += loss.double()
        if not counts:
            return
        self._counted.append((stats.per_token_N.isfinite().all() & loss.isfinite(), stats))
        for name, values in stats.metrics.items():
            if name in _PLACES:
                sums, seen_N = self._sums[_PLACES[name]], stats.seen(name)
                sums[0] += (values.double() if seen_N is None else values.double().where(seen_N, 0.0)).sum()
                sums[1] += len(values) if seen_N is None else seen_N.sum()

    def _add_by_teacher(self, stats: TokenStats) -> None:
        assert self._samples.teacher is not None
        of_place = torch.from_numpy(self._samples.teacher[self._rows])
        teacher_N = of_place[stats.sample_N.cpu()]
        values = {"loss": stats.per_token_N} | {name: stats.metrics.get(name) for name in _TEACHER_METRICS}
        for place, (name, value_N) in enumerate(values.items()):
            if value_N is not None:
                seen_N = stats.seen(name)
                kept_N = slice(None) if seen_N is None else seen_N.cpu()
                chosen, of_N = value_N.detach().double().cpu()[kept_N], teacher_N[kept_N]
                self._by_teacher[:, place, 0].index_add_(0, of_N, chosen)
                self._by_teacher[:, place, 1].index_add_(0, of_N, torch.ones_like(chosen))

    def reduce(self) -> None:
        """Sums over all ranks; every rank gets the result. Collective."""
        finite = torch.stack([flag for flag, _ in self._counted]).tolist() if self._counted else []
        for fine, (_, stats) in zip(finite, self._counted, strict=True):
            if not fine:
                bad = ~stats.per_token_N.isfinite()
                places = stats.sample_N[bad] if bad.any() else stats.sample_N
                self.bad_places += places.unique().tolist()
            if self._samples.teacher is not None:
                self._add_by_teacher(stats)
            if stats.log_ratio_N is not None:
                seen_N = stats.seen("log_ratio_mean")
                self._log_ratios.append(
                    (stats.log_ratio_N if seen_N is None else stats.log_ratio_N[seen_N]).cpu().numpy()
                )
        self._counted.clear()
        lists = self._loss.new_tensor([len(self.bad_places) + len(self._log_ratios)])
        parts = [self._sums.flatten(), self._loss[None], lists, self._by_teacher.flatten().to(self.device)]
        sums = torch.cat(parts)
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)
        own, (loss,), (lists,), by_teacher = sums.cpu().split([len(part) for part in parts])
        if dist.get_world_size() > 1 and lists > 0:
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, (self.bad_places, self._log_ratios))
            self.bad_places = [place for places, _ in everywhere for place in places]
            self._log_ratios = [values for _, arrays in everywhere for values in arrays]
        self.bad_places = sorted(set(self.bad_places))
        self.loss = float(loss)
        self._sums = own.reshape(self._sums.shape)
        self._by_teacher = by_teacher.reshape(self._by_teacher.shape)

    def by_teacher(self, step: int, round: int) -> list[dict[str, Any]]:
        """The step's rows of `teacher_steps`: one per teacher that has samples in it."""
        assert self._samples.teacher is not None
        own = self._samples.teacher[self._rows]
        found = []
        for place, name in enumerate(self._samples.teachers):
            rows = [row for row, teacher in zip(self._rows, own, strict=True) if teacher == place]
            if not rows:
                continue
            means = [
                total / count if count > 0 and math.isfinite(total) else None
                for total, count in self._by_teacher[place].tolist()
            ]
            counts = {"samples": len(rows), "tokens": int(self._samples.kept[rows].sum())}
            named = dict(zip(("loss", *_TEACHER_METRICS), means, strict=True))
            found.append({"step": step, "round": round, "teacher": name, **counts, **named})
        return found

    def means(self) -> dict[str, float | None]:
        """Every metric column: mean over the step's unmasked tokens, or None."""
        means: dict[str, float | None] = {
            name: float(total / count) if count > 0 else None
            for name, (total, count) in zip(METRICS, self._sums.tolist(), strict=True)
        }
        ratios = np.concatenate(self._log_ratios) if self._log_ratios else np.empty(0)
        if len(ratios):
            means |= {name: float(np.percentile(ratios, percent)) for name, percent in _PERCENTILES}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in means.items()}


def _names(samples: Samples, step: Step, places: list[int]) -> str:
    ids = [samples.ids[step.rows[place]] for place in places]
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Sets torch's CPU threads for a job, because the order of floating-point sums depends on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
