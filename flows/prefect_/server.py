"""The Prefect server of a store: `prefect server start` on loopback, one per root, shared by every `opd` command there.

Its database, home and log lie in `<root>/prefect/`. Deleting that folder loses history in the UI and nothing of a run.

Two locks bound its life, so that a SIGKILL anywhere leaves nothing behind: a client (a run, a schedule, `opd ui`) shares
`clients.lock` while it needs the server; the server holds `server.lock` while it lives, and ends itself once nobody shares
`clients.lock`."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from storage.disk import locks
from storage.errors import OpdError

START_SECONDS = 180.0  # the first start runs all migrations: 17 s were measured on 2 idle cores, 5 s later on
STOP_SECONDS = 15.0
PORTS = 3
"""How many further ports are tried, where another program takes the chosen one before the server opens it."""
LOCKED_SECONDS = 10.0
"""How long another program may hold the database before the server's start is given up."""
CHECKOUT = Path(__file__).resolve().parent.parent.parent


class ServerUnavailable(OpdError):
    """The Prefect server could not be started or does not answer; what was seen and where its log is."""


def home_of(root: Path) -> Path:
    """`<root>/prefect`: PREFECT_HOME of everything that runs on this root."""
    return Path(root).resolve() / "prefect"


LIMITS = {"PREFECT_CLIENT_MAX_RETRIES": "1", "PREFECT_API_REQUEST_TIMEOUT": "8"}
"""For a run, which is not held up for Prefect. Prefect's own defaults let a call to a server that hangs take six minutes."""
PATIENT = {"PREFECT_CLIENT_MAX_RETRIES": "3", "PREFECT_API_REQUEST_TIMEOUT": "30"}
"""For a schedule, which is nothing without its server."""


def environment(home: Path | None, patient: bool = False, **more: str) -> dict[str, str]:
    """The environment of a store's server and clients: what the user has set for another Prefect does not reach them.

    Without `home` it is the user's own, for PREFECT_API_URL. Telemetry is off (Prefect has two paths), Prefect prints no log
    lines, and a call that fails is given up after `LIMITS` or, if `patient`, `PATIENT`."""
    kept = {name: value for name, value in os.environ.items() if home is None or not name.startswith("PREFECT_")}
    limits = PATIENT if patient else LIMITS
    quiet = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    if home is not None:
        direct = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), "127.0.0.1", "localhost"]))
        more |= {"PREFECT_HOME": str(home), "NO_PROXY": direct, "no_proxy": direct}
    return limits | kept | quiet | more


@dataclass
class StoreServer:
    """A server that answers, for as long as `store_server` holds it."""

    home: Path
    api_url: str
    inode: int | None
    patience: float = STOP_SECONDS
    """Seconds that the server gets to end by itself."""

    @property
    def ui_url(self) -> str:
        return self.api_url.removesuffix("/api")

    def alive(self) -> bool:
        return locks.holder(self.home / "server.lock") is not None

    def check_database(self) -> None:
        """ServerUnavailable when the database is no longer the file that it was: SQLite goes on writing to one that was
        removed, and all is lost when the server ends."""
        if self.inode is None or _inode(self.home) != self.inode:
            raise ServerUnavailable(f"its database {self.home / 'prefect.db'} was removed or replaced")


@contextmanager
def store_server(
    root: Path, note: Callable[[str], None] = lambda line: None, port: int | None = None
) -> Iterator[StoreServer]:
    """The root's server, started if there is none. The last client stops it and waits for its end, so that no process is
    left when a command returns. Raises ServerUnavailable."""
    home = home_of(root)
    with ExitStack() as client:
        try:
            client.enter_context(locks.shared(home / "clients.lock"))  # waits while an old server ends
            url, process = _found_or_started(home, port, note)
        except OSError as error:
            raise ServerUnavailable(f"Prefect's folder {home} cannot be used: {error}") from error
        server = StoreServer(home, url, _inode(home))
        try:
            yield server
        finally:
            client.close()
            _stop_if_unused(home, server.patience)
            if process is not None and not server.alive():
                process.wait()


def _found_or_started(
    home: Path, port: int | None, note: Callable[[str], None]
) -> tuple[str, subprocess.Popen[bytes] | None]:
    """URL of the server's API, once it answers, and the process if it was started here. Of two processes that are started at
    once, the one that does not get `server.lock` ends."""
    process, log, deadline = None, home / "server.log", time.monotonic() + START_SECONDS
    taken = 0
    try:
        while time.monotonic() < deadline:
            if locks.holder(home / "server.lock") is not None:
                if healthy(url := _url(home)):
                    return url, process
            elif process is None:
                process = _start(home, port, note)
            elif process.poll() is not None:
                text = log.read_text(errors="replace")
                if port is None and "address already in use" in text and taken < PORTS:
                    process, taken = None, taken + 1  # it takes seconds from choosing a free port to opening it
                    continue
                last = "\n".join(text.splitlines()[-12:])
                raise ServerUnavailable(
                    f"the Prefect server ended with code {process.returncode} while starting; its log: {log}\n{last}"
                )
            time.sleep(0.1)
        raise ServerUnavailable(f"the Prefect server did not answer within {START_SECONDS:.0f} s; its log: {log}")
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise


def _start(home: Path, port: int | None, note: Callable[[str], None]) -> subprocess.Popen[bytes]:
    first = not (home / "prefect.db").exists()
    if not first:
        _check_writable(home / "prefect.db")
    note("starting the Prefect server" + (" (its first start in this store takes about 20 seconds)" if first else ""))
    own = environment(
        home,
        # relative to the working directory: as a URL, a root's path would need its `?`, `#` and `%` quoted
        PREFECT_SERVER_DATABASE_CONNECTION_URL="sqlite+aiosqlite:///prefect.db",
        PREFECT_SERVER_API_HOST="127.0.0.1",
        PREFECT_SERVER_API_PORT=str(port or _free_port()),
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="0",  # the server's console is its log file
        PREFECT_SERVER_LOGGING_LEVEL="WARNING",
        PYTHONPATH=os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
    )
    command = [sys.executable, "-P", "-m", "flows.prefect_.server", str(home)]
    with (home / "server.log").open("wb") as log:
        # a session of its own: Ctrl-C reaches the run, the server ends after it
        nothing, out = subprocess.DEVNULL, subprocess.STDOUT
        return subprocess.Popen(
            command, env=own, cwd=home, start_new_session=True, stdin=nothing, stdout=log, stderr=out
        )


def _stop_if_unused(home: Path, patience: float) -> None:
    """End the server unless another client holds it, by force after `patience` seconds."""
    with locks.alone(home / "clients.lock") as unused:
        for number in (signal.SIGTERM, signal.SIGKILL) if unused else ():
            holder, deadline = locks.holder(home / "server.lock"), time.monotonic() + patience
            if holder is None or not holder.pid:
                return
            with suppress(ProcessLookupError):
                os.kill(holder.pid, number)
            while locks.holder(home / "server.lock") is not None and time.monotonic() < deadline:
                time.sleep(0.05)


def healthy(api_url: str) -> bool:
    """Whether `<api_url>/health` answers 200; proxies are not used."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{api_url}/health", timeout=5
        ) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _url(home: Path) -> str:
    """What the living server has written; something that does not answer before it did."""
    with suppress(FileNotFoundError):
        return (home / "server.url").read_text()
    return ""


def _inode(home: Path) -> int | None:
    with suppress(OSError):
        return (home / "prefect.db").stat().st_ino
    return None


def _check_writable(database: Path) -> None:
    """ServerUnavailable when SQLite cannot write to the file: a server would try for a minute."""
    try:
        with closing(sqlite3.connect(database, timeout=LOCKED_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise ServerUnavailable(f"its database {database} cannot be used: {error}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The server's own process


def main(home: Path) -> None:
    """`python -m flows.prefect_.server HOME`: `prefect server start`, bound to the locks. `store_server` starts it."""

    def busy(holder: str) -> None:
        raise SystemExit(f"another Prefect server runs in {home}: {holder}")

    with locks.locked(home / "server.lock", busy):
        (home / "server.url").write_text(f"http://127.0.0.1:{os.environ['PREFECT_SERVER_API_PORT']}/api")
        threading.Thread(target=_end_without_clients, args=(home,), daemon=True).start()
        sys.argv = ["prefect", "server", "start"]
        from prefect.cli import app

        app()


def _end_without_clients(home: Path) -> None:
    """Keeps `clients.lock` until the end: a newcomer waits for it, and starts a fresh server."""
    while True:
        time.sleep(1.0)
        with locks.alone(home / "clients.lock") as unused:
            if unused:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(STOP_SECONDS)
                os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
