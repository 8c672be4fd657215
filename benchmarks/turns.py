"""Several ways of doing one thing, measured in turns in one process, and the table of what they took.

On a machine that others use as well only ratios within a turn mean something, and those of CPU time more than those of the clock.
A cell is the median over the turns, with the lowest and the highest in brackets."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Spent(NamedTuple):
    """Seconds of the clock, and of the process on all its CPUs."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> Spent:
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.clock - other.clock, self.cpu - other.cpu)


def in_turns(ways: Mapping[str, Callable[[], Spent]], turns: int) -> dict[str, list[Spent]]:
    """What each way took in each turn. A turn before the first, which fills caches, does not count."""
    found: dict[str, list[Spent]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            spent = way()
            print(f"turn {turn}: {name}: CPU {spent.cpu:.3g} s, clock {spent.clock:.3g} s", file=sys.stderr, flush=True)
            if turn:
                found[name].append(spent)
    return found


def spread(values: Iterable[float]) -> str:
    """Median [lowest, highest]."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.3g} [{ordered[0]:.3g}, {ordered[-1]:.3g}]"


def ratios(ones: Sequence[Spent], others: Sequence[Spent], kind: str = "cpu") -> list[float]:
    """One by the other, turn by turn, of CPU or clock time."""
    return [getattr(one, kind) / getattr(other, kind) for one, other in zip(ones, others, strict=True)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def machine() -> str:
    """Processor, threads and versions, in a line."""
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    processor = names[0].strip() if names else platform.machine()
    return (
        f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )
