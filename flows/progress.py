"""Who watches a run: a live line in a terminal, plain lines in a log, or nobody."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from storage.runs import RoundState, StageState

LINE_INTERVAL = 15.0
"""Seconds between two progress lines of one stage where there is no terminal."""


class SilentReporter:
    """Nobody watches."""

    def stage(self, round: int, label: str, state: StageState) -> None: ...

    def progress(self, round: int, label: str, done: int, total: int, unit: str) -> None: ...

    def waiting(self, label: str, holder: str) -> None: ...

    def round_done(self, state: RoundState) -> None: ...


class LineReporter(SilentReporter):
    """One line per event, for logs and pipes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._last = 0.0
        self._first: tuple[float, int] | None = None
        """Time and count of the stage's first report: an engine's start is not its rate."""

    def _begin(self) -> None:
        self._last, self._first = time.monotonic(), None

    def stage(self, round: int, label: str, state: StageState) -> None:
        self._begin()
        if state.state == "running":
            self._line(round, label, "started")
        elif state.state == "cached":
            self._line(round, label, f"[dim]already in the store[/] ({state.rows or 0:,} rows)")
        elif state.state == "done":
            self._line(round, label, f"[green]done[/] in {state.seconds or 0:.1f} s ({state.rows or 0:,} rows)")
        else:
            self._line(round, label, f"[red]{state.state}[/]: {state.error}")

    def progress(self, round: int, label: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        since, before = self._first = self._first or (now, done)
        if now - self._last < LINE_INTERVAL:
            return
        self._last = now
        rate = (done - before) / (now - since) if now > since else 0.0
        pace = f" ({rate:,.1f}/s, {(total - done) / rate:.0f} s left)" if rate > 0 else ""
        self._line(round, label, f"{done:,}/{total:,} {unit}{pace}")

    def waiting(self, label: str, holder: str) -> None:
        self.console.print(f"{label}: another process is making this; waiting for {holder}")

    def round_done(self, state: RoundState) -> None:
        self.console.print(f"[bold]{round_line(state)}[/]")

    def _line(self, round: int, label: str, text: str) -> None:
        self.console.print(f"[cyan]round {round}[/] {label:<15} {text}", soft_wrap=True)


class RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else f"- {task.fields['unit']}/s")


class TerminalReporter(LineReporter):
    """A live bar for the stage under way (done/total, rate, time left) under the lines of those that ended."""

    def __init__(self) -> None:
        super().__init__(Console(stderr=True, highlight=False))
        self._bar = Progress(
            TextColumn("[cyan]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, unit="", visible=False)

    def __enter__(self) -> TerminalReporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, round: int, label: str, state: StageState) -> None:
        running = state.state == "running"
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"round {round} {label}", total=None, unit="", visible=running)
        if not running:
            super().stage(round, label, state)

    def progress(self, round: int, label: str, done: int, total: int, unit: str) -> None:
        self._bar.update(self._task, completed=done, total=total, unit=unit, visible=True)


def round_line(state: RoundState) -> str:
    """A round's figures in one line."""
    shown = [f"round {state.round}:"]
    for name, label, form in (
        ("accuracy_greedy", "accuracy", "{:.1%}"),
        ("reverse_kl", "reverse KL", "{:.4f}"),
        ("mean_length", "length", "{:.1f}"),
        ("clipped_ratio", "clipped", "{:.1%}"),
    ):
        value = state.metrics.get(name)
        if value is not None:
            shown.append(f"{label} {form.format(value)}")
    return "  ".join(shown)
