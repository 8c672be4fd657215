"""`opd watch`: a run's report that refreshes. It reads the run's files, and takes no lock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.cli.options import console
from flows.cli.report import report
from storage.runs import Run, RunState, settled

_AROUND = 2
"""Lines of a terminal that a report leaves free."""


def follow(run: Run, root: Path, every: float) -> bool:
    """Shows the run until no process works on it. Returns False if it failed."""
    out = console()
    state, holder = _look(run)
    if not out.is_terminal:
        shown = None
        while True:
            if state != shown:  # its time has whole seconds
                shown = state
                for part in report(state, root, holder, out):
                    out.print(part, soft_wrap=isinstance(part, Text))
            if holder is None:
                return state.status != "failed"
            time.sleep(every)
            state, holder = _look(run)
    with Live(console=out, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            live.update(_fitting(report(state, root, holder, out), out.height - _AROUND), refresh=True)
            if holder is None:
                return state.status != "failed"
            time.sleep(every)
            state, holder = _look(run)


def _look(run: Run) -> tuple[RunState, str | None]:
    """State and holder. The holder is read first: what it wrote last is then in the state."""
    holder = run.holder()
    return settled(run.state, holder), holder


def _fitting(parts: Sequence[Table | Text], height: int) -> RenderableType:
    """The parts; of a table with more rows than the terminal has lines, the last ones."""
    found: list[RenderableType] = []
    room = max(height - sum(1 for part in parts if isinstance(part, Text)) - 6, 3)
    for part in parts:
        if isinstance(part, Table) and part.row_count > room:
            found += [
                Text(f"({part.row_count - room} earlier rounds: opd status)", style="dim"),
                _last_rows(part, room),
            ]
        else:
            found.append(part)
    return Group(*found)


def _last_rows(table: Table, rows: int) -> Table:
    for column in table.columns:
        column._cells = column._cells[-rows:]
    table.rows = table.rows[-rows:]
    return table
