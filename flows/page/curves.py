"""Curves of a page: figures by round with their errors, the table of optimizer steps, seconds per stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from flows.run.figures import EVALUATED, Shown
from storage.errors import CorruptArtifact, Evicted
from storage.query.catalog import Catalog
from storage.runs import Run, RunState
from storage.schemas import TABLES
from storage.store import Store

STEPS = ("loss", "grad_norm", "lr", "reverse_kl", "student_entropy", "drift")
"""Columns of `training_steps` that are shown at once; the others that have values follow where they are asked for."""
POINTS, ALL_POINTS = 1_000, 4_000
"""Points of a curve by step; of the curves of all runs together. Longer ones are averaged over equally many steps."""
_NO_CURVES = ("step", "round", "epoch", "samples")
_TITLES = {"lr": "learning rate", "grad_norm": "gradient norm", "reverse_kl": "reverse KL"}
_KEPT = 6
"""Significant digits."""


def by_round(states: Mapping[str, RunState], figures: Iterable[Shown] = EVALUATED) -> list[dict[str, Any]]:
    """A chart per figure that any run has: by run its points (round, value, standard error or null)."""
    charts = []
    for figure in figures:
        runs = {
            name: [
                [round.round, number(round.metrics[figure.metric]), number(round.metrics.get(f"{figure.metric}_se"))]
                for round in sorted(state.rounds, key=lambda round: round.round)
                if round.metrics.get(figure.metric) is not None
            ]
            for name, state in states.items()
        }
        if any(runs.values()):
            charts.append({"title": figure.with_unit, "percent": "%" in figure.form, "runs": runs})
    return charts


def by_step(store: Store, runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """(a chart per column that any run has, notes). A chart has by run its points (step, value); the first of `STEPS` first."""
    columns = [column for column in TABLES["training_steps"].columns if column.name not in _NO_CURVES]
    found: dict[str, pa.Table] = {}
    notes = []
    for run in runs:
        names = ", ".join(["step", *(column.name for column in columns)])
        try:
            found[run.name] = Catalog(store, run).query(
                f"SELECT {names} FROM training_steps WHERE stage = 'train' ORDER BY step"
            )
        except (Evicted, CorruptArtifact) as error:
            notes.append(f"{run.name}: no curves by step ({error})")
    points = max(2, min(POINTS, ALL_POINTS // max(len(found), 1)))
    for name, table in found.items():
        if (every := _every(table.num_rows, points)) > 1:
            notes.append(f"{name}: {table.num_rows:,} steps, each point is the mean of {every}")
    order = sorted(columns, key=lambda column: STEPS.index(column.name) if column.name in STEPS else len(STEPS))
    charts = []
    for column in order:
        curves = {name: _averaged(table["step"], table[column.name], points) for name, table in found.items()}
        if any(curves.values()):
            title = _TITLES.get(column.name, column.name.replace("_", " "))
            charts.append({"title": title, "about": column.doc, "first": column.name in STEPS, "runs": curves})
    return charts, notes


def by_stage(states: Mapping[str, RunState]) -> list[dict[str, Any]]:
    """A chart per run: `rounds`, and by stage its seconds in each (0 where it was in the store, or has not run)."""
    charts = []
    for name, state in states.items():
        rounds = sorted(state.rounds, key=lambda round: round.round)
        labels = list(dict.fromkeys(label for round in rounds for label in round.stages))
        seconds = {
            label: [number(r.stages[label].seconds or 0.0) if label in r.stages else 0.0 for r in rounds]
            for label in labels
        }
        charts.append({"run": name, "rounds": [round.round for round in rounds], "stages": seconds})
    return charts


def number(value: float | None) -> float | None:
    """Rounded for the page; null where it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_KEPT}g}")


def _every(rows: int, points: int) -> int:
    return math.ceil(rows / points)


def _averaged(steps: pa.ChunkedArray, values: pa.ChunkedArray, points: int) -> list[list[float | None]]:
    """(last step, mean of the values there) of blocks of equally many steps; blocks without a value are left out."""
    every = _every(len(steps), points)
    if not every:
        return []
    numbers = values.cast(pa.float64()).to_numpy()  # nulls are NaN
    found = []
    for start in range(0, len(numbers), every):
        block = numbers[start : start + every]
        there = block[np.isfinite(block)]
        if len(there):
            found.append([steps[min(start + every, len(numbers)) - 1].as_py(), number(float(there.mean()))])
    return found
