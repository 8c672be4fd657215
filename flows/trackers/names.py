"""The names that trackers get: those of other training libraries where there is one, else the store's own.

`train/loss`, `train/lr`, `train/grad_norm`, `train/entropy`, `train/tokens_per_second`, ... have a value per optimizer step, and
so have `warmup/loss`, `warmup_teacher/loss`, ...; `eval/accuracy`, `eval/reverse_kl` with their errors (`eval/reverse_kl_se`),
`rollout/tokens`, ..., `time/train` (seconds of a stage) have one per round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flows.trackers.base import Point
from storage.runs import RoundState

_OF_STEPS = {"student_entropy": "entropy"}
_OF_EVALUATION = {"accuracy_greedy": "accuracy"}
_LEFT_OUT = ("step", "round")


def step_points(label: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
    """Points of a training's rows of `training_steps`, under the label of its stage."""
    for row in rows:
        values = {f"{label}/{_OF_STEPS.get(name, name)}": row[name] for name in row if name not in _LEFT_OUT}
        if row.get("seconds") and row.get("tokens") is not None:
            values[f"{label}/tokens_per_second"] = row["tokens"] / row["seconds"]
        yield Point("step", int(row["step"]), known(values))


def round_point(state: RoundState) -> Point:
    """The metrics of a round and the seconds of its stages. What trainings summarise is left out: their steps are there."""
    values: dict[str, Any] = {}
    for metric, value in state.metrics.items():
        label = max((name for name in state.stages if metric.startswith(f"{name}_")), key=len, default=None)
        if label is None:
            values[f"eval/{_evaluated(metric)}"] = value
        elif not label.startswith(("train", "warmup")):
            values[f"{label}/{metric.removeprefix(f'{label}_')}"] = value
    seconds = {label: stage.seconds for label, stage in state.stages.items() if stage.seconds}
    values |= {f"time/{label}": value for label, value in seconds.items()}
    if seconds:
        values["time/round"] = sum(seconds.values())
    return Point("round", state.round, known(values))


def known(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the values: no tracker draws another."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(float(value))
    }


def _evaluated(metric: str) -> str:
    """`accuracy_greedy_se` -> `accuracy_se`, also before a teacher's name: `accuracy_greedy/math` -> `accuracy/math`."""
    for name, shown in _OF_EVALUATION.items():
        if metric == name or metric.startswith((f"{name}_", f"{name}/")):
            return shown + metric.removeprefix(name)
    return metric
