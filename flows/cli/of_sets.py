"""The metrics of named evaluation sets as a table."""

from __future__ import annotations

from rich.table import Table

from flows.cli.options import grid
from flows.run.shown import with_error
from storage.runs import RunState

OF_SET = "evaluate_"
"""Begins the label of a set's stage; the set's name follows."""
SHOWN = (
    ("accuracy", "accuracy_greedy", "{:.1%}"),
    ("sampled", "accuracy_sampled", "{:.1%}"),
    ("reverse KL", "reverse_kl", "{:.4f}"),
    ("length", "mean_length", "{:.1f}"),
    ("clipped", "clipped_ratio", "{:.1%}"),
)
"""Heading, metric, form."""


def sets_table(state: RunState) -> Table | None:
    """A row per round and named set, with standard errors; None where the run has no set."""
    rows = [
        (round, label)
        for round in sorted(state.rounds, key=lambda round: round.round)
        for label, stage in sorted(round.stages.items())
        if label.startswith(OF_SET) and stage.state in ("done", "cached")
    ]
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
