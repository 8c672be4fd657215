"""What `opd evaluate NAME --stress` prints."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.options import SLIM, fitting, grid
from flows.run.stress import Stress, Stressed

LEGEND = (
    "reward: mean before the change; changed: share of completions whose verdict is another one after it, ± one standard error"
    " over prompts; up, down: share with a higher, a lower reward; moved: mean reward after minus before; n: completions"
    " with both verdicts; unchanged: completions that the change leaves as they are; failed: without a verdict; again: the same"
    " text asked twice"
)
HEADINGS = ("change", "reward", "changed", "up", "down", "moved", "n", "unchanged", "failed")


def print_stress(found: Stress, as_json: bool, out: Console) -> None:
    """A table per verifier with a row per transformation, or the same as JSON."""
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    out.print(Text(f"{found.run}, round {found.round}"), soft_wrap=True)
    for (verifier, completions), rows in itertools.groupby(found.rows, lambda row: (row.verifier, row.completions)):
        of = list(rows)
        out.print()
        out.print(Text(f"{verifier}, {completions}", style="bold"), soft_wrap=True)
        out.print(fitting(out, _table(of, errors=True), _table(of, errors=False)))
    out.print()
    out.print(Text(LEGEND, style="dim"))
    for note in found.notes:
        out.print(Text(note, style="dim"), soft_wrap=True)


def _table(rows: Sequence[Stressed], errors: bool) -> Table:
    """One verifier's rows. Without `errors`, for a narrow terminal, that of the difference and the number of prompts are left
    out, and the rule below the headings, which takes a column between two others."""
    table = grid(*HEADINGS, **(SLIM if errors else SLIM | {"box": None}))
    for row in rows:
        table.add_row(*_cells(row, errors))
    return table


def _cells(row: Stressed, errors: bool) -> list[str]:
    size = f"{row.n:,}" + (f" of {row.prompts:,} prompts" if errors and row.prompts != row.n else "")
    return [
        row.transformation,
        _with_error(row.reward, None, "{:.3f}"),
        _with_error(row.changed, row.changed_se, "{:.1%}"),
        _with_error(row.higher, None, "{:.1%}"),
        _with_error(row.lower, None, "{:.1%}"),
        _with_error(row.reward_change, row.reward_change_se if errors else None, "{:+.3f}"),
        size,
        f"{row.unchanged:,}",
        f"{row.no_verdict:,}",
    ]


def _with_error(value: float | None, error: float | None, form: str) -> str:
    """As `flows.run.shown.with_error`; empty without a value."""
    if value is None:
        return ""
    return form.format(value) + (f" ± {form.replace('+', '').format(error)}" if error is not None else "")
