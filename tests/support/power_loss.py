"""What a power cut can leave: the file-system calls of a piece of code, recorded, and every disk they could have left behind.

The model is POSIX's, read strictly. A file's bytes last from its fsync on; a directory's entries (names made, renamed, linked,
removed) last from the directory's fsync on. What is not fsynced may last or not: names may be there while the bytes of
their files are not. A rename is one change: never half of it is seen."""

from __future__ import annotations

import builtins
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

Entries = dict[str, int]
"""Name -> node."""


@dataclass
class Disk:
    """A disk's state: what is visible, what lasts, and the changes of names that may or may not last."""

    entries: dict[int, Entries] = field(default_factory=dict)
    """Directory -> its entries as they are on the disk for certain."""
    data: dict[int, bytes] = field(default_factory=dict)
    """File -> its bytes that are on the disk for certain."""
    pending: list[tuple[int, Entries, tuple[str, ...]]] = field(default_factory=list)
    """(directory, names set, names removed), in order; one for a rename within a directory."""
    visible: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Disk:
        return Disk(
            {node: dict(names) for node, names in self.entries.items()},
            dict(self.data),
            list(self.pending),
            dict(self.visible),
        )


class Recorder:
    """Watches one directory. `states[i]` is the disk after the i-th call."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.states: list[Disk] = []
        self.calls: list[str] = []
        self._nodes: dict[int, int] = {}  # inode -> node, as long as the inode lives: inodes are used again
        self._next = 0
        self._seen: tuple[dict[int, Entries], dict[int, bytes]] = ({}, {})
        self.disk = Disk()
        self.top = 0
        self._looking = False

    def begin(self) -> None:
        """Everything that is there now is on the disk."""
        entries, data = self._look()
        self.top = self._nodes[self.root.stat().st_ino]
        self.disk = Disk({n: dict(names) for n, names in entries.items()}, dict(data), [], dict(data))
        self._seen = (entries, data)
        self._note("begin")

    def _look(self) -> tuple[dict[int, Entries], dict[int, bytes]]:
        entries: dict[int, Entries] = {}
        data: dict[int, bytes] = {}
        live: set[int] = set()

        def node(path: Path) -> int:
            inode = path.stat().st_ino
            live.add(inode)
            if inode not in self._nodes:
                self._next += 1
                self._nodes[inode] = self._next
            return self._nodes[inode]

        for folder, names, files in os.walk(self.root):
            here = Path(folder)
            entries[node(here)] = {name: node(here / name) for name in (*names, *files)}
            for name in files:
                data[node(here / name)] = (here / name).read_bytes()
        for inode in self._nodes.keys() - live:
            del self._nodes[inode]
        return entries, data

    def after(self, call: str) -> None:
        """Finds out what a call has changed."""
        if self._looking:
            return
        self._looking = True
        try:
            entries, data = self._look()
        finally:
            self._looking = False
        before, _ = self._seen
        for directory, names in entries.items():
            old = before.get(directory, {})
            made = {name: node for name, node in names.items() if old.get(name) != node}
            gone = tuple(name for name in old if name not in names)
            if made or gone:
                self.disk.pending.append((directory, made, gone))
        self.disk.visible.update(data)
        self._seen = (entries, data)
        self._note(call)

    def synced(self, descriptor: int) -> None:
        """An fsync of a file or directory under the root."""
        inode = os.fstat(descriptor).st_ino
        self.after("(before fsync)")
        node = self._nodes.get(inode)
        entries, data = self._seen
        if node in entries:
            self.disk.entries[node] = dict(entries[node])
            self.disk.pending = [change for change in self.disk.pending if change[0] != node]
        elif node in data:
            self.disk.data[node] = data[node]
        self._note(f"fsync {node}")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.states.append(self.disk.copy())


@contextmanager
def recording(root: Path) -> Iterator[Recorder]:
    """Records every call of this process that changes files below `root`."""
    recorder = Recorder(root)
    recorder.begin()
    changed: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, make(getattr(owner, name)))

    def noting(label: str) -> Callable[[Any], Any]:
        def make(real: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                result = real(*arguments, **named)
                recorder.after(label)
                return result

            return call

        return make

    def fsync(real: Any) -> Any:
        def call(descriptor: int) -> None:
            real(descriptor)
            recorder.synced(descriptor)

        return call

    for name in ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir"):
        patch(os, name, noting(name))
    patch(os, "fsync", fsync)
    patch(builtins, "open", noting("open"))
    patch(io, "open", noting("open"))
    patch(pq, "write_table", noting("write_table"))
    try:
        yield recorder
        recorder.after("end")
    finally:
        for owner, name, real in reversed(changed):
            setattr(owner, name, real)


def disks_after(recorder: Recorder, call: int, draw: random.Random, subsets: int = 4) -> Iterator[tuple[str, Disk]]:
    """Disks that a power cut right after a call can leave: (what was lost, disk)."""
    state = recorder.states[call]
    yield "all that was not fsynced is lost", _with(state, [], lambda data: b"")
    every = list(range(len(state.pending)))
    yield "names last, bytes that were not fsynced are lost", _with(state, every, lambda data: b"")
    yield "names last, of bytes that were not fsynced half", _with(state, every, lambda data: data[: len(data) // 2])
    for _ in range(subsets if every else 0):
        chosen = [index for index in every if draw.random() < 0.5]
        yield f"of the changes of names {chosen} of {len(every)} last", _with(state, chosen, lambda data: b"")


def _with(state: Disk, chosen: list[int], torn: Callable[[bytes], bytes]) -> Disk:
    disk = state.copy()
    for index in chosen:
        directory, made, gone = state.pending[index]
        names = disk.entries.setdefault(directory, {})
        for name in gone:
            names.pop(name, None)
        names.update(made)
    for node, data in state.visible.items():
        disk.data.setdefault(node, torn(data))
    return disk


def restore(disk: Disk, top: int, folder: Path) -> None:
    """Writes a disk's files into a new folder. Files with two names are linked."""
    written: dict[int, Path] = {}

    def write(node: int, path: Path) -> None:
        if node in disk.visible or node in disk.data:
            if node in written:
                os.link(written[node], path)
                return
            path.write_bytes(disk.data.get(node, b""))
            written[node] = path
            return
        path.mkdir()
        for name, child in disk.entries.get(node, {}).items():
            write(child, path / name)

    write(top, folder)
