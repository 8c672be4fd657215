"""flock locks that record their holder. The kernel releases them when the holder dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from storage.disk.failpoints import failpoint
from storage.disk.files import temporary_name, utc_now
from storage.disk.redact import redact
from storage.errors import StoreError

_POLL_SECONDS = 0.1
_ATTEMPTS = 5  # a probe holds the lock for microseconds: retry before reporting a holder
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

_held: dict[int, tuple[str, int]] = {}  # descriptor -> (path, thread)


def build_lock(root: Path, stage: str, key: str) -> Path:
    """Held by the builder of the artifact."""
    return root / "locks" / f"{stage}-{key}.lock"


def use_lock(root: Path, stage: str, key: str) -> Path:
    """Shared by readers that need the artifact's data; `opd gc` takes it exclusively."""
    return root / "locks" / f"{stage}-{key}.use"


class Holder(BaseModel):
    """The process that holds a lock."""

    pid: int
    host: str
    command: str
    since: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} ({self.command}), since {self.since}"


def _myself() -> Holder:
    command = shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    return Holder(pid=os.getpid(), host=socket.gethostname(), command=redact(command)[:200], since=utc_now())


def _forget_in_child() -> None:
    # A forked child shares the parent's lock; closing its copies leaves the lock with the parent alone.
    for descriptor in list(_held):
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _try(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise
    return True


def _read_holder(path: Path) -> Holder | None:
    try:
        return Holder.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None


def describe(path: Path) -> str:
    """The holder as text; "another process" until it has written its record."""
    return str(_read_holder(path) or "another process")


def holder(path: Path) -> Holder | None:
    """The process that holds the lock now, or None. The record of a killed holder is ignored."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if _try(descriptor, fcntl.LOCK_SH):
            return None
        return _read_holder(path) or Holder(pid=0, host="unknown host", command="unknown command", since="just now")
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, on_busy: Callable[[str], None]) -> Iterator[None]:
    """Holds the exclusive lock `path`. If another process holds it, `on_busy` is called once with the holder's description; it
    raises to give up, or returns to wait."""
    thread = threading.get_ident()
    if any(held == (str(path), thread) for held in list(_held.values())):
        raise StoreError(f"{path}: this thread already holds this lock and would wait for itself")
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = os.getpid()
    failpoint("lock.before")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _wait(descriptor, path, on_busy)
        _held[descriptor] = (str(path), thread)
        failpoint("lock.held", path)
        with suppress(OSError):  # on a full disk the record is lost, not the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _myself().model_dump_json().encode(), 0)
        failpoint("lock.named", path)
        yield
        failpoint("lock.before_release", path)
    finally:
        if os.getpid() == owner:  # a forked child has already closed its copy
            if _held.pop(descriptor, None):
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
            os.close(descriptor)


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Holds the lock `path` shared; blocks while another process holds it exclusively."""
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Holds the lock `path` exclusively and yields True, or yields False at once if another process holds or shares it."""
    with _opened(path) as descriptor:
        yield _try(descriptor, fcntl.LOCK_EX)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = os.getpid()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held[descriptor] = (f"{path} (shared)", threading.get_ident())
    try:
        yield descriptor
    finally:
        if os.getpid() == owner:  # a forked child has already closed its copy
            _held.pop(descriptor, None)
            os.close(descriptor)


def _wait(descriptor: int, path: Path, on_busy: Callable[[str], None]) -> None:
    attempts, reported = 0, False
    while not _try(descriptor, fcntl.LOCK_EX):
        if _try(descriptor, fcntl.LOCK_SH):  # not held: another process was only probing for the holder
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        else:
            attempts += 1
        if attempts >= _ATTEMPTS and not reported:
            reported = True
            on_busy(describe(path))
        time.sleep(_POLL_SECONDS if reported else 0.02)


def probe(directory: Path) -> None:
    """Raises StoreError unless flock and hard links work in `directory` (some network mounts lack them)."""
    name = directory / temporary_name("probe")
    link = name.with_name(name.name + "-link")
    try:
        first = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"{directory}: cannot be written ({error.strerror}); choose another root") from error
    try:
        second = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not _try(first, fcntl.LOCK_EX) or _try(second, fcntl.LOCK_EX):
                raise StoreError(f"{directory}: file locks do not exclude on this file system; choose another root")
        finally:
            os.close(second)
        os.link(name, link)
    except OSError as error:
        raise StoreError(
            f"{directory}: file locks or hard links do not work on this file system ({error.strerror}); choose another"
            " root"
        ) from error
    finally:
        os.close(first)
        name.unlink(missing_ok=True)
        link.unlink(missing_ok=True)
