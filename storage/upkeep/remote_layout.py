"""What a store has at a remote, for `push`, `pull` and queries of it.

`opd-store.json` marks the folder. `artifacts/<stage>/<key>/` is as in a store: data files, then `manifest.json`. `runs/<name>/`
has the run's records and `artifacts.json`, which lists what they need; `state.json` comes last, so that a run which is there is
whole. Committed artifacts are never replaced by others; nothing is removed. Logs, studies and
users' own model folders are not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import TypeVar

from storage.artifacts.artifact import MANIFEST, Manifest, read_manifest
from storage.disk.files import TEMPORARY, seal, unsealed
from storage.disk.remote import Moved, Remote, RemoteError
from storage.errors import CorruptArtifact, InputError, StoreError, did_you_mean
from storage.runs import RECORDS, RUN_NAME, RunState, read_records

MARKER = "opd-store.json"
LISTED = "artifacts.json"
FORMAT = 1
TRANSFERS = 8
"""Files that are moved at the same time."""
_MARK = {"store": "opdflow", "format": FORMAT}
_STATE = RECORDS[-1]
Name = tuple[str, str]
"""Stage and key of an artifact."""
T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """An artifact that a run at the remote needs."""

    content: dict[str, str]
    evicted: bool
    files: int
    bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> Listed:
        """The entry of a manifest."""
        sizes = [file.bytes for file in manifest.own_files()]
        return cls(dict(manifest.artifact.content), manifest.evicted is not None, len(sizes), sum(sizes))


@dataclass(frozen=True)
class RemoteRun:
    """A run at the remote: its records by file name, what is in them, and what it needs."""

    name: str
    files: dict[str, bytes]
    state: RunState
    identity: dict[str, object]
    listed: dict[Name, Listed]


@dataclass
class Plan:
    """What is to be moved, known before anything is."""

    runs: list[str] = field(default_factory=list)
    """Runs whose records are written."""
    artifacts: dict[Name, Listed] = field(default_factory=dict)
    """Those to move, with the files and bytes that they have; what of them is there already shows during the transfer."""
    present: int = 0
    """Artifacts that are there already."""
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Runs that are running -> who holds them."""

    @property
    def files(self) -> int:
        return sum(entry.files for entry in self.artifacts.values())

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.artifacts.values())


def folder_of(name: Name) -> str:
    """An artifact's folder at the remote."""
    return f"artifacts/{name[0]}/{name[1]}"


def require_store(remote: Remote) -> None:
    """RemoteError unless the remote holds a store of a format that this program reads."""
    data = remote.read(MARKER)
    if data is None:
        raise RemoteError(f"{remote}: no store is there ({MARKER} is missing); `opd push` makes one")
    _check_mark(remote, data)


def marked(remote: Remote) -> bool:
    """Whether the remote holds a store; False where it is empty. RemoteError where it holds anything else."""
    data = remote.read(MARKER)
    if data is not None:
        _check_mark(remote, data)
        return True
    others = [name for name in remote.names() if not name.startswith(TEMPORARY)]
    if others:
        raise RemoteError(
            f"{remote}: has other files ({', '.join(others[:3])}{', ...' if others[3:] else ''}) and no {MARKER}; give an empty"
            " folder or prefix, or one that `opd push` made"
        )
    return False


def mark(remote: Remote) -> None:
    """Makes an empty remote a store's."""
    remote.create(MARKER, seal(dict(_MARK)))


def _check_mark(remote: Remote, data: bytes) -> None:
    try:
        content = unsealed(MARKER, data)
    except CorruptArtifact as error:
        raise RemoteError(f"{remote}: another store format: {error}") from error
    found = content.get("format")
    if content.get("store") != _MARK["store"] or not isinstance(found, int):
        raise RemoteError(f"{remote}: another store format: {MARKER} is not one of this program")
    if found > FORMAT:
        raise RemoteError(f"{remote}: store format {found} is newer than this program's {FORMAT}; update the program")


def manifest_at(remote: Remote, name: Name) -> Manifest | None:
    """An artifact's manifest at the remote; None where it is not committed there. RemoteError if it is damaged or newer."""
    where = f"{folder_of(name)}/{MANIFEST}"
    data = remote.read(where)
    if data is None:
        return None
    try:
        return read_manifest(data, f"{remote}/{where}", name)
    except (CorruptArtifact, StoreError) as error:
        raise RemoteError(str(error)) from error


