"""Faults of Prefect around a scripted run (`stopping`): its server dies or hangs, its database is locked, lost, damaged."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
from stopping import PATIENCE, StoppedRun

from flows.prefect_.server import home_of, store_server
from storage.disk import failpoints, locks


class ReportedRun(StoppedRun):
    """A run that reports to Prefect and can be held at a failpoint."""

    @property
    def home(self) -> Path:
        return home_of(self.root)

    def servers(self) -> list[psutil.Process]:
        """The store's own server, by the tree of processes."""
        return [process for process in self.processes() if "flows.prefect_.server" in process.cmdline()]

    def begin_until(self, moment: str, prefect: bool = True, **environment: str) -> Any:
        """Starts the run and returns when it stands still at a moment, NAME@HIT of a failpoint."""
        name, _, hit = moment.partition("@")
        environment |= {failpoints.SPEC: f"{name}=wait:{self.folder / 'go'}@{hit}"}
        environment |= {failpoints.LOG: str(self.folder / "hits")}
        process = self.begin(prefect=prefect, **environment)
        deadline = time.monotonic() + PATIENCE
        while self.hits().count(name) < int(hit):
            assert process.is_alive() and time.monotonic() < deadline, self.output
            time.sleep(0.01)
        return process

    def go_on(self) -> None:
        (self.folder / "go").touch()

    def warnings(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("warning:")]


def _signalled(number: int) -> Callable[[ReportedRun], Any]:
    @contextmanager
    def fault(run: ReportedRun) -> Iterator[None]:
        (server,) = run.servers()
        os.kill(server.pid, number)
        yield

    return fault


@contextmanager
def locked(run: ReportedRun) -> Iterator[None]:
    """Another connection writes to the database and does not end."""
    with closing(sqlite3.connect(run.home / "prefect.db", isolation_level=None, timeout=30)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def removed(run: ReportedRun) -> Iterator[None]:
    for path in run.home.glob("prefect.db*"):
        path.unlink()
    yield


@contextmanager
def spoilt(run: ReportedRun) -> Iterator[None]:
    """Zeros over its first pages."""
    for path in run.home.glob("prefect.db*"):
        with path.open("r+b") as file:
            file.write(bytes(min(64 * 4096, path.stat().st_size)))
    yield


@contextmanager
def no_folder(run: ReportedRun) -> Iterator[None]:
    """A file stands where the folder belongs (root may write into every folder)."""
    for path in run.home.glob("*"):
        path.unlink()
    if run.home.exists():
        run.home.rmdir()
    run.home.write_text("")
    yield


@contextmanager
def no_database(run: ReportedRun) -> Iterator[None]:
    """A folder stands where the database belongs."""
    with removed(run):
        (run.home / "prefect.db").mkdir(parents=True)
        yield


@contextmanager
def newer(run: ReportedRun) -> Iterator[None]:
    """A database that this version cannot bring up to date, as after a newer Prefect."""
    with closing(sqlite3.connect(run.home / "prefect.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of-a-later-version'")
    yield


MID_RUN: dict[str, Callable[[ReportedRun], Any]] = {
    "killed": _signalled(signal.SIGKILL),
    "frozen": _signalled(signal.SIGSTOP),
    "locked": locked,
    "removed": removed,
    "spoilt": spoilt,
}
"""What happens to the store's own server or its database in the middle of a round."""
BEFORE: dict[str, Callable[[ReportedRun], Any]] = {
    "locked": locked,
    "spoilt": spoilt,
    "no-folder": no_folder,
    "no-database": no_database,
    "newer": newer,
}
"""What is the matter before the run begins."""


class Elsewhere:
    """A Prefect server that is not the store's: PREFECT_API_URL."""

    def __init__(self, folder: Path) -> None:
        self._held = ExitStack()
        self.server = self._held.enter_context(store_server(folder))
        self.server.patience = 1.0
        self.url = self.server.api_url
        holder = locks.holder(self.server.home / "server.lock")
        assert holder is not None
        self.pid = holder.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self._held.close()
