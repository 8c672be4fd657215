"""What Prefect's pages show of a run: the tasks' log lines with what their workers write, a progress bar for a long stage, a
table for every round and one of all rounds, a summary at the end, and why it failed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast
from uuid import UUID

from rich.text import Text

from flows.prefect_.failure import failure
from flows.prefect_.session import Session
from flows.run.executor import Reporter
from flows.run.hints import opd_command
from flows.run.pace import duration
from flows.run.progress import LineReporter, round_line
from flows.run.shown import BY_ROUND, all_with_errors, amount, by_round, by_teacher, sample_sizes
from storage.artifacts.artifact import Artifact, artifact_directory
from storage.disk.redact import redact
from storage.runs import RoundState, Run, RunState, StageState
from tasks.workers.logs import whole_lines
from tasks.workers.metrics import Metrics

LONG_SECONDS, BETWEEN_SECONDS = 10.0, 5.0
"""A stage that takes longer gets a progress bar; at most that often it is moved, and the workers' logs are read."""
NEWEST_BYTES = 64 * 1024
"""Of what a worker wrote between two looks at its log, the last that Prefect gets."""


class InPrefect(LineReporter):
    """Passes a run's events on to `below`, and shows them in Prefect: lines in the log of the task under way, with what its
    workers write; a progress bar for a long stage; a table for every round, and one of all rounds."""

    def __init__(self, session: Session, run: Run, state: RunState, below: Reporter) -> None:
        """`state`: the run's, which the run goes on changing."""
        super().__init__()
        self.session, self.run, self.state, self.below = session, run, state, below
        self._read: dict[Path, int] = {path: path.stat().st_size for path in self._logs()}
        self._bar: UUID | None = None
        self._table: UUID | None = None
        self._tabled = ""
        """What the table of all rounds holds."""
        self._began = self._looked = time.monotonic()

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        self.below.stage(round, label, state, metrics)
        if state.state == "running":
            self._bar, self._began = None, time.monotonic()
        else:
            self._worker_lines()
            if self._bar is not None:
                self.session.attempt(lambda: self._end_bar(round, label, state))
                self._bar = None
        super().stage(round, label, state, metrics)

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None:
        self.below.progress(round, label, done, total, unit, metrics)
        super().progress(round, label, done, total, unit, metrics)
        if time.monotonic() - self._looked >= BETWEEN_SECONDS:
            self._worker_lines()
            if time.monotonic() - self._began >= LONG_SECONDS and total:
                self.session.attempt(lambda: self._move_bar(round, label, done, total, unit))

    def note(self, round: int, label: str, text: str) -> None:
        self.below.note(round, label, text)
        super().note(round, label, text)

    def waiting(self, label: str, holder: str) -> None:
        self.below.waiting(label, holder)
        self._log(f"{label}: another process is making this; waiting for {holder}")

    def round_done(self, state: RoundState) -> None:
        self.below.round_done(state)
        self.session.attempt(lambda: _round_table(self.run.name, state))
        self.session.attempt(self._show_rounds)

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
        """The whole lines of the workers' logs since the last look."""
        self._looked = time.monotonic()
        for path in self._logs():
            found = whole_lines(path, self._read.get(path, 0), NEWEST_BYTES)
            self._read[path] = found.end
            self._log(*(f"{path.stem}: {line}" for line in found.text.splitlines() if line.strip()))

    def _logs(self) -> list[Path]:
        return sorted(self.run.log_path("run").parent.glob("*.log"))

    def _move_bar(self, round: int, label: str, done: int, total: int, unit: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        text, rate = f"{label}, round {round}: {done:,} of {total:,} {unit}", self.rate(done)
        if rate > 0:
            text += f", {rate:,.1f} per second, about {duration((total - done) / rate)} left"
        percent = 100 * done / total
        if self._bar is None:
            bar = create_progress_artifact(percent, _key(self.run.name, label, "round", str(round)), text)
            self._bar = cast(UUID, bar)  # a coroutine only inside an event loop, and stages run outside one
        else:
            update_progress_artifact(self._bar, percent, text)

    def _end_bar(self, round: int, label: str, state: StageState) -> None:
        """The bar of a stage that is over: its time and what it made, or that it failed or was interrupted."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        place = f"{label}, round {round}"
        if state.state == "done":
            made = f"{amount(label, state)} in " if amount(label, state) else ""
            update = ArtifactUpdate(description=f"{place}: {made}{duration(state.seconds or 0.0)}", data=100.0)
        else:
            how = "interrupted" if state.state == "pending" else state.state
            update = ArtifactUpdate(description=f"{place}: {how}")
        get_client(sync_client=True).update_artifact(cast(UUID, self._bar), update)

    def _show_rounds(self) -> None:
        """One table per flow run, changed in place: with a table per round, its page would list as many."""
        from prefect.artifacts import create_table_artifact
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        headings, rows = by_round(self.state.rounds)
        table = [dict(zip(headings, row, strict=True)) for row in rows]
        data = json.dumps(table)
        if self._table is None:
            size = sample_sizes(self.state.rounds, [figure.metric for figure in BY_ROUND])
            text = f"{self.run.name}, all rounds; ± is one standard error over prompts{f' ({size})' if size else ''}"
            self._table = cast(UUID, create_table_artifact(table, _key(self.run.name, "rounds"), text))
        elif data != self._tabled:
            get_client(sync_client=True).update_artifact(self._table, ArtifactUpdate(data=data))
        self._tabled = data


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
        create_markdown_artifact(text, _key(state.name, "summary"), f"{state.name}: results and where they are")

    session.attempt(show)


def show_failure(session: Session, error: BaseException, name: str, root: Path) -> None:
    """A Markdown artifact beside the flow run that failed."""

    def show() -> None:
        from prefect.artifacts import create_markdown_artifact

        text = failure(error, name, root).markdown(root, name)
        create_markdown_artifact(text, _key(name, "failure"), f"{name}: why it failed")

    session.attempt(show)


def summary(state: RunState, root: Path, student: Artifact, configured: int) -> str:
    """A run as Markdown: the metrics of its rounds, what is where in the store, what to do next."""
    rounds = sorted(state.rounds, key=lambda round: round.round)
    headings, rows = by_round(rounds)
    teacher_headings, by_name = by_teacher(rounds)
    sizes = sample_sizes(rounds, [figure.metric for figure in BY_ROUND])
    last, name = rounds[-1].round, state.name
    commands = [
        ("report", name),
        ("status", name),
        ("export", name, f"{name}-student"),
        ("fork", f"{name}@{last}", "--name", f"{name}-2"),
    ]
    if last < configured:
        commands.insert(0, ("resume", name))
    here = artifact_directory(root, student.stage, student.key).relative_to(root)
    return "\n".join(
        [
            f"# {name}: round {last} of {configured}",
            "",
            *markdown_table(headings, rows),
            *(markdown_table(teacher_headings, by_name) if by_name else ()),
            f"± is one standard error over prompts{f' ({sizes})' if sizes else ''}. Round 0 is the student before distillation."
            f" The artifact `{_key(name, 'rounds')}` has the rounds as a table to sort.",
            "",
            f"In the store `{root}`:",
            "",
            "| path | content |",
            "|---|---|",
            f"| `{here}` | the student of round {last} |",
            f"| `runs/{name}` | resolved config, state, logs |",
            "",
            "```",
            *(opd_command(root, *words) for words in commands),
            "```",
            "",
            f"`opd report` writes `report-{name}.html`, a page that works offline.",
        ]
    )


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return [lines[0], "|---" * len(headings) + "|", *lines[1:], ""]
