"""The scripted engines, one of which starts a family and then hangs, where a file `family` in the store's root names its role.

The family: a child that ignores signals, one in a session of its own, one that lost its parent, and a child of each. All
hold what a fork inherits: the worker's socket and log. `family-ready` then holds their pids and the worker's, in a line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import scripted_engines

from opdflow.plugin import register_role

for role in ("sampler", "scorer", "trainer"):
    register_role(role, f"{__name__}:{role.capitalize()}")


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


class Family:
    def handle(self, job, link):
        root = Path(job.store)
        asked = root / "family"
        if asked.exists() and asked.read_text() == type(self).__name__.lower():
            pids = root / "family-pids"
            fork(with_child(lambda: None, pids))
            fork(with_child(os.setsid, pids))
            orphan(pids)
            while not pids.exists() or len(pids.read_text().split()) < 6:
                time.sleep(0.01)
            found = f"{os.getpid()} {' '.join(pids.read_text().split())}"
            pids.rename(root / "family-known")
            (root / ".family").write_text(found)
            (root / ".family").rename(root / "family-ready")
            time.sleep(600)
        return super().handle(job, link)


class Sampler(Family, scripted_engines.Sampler): ...


class Scorer(Family, scripted_engines.Scorer): ...


class Trainer(Family, scripted_engines.Trainer): ...
