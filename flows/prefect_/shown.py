"""What Prefect's pages show of a run: the tasks' log lines with what their workers write, a progress bar for a long stage, a
table for every round, a summary at the end."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import cast
from uuid import UUID

from rich.text import Text

from flows.prefect_.session import Session
from flows.run.executor import Reporter
from flows.run.figures import EVALUATED, SAMPLED
from flows.run.hints import opd_command
from flows.run.progress import LineReporter, round_line
from flows.run.shown import NOT_EVALUATED, all_with_errors, amount, by_teacher, sample_sizes, with_error
from storage.artifacts.artifact import Artifact, artifact_directory
from storage.disk.redact import redact
from storage.runs import RoundState, Run, RunState, StageState
from tasks.workers.metrics import Metrics

LONG_SECONDS, BETWEEN_SECONDS = 10.0, 5.0
"""A stage that takes longer gets a progress bar; at most that often it is moved, and the workers' logs are read."""
NEWEST_BYTES = 64 * 1024
"""Of what a worker wrote between two looks at its log, the last that Prefect gets."""
SHOWN = tuple(figure.metric for figure in (*EVALUATED, SAMPLED))
"""Metrics of the summary."""


class InPrefect(LineReporter):
    """Passes a run's events on to `below`, and shows them in Prefect: lines in the log of the task under way, with what its
    workers write; a progress bar for a long stage; a table for every round."""

    def __init__(self, session: Session, run: Run, below: Reporter) -> None:
        super().__init__()
        self.session, self.run, self.below = session, run, below
        self._read: dict[Path, int] = {path: path.stat().st_size for path in self._logs()}
        self._bar: UUID | None = None
        self._began = self._looked = time.monotonic()

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        self.below.stage(round, label, state, metrics)
        if state.state == "running":
            self._bar, self._began = None, time.monotonic()
        else:
            self._worker_lines()
            if self._bar is not None and state.state == "done":
                self.session.attempt(lambda: self._move_bar(label, 100.0))
        super().stage(round, label, state, metrics)

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None:
        self.below.progress(round, label, done, total, unit, metrics)
        super().progress(round, label, done, total, unit, metrics)
        if time.monotonic() - self._looked >= BETWEEN_SECONDS:
            self._worker_lines()
            if time.monotonic() - self._began >= LONG_SECONDS and total:
                self.session.attempt(lambda: self._move_bar(f"{label} · round {round}", 100 * done / total))

    def note(self, round: int, label: str, text: str) -> None:
        self.below.note(round, label, text)
        super().note(round, label, text)

    def waiting(self, label: str, holder: str) -> None:
        self.below.waiting(label, holder)
        self._log(f"{label}: another process is making this; waiting for {holder}")

    def round_done(self, state: RoundState) -> None:
        self.below.round_done(state)
        self.session.attempt(lambda: _round_table(self.run.name, state))

    def _in_store(self, round: int, label: str, made: str) -> None:
        self._line(round, label, f"already in the store{made}")  # at once: each stage has a log of its own

    def _line(self, round: int, label: str, text: str) -> None:
        self._log(f"round {round} {label}: {Text.from_markup(text).plain}")

    def _log(self, *lines: str) -> None:
        def log() -> None:
            from prefect import get_run_logger

            for line in lines:
                get_run_logger().info("%s", redact(line))

        self.session.attempt(log)

    def _worker_lines(self) -> None:
        """What the workers' logs hold since the last look."""
        self._looked = time.monotonic()
        for path in self._logs():
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(self._read.get(path, 0), size - NEWEST_BYTES))
                text = file.read(size).decode(errors="replace")
            self._read[path] = size
            self._log(*(f"{path.stem}: {line}" for line in text.splitlines() if line.strip()))

    def _logs(self) -> list[Path]:
        return sorted(self.run.log_path("run").parent.glob("*.log"))

    def _move_bar(self, name: str, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._bar is None:
            bar = create_progress_artifact(percent, _key(self.run.name, name), name)
            self._bar = cast(UUID, bar)  # a coroutine only inside an event loop, and stages run outside one
        else:
            update_progress_artifact(self._bar, percent)


def _key(*parts: str) -> str:
    """An artifact's key as Prefect demands it: lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _round_table(run: str, state: RoundState) -> None:
    from prefect.artifacts import create_table_artifact

    def own(label: str, metric: str) -> bool:
        found = [name for name in state.stages if metric.startswith(f"{name}_")]
        return max(found, key=len, default="evaluate") == label

    rows = [
        {
            "stage": label,
            "state": stage.state,
            "seconds": None if stage.seconds is None else round(stage.seconds, 1),
            "made": amount(label, stage),
            "artifacts": " ".join(f"{name}/{key}" for name, key in stage.artifacts.items()),
            "metrics": "  ".join(
                f"{metric.removeprefix(f'{label}_')} {text}"
                for metric, text in all_with_errors(state.metrics, "{:.5g}").items()
                if own(label, metric)
            ),
        }
        for label, stage in state.stages.items()
    ]
    create_table_artifact(rows, _key(run, f"round {state.round}"), f"{run}, {round_line(state)}")


def show_summary(session: Session, state: RunState, root: Path, student: Artifact, configured: int) -> None:
    """A Markdown artifact beside the flow run."""

    def show() -> None:
        from prefect.artifacts import create_markdown_artifact

        text = summary(state, root, student, configured)
        create_markdown_artifact(text, _key(state.name, "summary"), f"{state.name}: what it came to")

    session.attempt(show)


def summary(state: RunState, root: Path, student: Artifact, configured: int) -> str:
    """A run as Markdown: the metrics of its rounds, where the student is, what to do next."""
    rounds = sorted(state.rounds, key=lambda round: round.round)
    columns = [name for name in SHOWN if any(round.metrics.get(name) is not None for round in rounds)]
    cells = [[with_error(round.metrics, name, "{:.4g}") for name in columns] for round in rounds]
    for round, row in zip(rounds, cells, strict=True):
        if round.unevaluated and row:
            row[0] = NOT_EVALUATED
    headings, by_name = by_teacher(rounds)
    of_teachers = [
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
        *(f"| {' | '.join(row)} |" for row in by_name),
        "",
    ]
    sizes = sample_sizes(rounds, columns)
    last, name = rounds[-1].round, state.name
    commands = [
        ("status", name),
        ("export", name, f"{name}-student"),
        ("fork", f"{name}@{last}", "--name", f"{name}-2"),
    ]
    if last < configured:
        commands.insert(0, ("resume", name))
    return "\n".join(
        [
            f"# {name}: round {last} of {configured}",
            "",
            f"| round | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
            *(f"| {round.round} | {' | '.join(row)} |" for round, row in zip(rounds, cells, strict=True)),
            "",
            *(of_teachers if by_name else ()),
            f"± is one standard error over prompts{f' ({sizes})' if sizes else ''}.",
            f"Round 0 is the student before distillation. The student of round {last}:"
            f" `{artifact_directory(root, student.stage, student.key)}`",
            "",
            "```",
            *(opd_command(root, *words) for words in commands),
            "```",
        ]
    )
