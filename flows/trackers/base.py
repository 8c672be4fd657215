"""What a tracker is: its config, what it is told of a run, and the registry."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from storage.errors import ConfigError
from storage.identity import RunPolicy
from tasks.losses.registry import Registry

Axis = Literal["step", "round"]
"""What the numbers of a point count: optimizer steps (of the run, of a warm-up) or rounds."""


@dataclass(frozen=True)
class Point:
    """Metrics at one step or round: name -> value. Names are those of `flows.trackers.names`."""

    axis: Axis
    number: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Tracked:
    """The run that a tracker records."""

    name: str
    group: str | None
    """of runs that belong together: the run that it was forked from, or None"""
    config: Mapping[str, Any]
    """the resolved config as JSON values: the hyperparameters"""
    folder: Path
    """where a tracker that writes files puts them, if its config names no other place; shared by the runs of a store"""
    id: str | None
    """the id that `Tracker.id` had in an earlier call of this run; None for a new one"""

    def hyperparameters(self) -> dict[str, Any]:
        """The config in one level, `train.lr` -> value; lists and empty mappings as they are."""
        return dict(_leaves(self.config, ""))


def _leaves(value: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        own = f"{place}.{name}" if place else name
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, own)
        else:
            yield own, item


class Tracker(Protocol):
    """An open run of a tracker. All calls come from one thread, which may wait: the run does not wait for it. Any exception ends
    the tracking, not the run."""

    @property
    def id(self) -> str:
        """What a later call of the same run gives to `TrackerConfig.open`, to continue the same run."""

    def log(self, points: Sequence[Point]) -> None: ...

    def close(self, status: str) -> None:
        """The call ends. `status`: of the run, as `opd status` shows it."""


class TrackerConfig(RunPolicy, ABC):
    """A tracker's own fields. Keys and passwords come from the environment, never from here."""

    kind: str
    module: ClassVar[str]
    """the module that it imports"""
    extra: ClassVar[str] = ""
    """the extra of opdflow that installs it; empty: a plugin's own"""

    @abstractmethod
    def open(self, run: Tracked) -> Tracker:
        """A new run in the tracker, or the one with `run.id` continued. Called in the thread of all later calls."""

    def problem(self) -> str | None:
        """Why it cannot be used, found before the run starts and without asking a server; None: it can."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            how = f"pip install 'opdflow[{self.extra}]'" if self.extra else f"install {self.module}"
            return f"the package {self.module!r} is not installed; {how}"
        return None


TRACKERS: Registry[TrackerConfig] = Registry("tracker")


def register(cls: type[TrackerConfig]) -> type[TrackerConfig]:
    """Class decorator: adds a tracker under its `kind`."""
    return TRACKERS.register(cls)


def require_trackers(trackers: Sequence[TrackerConfig]) -> None:
    """ConfigError, before anything starts, that names every tracker which cannot be used."""
    problems = [f"trackers.{number}: {t.kind}: {why}" for number, t in enumerate(trackers) if (why := t.problem())]
    if problems:
        raise ConfigError("\n".join([*problems, "or leave it out: --set trackers=[]"]))
