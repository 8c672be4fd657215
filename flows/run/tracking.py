"""Sends a run's metrics to its trackers. What was sent is kept beside the run's state, so that a later call continues the same
tracker runs and sends what is missing: rounds of before a tracker was named, and those that it failed to take."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.experiment import Experiment
from flows.run.executor import Reporter
from flows.run.progress import PassingOn
from flows.trackers import Point, Tracked, Tracker, TrackerConfig
from flows.trackers.names import round_point, step_points
from storage.disk.files import replace_atomically
from storage.disk.redact import redact
from storage.errors import OpdError
from storage.identity import digest_of
from storage.runs import RoundState, Run, StageState
from storage.store import Store
from tasks.workers.metrics import Metrics

FILE = "trackers.json"
"""In the run's folder: by kind of tracker the id of its run, and marks of what it has taken."""
CLOSE_SECONDS = 30.0
"""How long the end of a call waits for what a tracker has not sent yet."""


class Marks:
    """The file of what trackers have taken. A damaged or foreign one counts as empty: everything is sent again."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            data = json.loads(path.read_bytes())
            self.data = {str(kind): {"id": str(of["id"]), "taken": list(of["taken"])} for kind, of in data.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self.data = {}

    def id(self, kind: str) -> str | None:
        found = self.data.get(kind)
        return None if found is None else str(found["id"])

    def taken(self, kind: str) -> set[str]:
        return set(self.data.get(kind, {}).get("taken", ()))

    def add(self, kind: str, id: str, mark: str | None = None) -> None:
        with self._lock:
            own = self.data.setdefault(kind, {"id": id, "taken": []})
            own["id"] = id
            if mark is not None:
                own["taken"] = [*own["taken"], mark]
            replace_atomically(self.path, (json.dumps(self.data, indent=1) + "\n").encode())


@dataclass(frozen=True)
class _Batch:
    mark: str
    points: Sequence[Point]


class Sender:
    """One tracker in a thread of its own: the run waits for no network. `failure` is why it takes no more."""

    def __init__(self, config: TrackerConfig, run: Tracked, marks: Marks) -> None:
        self.config, self.run, self.marks = config, run, marks
        self.failure: str | None = None
        self._taken = marks.taken(config.kind)
        self._queue: queue.SimpleQueue[_Batch | str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {config.kind}", daemon=True)
        self._thread.start()

    def wants(self, mark: str) -> bool:
        """Whether the tracker lacks a batch."""
        return self.failure is None and mark not in self._taken

    def send(self, mark: str, points: Sequence[Point]) -> None:
        self._taken.add(mark)
        self._queue.put(_Batch(mark, points))

    def close(self, status: str) -> None:
        """Sends the rest and ends the tracker's run; waits for at most `CLOSE_SECONDS`."""
        self._queue.put(status)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() and self.failure is None:
            self.failure = f"it did not finish within {CLOSE_SECONDS:.0f} s"

    def _work(self) -> None:
        try:
            tracker = self.config.open(self.run)
            self.marks.add(self.config.kind, tracker.id)
            self._take(tracker)
        except Exception as error:  # whatever a tracker's library raises ends the tracking, never the run
            self.failure = self.failure or redact(f"{type(error).__name__}: {error}".strip().splitlines()[0])

    def _take(self, tracker: Tracker) -> None:
        while not isinstance(item := self._queue.get(), str):
            tracker.log(item.points)
            self.marks.add(self.config.kind, tracker.id, item.mark)
        tracker.close(item)


class Tracking(PassingOn):
    """Passes a run's events on to `below`, and finished stages and rounds to the trackers."""

    def __init__(self, store: Store, senders: Sequence[Sender], below: Reporter, log: Callable[[str], None]) -> None:
        super().__init__(below)
        self.store, self.senders, self._log = store, senders, log
        self._warned: set[str] = set()

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        super().stage(round, label, state, metrics)
        if state.state in ("done", "cached"):
            for stage, key in state.artifacts.items():
                self._send(f"{round}/{label}/{key}", lambda stage=stage, key=key: self._steps(label, stage, key))  # type: ignore[misc]
        self._warn()

    def round_done(self, state: RoundState) -> None:
        super().round_done(state)
        seconds = {label: stage.seconds for label, stage in state.stages.items()}
        mark = digest_of(json.dumps([state.metrics, seconds], sort_keys=True))[:16]
        self._send(f"{state.round}/{mark}", lambda: [round_point(state)])
        self._warn()

    def close(self, status: str) -> None:
        for sender in self.senders:
            sender.close(status)
        self._warn()

    def _send(self, mark: str, points: Callable[[], list[Point]]) -> None:
        wanting = [sender for sender in self.senders if sender.wants(mark)]
        if wanting and (made := points()):
            for sender in wanting:
                sender.send(mark, made)

    def _steps(self, label: str, stage: str, key: str) -> list[Point]:
        artifact = self.store.get(stage, key)
        if artifact is None or "training_steps" not in artifact.rows or self.store.evicted(artifact) is not None:
            return []
        try:
            return list(step_points(label, self.store.read_table(artifact, "training_steps").to_pylist()))
        except OpdError:  # a damaged table is for the stage that needs it
            return []

    def _warn(self) -> None:
        for sender in self.senders:
            kind = sender.config.kind
            if sender.failure is not None and kind not in self._warned:
                self._warned.add(kind)
                text = (
                    f"warning: trackers: {kind} failed and takes no more in this call; the next one sends the rest:"
                    f" {sender.failure}"
                )
                self._log(text)
                self.below.note(0, "run", text)


@contextmanager
def tracking(
    experiment: Experiment, store: Store, run: Run, below: Reporter, log: Callable[[str], None]
) -> Iterator[Reporter]:
    """A reporter that also feeds the trackers of the experiment; `below` itself where it names none. At the end of the block what
    is left is sent, with the run's status then."""
    if not experiment.trackers:
        yield below
        return
    config: dict[str, Any] = experiment.model_dump(mode="json", exclude={"trackers", "hooks"})
    marks, folder = Marks(run.directory / FILE), store.root / "trackers"
    group = experiment.fork.run if experiment.fork is not None else None
    senders = [
        Sender(tracker, Tracked(run.name, group, config, folder, marks.id(tracker.kind)), marks)
        for tracker in experiment.trackers
    ]
    found = Tracking(store, senders, below, log)
    status = "failed"
    try:
        yield found
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        found.close(status)
