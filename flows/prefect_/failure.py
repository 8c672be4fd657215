"""Why a run failed, as Prefect shows it: the stage and its error, what its workers wrote last, the command that continues."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from flows.run.executor import stage_error
from flows.run.hints import described, opd_command, resume_hint
from flows.run.shown import failed_stages
from storage.disk.redact import redact
from storage.errors import CorruptArtifact, InputError
from storage.runs import Run, StageState
from tasks.workers.process import WorkerFailed, last_lines

OWN_LOGS = ("run", "hooks")
"""Logs of a run that are not a worker's."""
SLACK_SECONDS = 2.0
"""A log that was written that long before its stage began counts as written by it: clocks of file systems are coarse."""


@dataclass(frozen=True)
class Failure:
    """What is known of a run's failure, without secrets."""

    place: str
    """`round 3 train: `, or empty where no stage failed"""
    error: str
    worker: str
    """the last lines of the workers that wrote during the stage; empty where the error has them"""
    remedy: list[str]
    """the line with the command that continues the run, if there is one"""

    def message(self) -> str:
        """For the flow run's state."""
        parts = [self.place + self.error, *([self.worker] if self.worker else []), *self.remedy]
        return "\n".join(parts)

    def markdown(self, root: Path, name: str) -> str:
        """For an artifact."""
        own = [f"## Workers\n\n```\n{self.worker}\n```"] if self.worker else []
        return "\n\n".join(
            [
                f"# {name} failed",
                f"```\n{self.place}{self.error}\n```",
                *(f"**{line}**" for line in self.remedy),
                *own,
                f"All output: `{opd_command(root, 'logs', name)}`",
            ]
        )


def failure(error: BaseException, name: str, root: Path) -> Failure:
    """What is known of the failure of the run `name` with `error`."""
    failed = _failed_stage(error, name, root)
    place, worker = "", ""
    if failed is not None:
        round, label, stage = failed
        place = f"round {round} {label}: "
        if not isinstance(error, WorkerFailed):
            worker = workers_lines(Run.open(root, name), time.time() - (stage.seconds or 0.0) - SLACK_SECONDS)
    return Failure(place, redact(described(error)), redact(worker), resume_hint(error, name, root))


def workers_lines(run: Run, since: float) -> str:
    """The last lines of the workers' logs that were written after `since` (seconds since the epoch); empty without any."""
    logs = sorted(run.log_path("run").parent.glob("*.log"))
    return "\n".join(last_lines(log) for log in logs if log.stem not in OWN_LOGS and log.stat().st_mtime >= since)


def _failed_stage(error: BaseException, name: str, root: Path) -> tuple[int, str, StageState] | None:
    """(round, label, stage) of the stage that recorded this error."""
    try:
        failed = failed_stages(Run.open(root, name).state)
    except (InputError, CorruptArtifact):
        return None
    text = stage_error(error)
    return next(((round.round, label, stage) for round, label, stage in failed[::-1] if stage.error == text), None)
