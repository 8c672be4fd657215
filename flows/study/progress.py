"""Progress of a study: one line per round."""

from __future__ import annotations

from rich.console import Console

from flows.run.progress import LineReporter, round_line
from storage.runs import RoundState, StageState
from tasks.workers.metrics import Metrics


class StudyReporter(LineReporter):
    """A line per round that was run, and progress lines in between."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._made = False

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        if state.state in ("running", "failed"):
            self._made = True
            super().stage(round, label, state) if state.state == "failed" else self._begin()

    def round_done(self, state: RoundState) -> None:
        if self._made:
            self.console.print(f"  {round_line(state)}")
        self._made = False
