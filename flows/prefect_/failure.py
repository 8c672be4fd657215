"""Why a run failed, as Prefect shows it: the stage and its error, what its workers wrote last, the command that continues."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flows.run.executor import stage_error
from flows.run.hints import described, opd_command, resume_hint
from flows.run.shown import failed_stages
from storage.disk.redact import redact
from storage.errors import CorruptArtifact, InputError
from storage.runs import Run, StageState
from tasks.workers.logs import last_lines
from tasks.workers.process import WorkerFailed

OWN_LOGS = ("run", "hooks")
"""Logs of a run that are not a worker's."""


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
            worker = workers_lines(Run.open(root, name), stage)
    return Failure(place, redact(described(error)), worker, resume_hint(error, name, root))


def workers_lines(run: Run, stage: StageState) -> str:
    """The last lines of the workers that wrote since the stage began, each of its last attempt; empty without any."""
    if stage.started is None:
        return ""
    began = datetime.strptime(stage.started, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    logs = sorted(run.log_path("run").parent.glob("*.log"))
    return "\n".join(last_lines(log) for log in logs if log.stem not in OWN_LOGS and log.stat().st_mtime >= began)


def _failed_stage(error: BaseException, name: str, root: Path) -> tuple[int, str, StageState] | None:
    """(round, label, stage) of the stage that recorded this error."""
    try:
        failed = failed_stages(Run.open(root, name).state)
    except (InputError, CorruptArtifact):
        return None
    text = stage_error(error)
    return next(((round.round, label, stage) for round, label, stage in failed[::-1] if stage.error == text), None)
