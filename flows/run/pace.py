"""How long a run still takes, from the median of its finished rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from storage.errors import CorruptArtifact
from storage.runs import RoundState, Run, RunState
from storage.text import counted


def round_seconds(rounds: Iterable[RoundState]) -> list[float]:
    """Seconds of the finished rounds after round 0 that were made here; rounds found in the store took none and do not count."""
    found = []
    for round in rounds:
        seconds = [stage.seconds or 0.0 for stage in round.stages.values() if stage.state == "done"]
        made = "train" in round.stages and round.stages["train"].state == "done"
        if round.round and made and round.student_sha256 is not None:
            found.append(sum(seconds))
    return found


def configured_rounds(run: Run) -> int | None:
    """The run's policy.rounds; None where its config is damaged."""
    try:
        found = (run.experiment.get("policy") or {}).get("rounds")
    except CorruptArtifact:
        return None
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class Pace:
    """Where a run is, and when it ends if its rounds take as long as the median of those before."""

    round: int
    goal: int
    left: float | None
    """seconds until its end; None before a round is finished"""

    def text(self, now: datetime) -> str:
        """`round 7 of 25, done at about 03:40`; without the time before a round is finished."""
        place = f"round {self.round} of {self.goal}"
        return (
            place if self.left is None else f"{place}, done at about {clock(now + timedelta(seconds=self.left), now)}"
        )


def pace(state: RunState, goal: int, now: datetime) -> Pace | None:
    """The pace of a run that is going on; None where no round is left."""
    begun = {round.round: round for round in state.rounds}
    if not state.rounds or (begun.get(0) is not None and begun[0].student_sha256 is None):
        return Pace(0, goal, None)
    current = state.rounds_done + 1
    if current > goal:
        return None
    known = round_seconds(state.rounds)
    if not known:
        return Pace(current, goal, None)
    median = statistics.median(known)
    spent = _spent(begun[current], now) if current in begun else 0.0
    return Pace(current, goal, max(median - spent, 0.0) + (goal - current) * median)


def _spent(round: RoundState, now: datetime) -> float:
    """Seconds that a round has taken so far."""
    total = 0.0
    for stage in round.stages.values():
        if stage.state == "done":
            total += stage.seconds or 0.0
        elif stage.state == "running" and stage.started is not None:
            try:
                total += max((now - datetime.strptime(stage.started, "%Y-%m-%dT%H:%M:%S%z")).total_seconds(), 0.0)
            except (ValueError, TypeError):
                continue
    return total


def clock(then: datetime, now: datetime) -> str:
    """A time of this machine's clock: `03:40`, on another day `Tue 03:40`, in a week or later `14 Dec 03:40`."""
    then, now = then.astimezone(), now.astimezone()
    if then.date() == now.date():
        return f"{then:%H:%M}"
    return f"{then:%a %H:%M}" if (then.date() - now.date()).days < 7 else f"{then:%d %b %H:%M}".lstrip("0")


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `5 h 20 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def estimate(rounds: int, known: Iterable[float]) -> str | None:
    """`about 12 min for 3 rounds (median of 4 finished rounds: 240 s)`; None where nothing is known or to do."""
    seconds = list(known)
    if not seconds or rounds <= 0:
        return None
    median = statistics.median(seconds)
    return (
        f"about {duration(rounds * median)} for {counted(rounds, 'round')} (median of {counted(len(seconds), 'finished round')}"
        f": {duration(median)})"
    )