def require_same(ours: Mapping[str, str], theirs: Mapping[str, str], where: str, instead: str) -> None:
    """RemoteError, which begins with `where` and ends with `instead`, unless an artifact has the same content on both sides."""
    if ours != theirs:
        what = ", ".join(sorted(part for part in ours.keys() | theirs.keys() if ours.get(part) != theirs.get(part)))
        raise RemoteError(f"{where} ({what}), and a committed artifact is never replaced; {instead}")


def run_names(remote: Remote) -> list[str]:
    """Names under which there are runs, whole or not."""
    return [name for name in remote.names("runs") if RUN_NAME.fullmatch(name)]


def run_at(remote: Remote, name: str) -> RemoteRun | None:
    """A run at the remote; None where there is none, or where its push has not ended. RemoteError if its records are damaged."""
    where = f"runs/{name}"
    if (state := remote.read(f"{where}/{_STATE}")) is None:
        return None
    others = {file: remote.read(f"{where}/{file}") for file in (*RECORDS[:-1], LISTED)}
    files = {file: data for file, data in others.items() if data is not None} | {_STATE: state}
    try:
        listed = unsealed(f"{remote}/{where}/{LISTED}", files.pop(LISTED, b""))["artifacts"]
        known = {(stage, key): Listed(*entry) for stage, key, *entry in listed}
        return RemoteRun(name, files, *read_records(name, files, f"{remote}/{where}"), known)
    except (CorruptArtifact, KeyError, TypeError, ValueError) as error:
        raise RemoteError(
            f"{remote}/{where}: the records of the run are damaged ({str(error).splitlines()[0]}); push it again"
        ) from error


def require_run(remote: Remote, name: str) -> RemoteRun:
    """The same. InputError, with the nearest name, where there is none."""
    found = run_at(remote, name) if RUN_NAME.fullmatch(name) else None
    if found is None:
        names = run_names(remote)
        hint = did_you_mean(name, names, f"runs: {', '.join(names[:20]) or 'none'}")
        raise InputError(f"no run {name!r} at {remote}; {hint}")
    return found


def listing(artifacts: Mapping[Name, Listed]) -> bytes:
    """The bytes of a run's `artifacts.json`."""
    rows = [[*name, e.content, e.evicted, e.files, e.bytes] for name, e in sorted(artifacts.items())]
    return seal(json.loads(json.dumps({"artifacts": rows})))


class _StoppedError(Exception):
    """Another transfer has failed, or the user has stopped them all."""


class Lanes:
    """A few transfers at the same time. The first that fails ends the others at their next block, and is raised."""

    def __init__(self, transfers: int, moved: Moved) -> None:
        self._stop, self._lock, self._moved = Event(), Lock(), moved
        self._failure: BaseException | None = None
        self._files = ThreadPoolExecutor(transfers, "transfer")
        self._artifacts = ThreadPoolExecutor(transfers, "artifact")
        self._window = 4 * transfers

    def moved(self, size: int) -> None:
        """Count the bytes of a block."""
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._moved(size)

    def artifacts(self, do: Callable[[T], None], items: Iterable[T]) -> None:
        """Do it for each artifact; it may call `files`."""
        self._each(self._artifacts, do, items)

    def files(self, do: Callable[[T], None], items: Iterable[T]) -> None:
        """Do it for each file of an artifact."""
        self._each(self._files, do, items)

    def close(self) -> None:
        """Ends the threads."""
        self._stop.set()
        self._artifacts.shutdown()
        self._files.shutdown()

    def _each(self, pool: ThreadPoolExecutor, do: Callable[[T], None], items: Iterable[T]) -> None:
        def guarded(item: T) -> None:
            if self._stop.is_set():
                raise _StoppedError
            try:
                do(item)
            except BaseException as error:
                with self._lock:
                    if not isinstance(error, _StoppedError):
                        self._failure = self._failure or error
                self._stop.set()
                raise

        waiting: set[Future[None]] = set()
        try:
            for item in items:
                if len(waiting) >= self._window:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                waiting.add(pool.submit(guarded, item))
            for future in waiting:
                future.result()
        except BaseException as error:
            self._stop.set()
            for future in waiting:
                future.cancel()
            wait(waiting)
            if isinstance(error, Exception) and self._failure is not None:
                raise self._failure from None
            raise
