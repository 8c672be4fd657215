"""What `opd evaluate NAME --stress` prints."""

from __future__ import annotations

import json

from rich.console import Console
from rich.text import Text

from flows.cli.options import grid
from flows.run.stress import Stress, Stressed

LEGEND = (
    "reward: mean before the change; changed: share of completions whose verdict is another one after it, ± one standard"
    " error over prompts; up, down: share with a higher, a lower reward; unchanged: the same text asked twice"
)


def print_stress(found: Stress, as_json: bool, out: Console) -> None:
    """A table with a row per verifier and transformation, or the same as JSON."""
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    table = grid(
        "verifier",
        "completions",
        "transformation",
        "reward",
        "changed",
        "up",
        "down",
        "reward change",
        "n",
        "does not apply",
        "no verdict",
        title=f"{found.run}, round {found.round}",
        title_justify="left",
        caption=LEGEND,
        caption_justify="left",
    )
    for row in found.rows:
        table.add_row(*_cells(row))
    out.print(table)
    for note in found.notes:
        out.print(Text(note, style="dim"), soft_wrap=True)


def _cells(row: Stressed) -> list[str]:
    size = f"{row.n:,}" + (f" of {row.prompts:,} prompts" if row.prompts != row.n else "")
    return [
        row.verifier,
        row.completions,
        row.transformation,
        _with_error(row.reward, None, "{:.3f}"),
        _with_error(row.changed, row.changed_se, "{:.1%}"),
        _with_error(row.higher, None, "{:.1%}"),
        _with_error(row.lower, None, "{:.1%}"),
        _with_error(row.reward_change, row.reward_change_se, "{:+.3f}"),
        size,
        f"{row.does_not_apply:,}",
        f"{row.no_verdict:,}",
    ]


def _with_error(value: float | None, error: float | None, form: str) -> str:
    """As `flows.run.shown.with_error`; empty without a value."""
    if value is None:
        return ""
    return form.format(value) + (f" ± {form.replace('+', '').format(error)}" if error is not None else "")
