"""Processes that a worker may leave behind: a child that ignores signals, one in a session of its own, one that lost its parent,
and a child of each. All hold what a fork inherits: the worker's socket and log."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def fork(body) -> int:
    """A child that runs `body`, then waits for ever."""
    pid = os.fork()
    if pid == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            body()
            while True:
                time.sleep(600)
        finally:
            os._exit(1)
    return pid


def with_child(before, ready: Path):
    def body() -> None:
        before()
        child = fork(lambda: None)
        with ready.open("a") as file:
            file.write(f"{os.getpid()} {child}\n")

    return body


def orphan(ready: Path) -> None:
    """A grandchild in its own session whose parent ends."""
    pid = fork(lambda: (fork(with_child(os.setsid, ready)), os._exit(0)))
    os.waitpid(pid, 0)


def start_family(folder: Path, worker: int) -> None:
    """Starts them. `family-ready` in the folder then holds the pid of the worker and theirs, in a line."""
    pids = folder / "family-pids"
    fork(with_child(lambda: None, pids))
    fork(with_child(os.setsid, pids))
    orphan(pids)
    while not pids.exists() or len(pids.read_text().split()) < 6:
        time.sleep(0.01)
    found = f"{worker} {' '.join(pids.read_text().split())}"
    pids.rename(folder / "family-known")
    (folder / ".family").write_text(found)
    (folder / ".family").rename(folder / "family-ready")
