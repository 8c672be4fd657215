"""The metrics of named evaluation sets, and of tasks of lm-eval, as tables."""

from __future__ import annotations

from rich.table import Table

from flows.cli.options import grid
from flows.run.shown import with_error
from storage.runs import RoundState, RunState

OF_SET = "evaluate_"
"""Begins the label of a set's stage; the set's name follows."""
OF_TASK = "harness_"
"""Begins the label of the stage of a task of lm-eval; the task's name follows."""
SHOWN = (
    ("accuracy", "accuracy_greedy", "{:.1%}"),
    ("sampled", "accuracy_sampled", "{:.1%}"),
    ("reverse KL", "reverse_kl", "{:.4f}"),
    ("length", "mean_length", "{:.1f}"),
    ("clipped", "clipped_ratio", "{:.1%}"),
)
"""Heading, metric, form."""


def _measured(state: RunState, prefix: str) -> list[tuple[RoundState, str]]:
    return [
        (round, label)
        for round in sorted(state.rounds, key=lambda round: round.round)
        for label, stage in sorted(round.stages.items())
        if label.startswith(prefix) and stage.state in ("done", "cached")
    ]


def tasks_table(state: RunState) -> Table | None:
    """A row per round, task of lm-eval and metric, with lm-eval's standard errors; None where the run has none. Tasks inside a
    group that has metrics of its own are left out."""
    table = grid("round", "task", "metric", "value", "n")
    for round, label in _measured(state, OF_TASK):
        longer = tuple(f"{other}_" for other in round.stages if other.startswith(f"{label}_"))
        of = {
            name.removeprefix(f"{label}_"): name
            for name in round.metrics
            if name.startswith(f"{label}_") and not name.startswith(longer)
        }
        shown = [name for name in of if f"{name}_n" in of]
        for name in [name for name in shown if "/" not in name] or shown:
            metric, _, task = name.partition("/")
            n = round.metrics[f"{of[name]}_n"] or 0
            cells = [task or label.removeprefix(OF_TASK), metric, with_error(round.metrics, of[name], "{:.4f}")]
            table.add_row(str(round.round), *cells, f"{n:,.0f}")
    return table if table.row_count else None


def sets_table(state: RunState) -> Table | None:
    """A row per round and named set, with standard errors; None where the run has no set."""
    rows = _measured(state, OF_SET)
    shown = [
        field for field in SHOWN if any(round.metrics.get(f"{label}_{field[1]}") is not None for round, label in rows)
    ]
    if not rows:
        return None
    table = grid("round", "set", *(heading for heading, _, _ in shown), "n")
    for round, label in rows:
        n = round.metrics.get(f"{label}_{shown[0][1]}_n") if shown else None
        cells = [with_error(round.metrics, f"{label}_{metric}", form) for _, metric, form in shown]
        table.add_row(str(round.round), label.removeprefix(OF_SET), *cells, "" if n is None else f"{n:,.0f}")
    return table
