"""Batches: which shards were sampled together. The last bits of a log-probability can depend on what an engine decodes at the
same time, so a shard is repeated bit for bit only in the batch that it was in.

A batch is a queue of (shard, step): the engine got the shard's requests before its step of that number. While the artifact is
unfinished, a worker keeps a file per batch beside the shards, and adds a sealed line to it before each shard that it writes; the
manifest's provenance then has all batches. Artifacts made before batches were recorded had one shard per batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from storage.disk.files import append_durably, seal_line, unique, unseal_lines
from storage.errors import CorruptArtifact

BATCH = ".batch.json"
BATCHES = "batches"
"""Name in an artifact's provenance: a list of {queue, shards}, `shards` being those that were written in this batch; `queue` is
null where it is not known (its file was damaged)."""

Queue = list[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """A recorded batch, and some of its shards: those written in it, or those to write again."""

    queue: Queue
    shards: list[int]
    at: dict[int, int] = field(default_factory=dict, compare=False)
    """When each of its shards was written, in ns since the epoch."""


@dataclass
class BatchLog:
    """A worker's record of the batch that it is sampling: one file, its name sorted by time."""

    folder: Path
    table: str
    _given: Queue = field(default_factory=list)
    """What the engine was given since the last line."""
    _lock: Lock = field(default_factory=Lock)
    """The engine's thread adds, another writes."""

    def __post_init__(self) -> None:
        self.path = self.folder / f"{self.table}-{time.time_ns():020d}-{unique()}{BATCH}"

    def add(self, shard: int, step: int) -> None:
        """The engine gets the requests of a shard before its step number `step`."""
        with self._lock:
            self._given.append((shard, step))

    def writing(self, shard: int) -> None:
        """Call before a shard is written: makes the record of its batch durable first."""
        with self._lock:
            given, self._given = self._given, []
        append_durably(self.path, seal_line({"queue": given, "written": [shard, time.time_ns()]}))


def unfinished_batches(folder: Path, table: str) -> list[Batch | None]:
    """The batches of an unfinished artifact, oldest first; None for a damaged record. For a shard that was written in
    several, the last one counts."""
    return [_recorded(path) for path in _files(folder, table)]


def _recorded(path: Path) -> Batch | None:
    queue: Queue = []
    at: dict[int, int] = {}
    try:
        for content in unseal_lines(path):
            queue += [(int(shard), int(step)) for shard, step in content["queue"]]
            shard, when = content["written"]
            at[int(shard)] = int(when)
    except (CorruptArtifact, FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return Batch(queue, list(at), at) if at else None


def provenance_of(batches: Iterable[Batch | None], count: int) -> dict[str, Any]:
    """The manifest's record of the batches of a table with `count` shards."""
    last: dict[int, tuple[int, int]] = {}  # when, and in which batch: one that began earlier can write a shard later
    known = [batch for batch in batches if batch is not None]
    for number, batch in enumerate(known):
        for shard in batch.shards:
            last[shard] = max(last.get(shard, (0, 0)), (batch.at.get(shard, 0), number))
    entries = [
        {"queue": [list(entry) for entry in batch.queue], "shards": mine}
        for number, batch in enumerate(known)
        if (mine := sorted(shard for shard, (_, at) in last.items() if at == number and shard < count))
    ]
    if unknown := [shard for shard in range(count) if shard not in last]:
        entries.append({"queue": None, "shards": unknown})
    return {BATCHES: entries}


def recorded_batches(provenance: Mapping[str, Any], shards: Iterable[int]) -> list[Batch]:
    """The batches to repeat, so that these shards are equal bit for bit. A shard whose batch is not known is sampled alone, as
    all were before batches were recorded."""
    wanted = set(shards)
    found = []
    for entry in provenance.get(BATCHES) or ():
        mine = sorted(wanted & set(entry["shards"]))
        if mine and entry["queue"] is not None:
            found.append(Batch([(int(shard), int(step)) for shard, step in entry["queue"]], mine))
            wanted -= set(mine)
    return found + [Batch([(shard, 0)], [shard]) for shard in sorted(wanted)]


def _files(folder: Path, table: str) -> list[Path]:
    return sorted(folder.glob(f"{table}-*{BATCH}"))
