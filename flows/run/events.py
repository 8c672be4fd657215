"""A run's events as JSON, one object a line, for programs that watch a run."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any, TextIO

from flows.run.progress import SilentReporter
from storage.disk.files import utc_now
from storage.disk.redact import redact
from storage.runs import RoundState, RunState, StageState
from tasks.workers.metrics import Metrics

PROGRESS_SECONDS = 1.0
"""At most that often a stage's progress is an event."""


class EventReporter(SilentReporter):
    """Every event has `event` (begin, stage, progress, note, waiting, round) and `time`; numbers that are not finite are null."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self._last = float("-inf")

    def begins(self, state: RunState, goal: int) -> None:
        self._write("begin", run=state.name, rounds=goal, rounds_done=state.rounds_done)

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        self._last = float("-inf")
        told = {"state": state.state, "seconds": state.seconds, "rows": state.rows, "error": state.error}
        self._write("stage", round=round, stage=label, **told, artifacts=state.artifacts, metrics=dict(metrics or {}))

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None:
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS and done < total:
            return
        self._last = now
        told = {"done": done, "total": total, "unit": unit, "metrics": dict(metrics or {})}
        self._write("progress", round=round, stage=label, **told)

    def note(self, round: int, label: str, text: str) -> None:
        self._write("note", round=round, stage=label, text=text, warning=text.startswith("warning: "))

    def waiting(self, label: str, holder: str) -> None:
        self._write("waiting", stage=label, holder=holder)

    def round_done(self, state: RoundState) -> None:
        self._write("round", round=state.round, student_sha256=state.student_sha256, metrics=state.metrics)

    def _write(self, event: str, **told: Any) -> None:
        text = json.dumps({"event": event, "time": utc_now(), **_plain(told)}, allow_nan=False)
        print(redact(text), file=self.out, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
