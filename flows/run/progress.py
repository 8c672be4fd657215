"""Reporters of a run's progress: a live line in a terminal, plain lines in a log, or none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from flows.run.figures import EVALUATED, MAIN, REWARD
from flows.run.lines import short_line
from flows.run.pace import pace
from flows.run.shown import NOT_EVALUATED, amount, samples, with_error
from storage.runs import RoundState, RunState, StageState
from tasks.workers.metrics import Metrics, short_words, summary, words

if TYPE_CHECKING:
    from flows.run.executor import Reporter

LINE_INTERVAL = 15.0
"""Seconds between two progress lines of one stage without a terminal."""


class SilentReporter:
    """Reports nothing."""

    def begins(self, state: RunState, goal: int) -> None: ...

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None: ...

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None: ...

    def note(self, round: int, label: str, text: str) -> None: ...

    def waiting(self, label: str, holder: str) -> None: ...

    def round_done(self, state: RoundState) -> None: ...


class PassingOn(SilentReporter):
    """Passes every event on to `below`."""

    def __init__(self, below: Reporter) -> None:
        self.below = below

    def begins(self, state: RunState, goal: int) -> None:
        self.below.begins(state, goal)

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        self.below.stage(round, label, state, metrics)

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None:
        self.below.progress(round, label, done, total, unit, metrics)

    def note(self, round: int, label: str, text: str) -> None:
        self.below.note(round, label, text)

    def waiting(self, label: str, holder: str) -> None:
        self.below.waiting(label, holder)

    def round_done(self, state: RoundState) -> None:
        self.below.round_done(state)


class OnlyWork(PassingOn):
    """Passes on what happens, without the stages and rounds that are found in the store."""

    def __init__(self, below: Reporter) -> None:
        super().__init__(below)
        self._worked = False

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        if state.state != "cached":
            self._worked = True
            super().stage(round, label, state, metrics)

    def round_done(self, state: RoundState) -> None:
        if self._worked:
            super().round_done(state)
        self._worked = False


class QuietReporter(SilentReporter):
    """Warnings and failures only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        if state.state == "failed":
            self.console.print(f"round {round} {label}: {escape(str(state.error))}", soft_wrap=True)

    def note(self, round: int, label: str, text: str) -> None:
        if text.startswith("warning: "):
            self.console.print(f"round {round} {label}: {escape(text)}", soft_wrap=True)


class LineReporter(SilentReporter):
    """One line per event, for logs and pipes; one for all stages of a round that are found in the store. Not `verbose`: one line
    per round, and what is long or has to be known: progress of stages that take long, warm-ups, notes, failures."""

    def __init__(self, console: Console | None = None, verbose: bool = True) -> None:
        self.console, self.verbose = console or Console(stderr=True, highlight=False), verbose
        self._last = 0.0
        self._first: tuple[float, int] | None = None
        """Time and count of the stage's first report: the rate leaves out the engine's start."""
        self._found: list[str] = []
        """Stages of this round that are in the store, not reported yet."""
        self._worked = False
        """Whether a stage of this round was not in the store."""
        self._run: tuple[RunState, int] | None = None
        """The run's state, which the run goes on changing, and its last round."""

    def begins(self, state: RunState, goal: int) -> None:
        self._run = (state, goal)

    def pace(self) -> str:
        """`round 7 of 25, done at about 03:40`; empty before the run has begun and after its last round."""
        now = datetime.now().astimezone()
        found = None if self._run is None else pace(*self._run, now)
        return "" if found is None else found.text(now)

    def _begin(self) -> None:
        self._last, self._first = time.monotonic(), None

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        self._begin()
        made = f" ({text})" if (text := amount(label, state)) else ""
        if state.state == "cached":
            return self._in_store(round, label, made)
        self._worked = True
        self._report_found(round)
        told = self.verbose or label.startswith("warmup")
        if state.state == "running":
            if self.verbose:
                self._line(round, label, "started")
        elif state.state == "done":
            if told:
                self._line(round, label, f"[green]done[/] in {state.seconds or 0:.1f} s{made}")
            if told and (text := summary(metrics or {})):
                self._line(round, label, text)
        elif state.state == "pending":
            self._line(round, label, "[yellow]interrupted[/]")
        else:
            self._line(round, label, f"[red]{state.state}[/]: {escape(str(state.error))}")

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None:
        rate = self.rate(done)
        if time.monotonic() - self._last < LINE_INTERVAL:
            return
        self._last = time.monotonic()
        pace = f" ({rate:,.1f}/s, {(total - done) / rate:.0f} s left)" if rate > 0 else ""
        text = f"  {words(metrics)}" if metrics and self.verbose else ""
        self._line(round, label, f"{done:,}/{total:,} {unit}{pace}{text}")

    def rate(self, done: int) -> float:
        """Units per second since the stage's first report; 0 at that one."""
        now = time.monotonic()
        since, before = self._first = self._first or (now, done)
        return (done - before) / (now - since) if now > since else 0.0

    def note(self, round: int, label: str, text: str) -> None:
        self._line(round, label, escape(text))

    def waiting(self, label: str, holder: str) -> None:
        self.console.print(f"{label}: another process is building this; waiting for {holder}")

    def round_done(self, state: RoundState) -> None:
        found = "" if self._worked or not self._found else "  [dim]already in the store[/]"
        if self._worked:
            self._report_found(state.round)
        if self.verbose:
            self.console.print(f"[bold]{round_line(state)}[/]{found}", soft_wrap=True)
        else:
            goal = None if self._run is None else self._run[1]
            text = short_line(state, goal, self.console.width, in_store=bool(found))
            self.console.print(text, soft_wrap=True, markup=False)
        if self._worked and (pace := self.pace()) and not self.console.is_terminal:
            self.console.print(f"[dim]next: {pace}[/]", soft_wrap=True)
        self._found, self._worked = [], False

    def _in_store(self, round: int, label: str, made: str) -> None:
        """A stage is in the store; `made`: how much it made."""
        self._found.append(label)

    def _report_found(self, round: int) -> None:
        if self._found and self.verbose:
            self._line(round, ", ".join(self._found), "[dim]already in the store[/]")
        self._found = []

    def _line(self, round: int, label: str, text: str) -> None:
        self.console.print(f"[cyan]round {round}[/] {label:<15} {text}", soft_wrap=True)


class RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else f"- {task.fields['unit']}/s")


class MetricsColumn(ProgressColumn):
    """The latest metrics, as many as fit beside the other columns."""

    def __init__(self, console: Console, others: Sequence[ProgressColumn]) -> None:
        super().__init__(Column(no_wrap=True))
        self.console, self.others = console, others

    def render(self, task: Task) -> Text:
        taken = sum(self.console.measure(column(task)).maximum + 1 for column in self.others)
        return Text(short_words(task.fields["metrics"], self.console.width - taken))


class RunLine:
    """The line of the whole run above the stage's bar: finished rounds, where it is, when it ends."""

    def __init__(self, reporter: LineReporter) -> None:
        self.reporter = reporter

    def __rich__(self) -> Text:
        pace, run = self.reporter.pace(), self.reporter._run
        if run is None or not pace:
            return Text("", end="")
        done, goal = run[0].rounds_done, max(run[1], 1)
        full = round(16 * min(done / goal, 1.0))
        return Text.assemble((f"{run[0].name} ", "bold"), ("━" * full, "green"), ("━" * (16 - full), "dim"), f" {pace}")


class TerminalReporter(LineReporter):
    """A live bar for the running stage (done/total, rate, time left, metrics of the last step) and a line for the run above it,
    below the lines of finished rounds."""

    def __init__(self, console: Console | None = None, verbose: bool = True) -> None:
        super().__init__(console, verbose)
        columns = (
            TextColumn("[cyan]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        metrics = MetricsColumn(self.console, columns)
        self._bar = Progress(*columns, metrics, console=self.console, transient=True)
        self._task = self._add("", visible=False)
        self._live = Live(
            Group(RunLine(self), self._bar),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            redirect_stderr=False,
        )

    def __enter__(self) -> TerminalReporter:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _add(self, description: str, visible: bool) -> TaskID:
        return self._bar.add_task(description, total=None, unit="", metrics={}, visible=visible)

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        running = state.state == "running"
        self._bar.remove_task(self._task)
        self._task = self._add(f"round {round} {label}", visible=running)
        if not running:
            super().stage(round, label, state, metrics)

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None:
        self._bar.update(self._task, completed=done, total=total, unit=unit, metrics=metrics or {}, visible=True)


def round_line(state: RoundState) -> str:
    """A round's metrics in one line, with their standard errors; sizes of samples for accuracy and KL."""
    shown = [f"round {state.round}:", *([NOT_EVALUATED] if state.unevaluated else [])]
    for figure in (*EVALUATED, REWARD):
        if figure.metric != "accuracy_sampled" and (text := with_error(state.metrics, figure.metric, figure.form)):
            size = samples(state.metrics, figure.metric) if figure in MAIN else ""
            shown.append(f"{figure.heading} {text}" + (f" ({size})" if size else ""))
    return "  ".join(shown)
