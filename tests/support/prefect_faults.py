"""Faults of Prefect around a scripted run (`stopping`): its server dies or hangs, its database is locked, lost, damaged."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from stopping import PATIENCE, StoppedRun

from flows.prefect_server import home_of
from storage import failpoints


class ReportedRun(StoppedRun):
    """A run that reports to Prefect, and can be held at a failpoint."""

    @property
    def home(self) -> Path:
        return home_of(self.root)

    @property
    def database(self) -> Path:
        return self.home / "prefect.db"

    def server(self) -> psutil.Process:
        """The store's own server, by the tree of processes."""
        (found,) = [p for p in self.processes() if "flows.prefect_server" in p.cmdline()]
        return found

    def begin_until(self, moment: str) -> Any:
        """Starts the run and returns when it stands still at a moment: NAME@HIT of a failpoint."""
        name, _, hit = moment.partition("@")
        spec = f"{name}=wait:{self.folder / 'go'}@{hit}"
        process = self.begin(prefect=True, **{failpoints.SPEC: spec, failpoints.LOG: str(self.folder / "hits")})
        deadline = time.monotonic() + PATIENCE
        while self.hits().count(name) < int(hit):
            assert process.is_alive() and time.monotonic() < deadline, self.output
            time.sleep(0.01)
        return process

    def go_on(self) -> None:
        (self.folder / "go").touch()


def kill(run: ReportedRun) -> None:
    """SIGKILL to the server."""
    os.kill(run.server().pid, signal.SIGKILL)


def freeze(run: ReportedRun) -> None:
    """The server does not answer any more."""
    os.kill(run.server().pid, signal.SIGSTOP)


def remove(run: ReportedRun) -> None:
    for path in run.home.glob("prefect.db*"):
        path.unlink()


def spoil(run: ReportedRun) -> None:
    """Zeros over the first pages, as the server looks on."""
    for path in run.home.glob("prefect.db*"):
        with path.open("r+b") as file:
            file.write(bytes(min(64 * 4096, path.stat().st_size)))


@contextmanager
def locked(run: ReportedRun) -> Iterator[None]:
    """Another connection writes to the database and does not end."""
    with contextlib.closing(sqlite3.connect(run.database, isolation_level=None, timeout=30)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
