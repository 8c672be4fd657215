"""The embedded Prefect server of a store: one per root, shared by every `opd` command that runs there.

A real `prefect server start` on a loopback port; its database, home and log lie in `<root>/prefect/`. Nothing of a run is
kept there alone: deleting the folder loses history in the UI and nothing else.

Lifetime without leases, so that a SIGKILL anywhere leaves nothing behind:
- a client (a run, a schedule, `opd ui`) holds `clients.lock` shared for as long as it needs the server;
- the server holds `server.lock` while it lives (so there is one), and ends itself once nobody holds `clients.lock`;
- `start.lock` serialises starting: the second client finds the first one's server and uses it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from storage.errors import OpdError

START_TIMEOUT_SECONDS = 180.0  # the first start runs all migrations: 17 s were measured on 2 idle cores, 5 s later on
STOP_TIMEOUT_SECONDS = 15.0
LOCKED_SECONDS = 10.0
"""How long another program may hold the database before the server's start is given up."""
WATCH_SECONDS = 1.0
CHECKOUT = Path(__file__).resolve().parent.parent.parent


class ServerUnavailable(OpdError):
    """The Prefect server could not be started or does not answer; what was seen and where its log is."""


def home_of(root: Path) -> Path:
    """`<root>/prefect`: PREFECT_HOME of everything that runs on this root."""
    return Path(root).resolve() / "prefect"


def server_environment(home: Path) -> dict[str, str | None]:
    """Settings of the embedded server and its clients; None means: not set.

    The database lies under `home`, telemetry is off, proxies are not used for loopback, and what the user has set for
    another Prefect (a profile, a key, a database) does not reach this one."""
    no_proxy = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1", "localhost"]
    foreign = [name for name in os.environ if name.startswith("PREFECT_") and not name.startswith("PREFECT__")]
    return {
        **dict.fromkeys(foreign),
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        # with the defaults (5, 60 s), every call to a server that died takes a minute, and to one that hangs six
        "PREFECT_CLIENT_MAX_RETRIES": "1",
        "PREFECT_API_REQUEST_TIMEOUT": "10",
        **quiet_environment(),
        "NO_PROXY": ",".join(filter(None, no_proxy)),
        "no_proxy": ",".join(filter(None, no_proxy)),
    }


def quiet_environment() -> dict[str, str]:
    """Telemetry off (Prefect has two paths) and no Prefect log lines in the terminal; logs still reach the Prefect API."""
    return {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_CLI_PROMPT": "false",
    }


def healthy(api_url: str, timeout: float = 5.0) -> bool:
    """Whether `<api_url>/health` answers 200; proxies are not used."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{api_url.rstrip('/')}/health", timeout=timeout) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


class EmbeddedServer:
    """One client's hold on the root's server: `ensure()` takes it, starting the server if need be, `release()` ends it.

    The last client to release stops the server and waits for its end, so no process is left when a command returns.
    """

    def __init__(self, root: Path, log: Callable[[str], None] = lambda line: None) -> None:
        self.home = home_of(root)
        self.log = log
        self.api_url: str | None = None
        self._clients_fd: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._database: tuple[int, int] | None = None

    @property
    def ui_url(self) -> str | None:
        """Address for a browser, once `ensure()` returned."""
        return None if self.api_url is None else self.api_url.removesuffix("/api")

    @property
    def port(self) -> int | None:
        """The server's port, once `ensure()` returned."""
        return None if self.api_url is None else urllib.parse.urlsplit(self.api_url).port

    @property
    def log_path(self) -> Path:
        """The server's own output, one file per start."""
        return self.home / "server.log"

    def ensure(self, port: int | None = None) -> str:
        """API URL of a server that answers. Raises ServerUnavailable (the hold is given back then)."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with _locked(
                self.home / "start.lock", fcntl.LOCK_EX, START_TIMEOUT_SECONDS, "another start of the Prefect server"
            ):
                self._clients_fd = _lock(
                    self.home / "clients.lock", fcntl.LOCK_SH, STOP_TIMEOUT_SECONDS, "the old Prefect server to end"
                )
                self.api_url = self._find() or self._start(port)
                self._database = self._identity()
        except ServerUnavailable:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise ServerUnavailable(f"Prefect's folder {self.home} cannot be used: {error}") from error
        except BaseException:
            self.release()
            raise
        return self.api_url

    def alive(self) -> bool:
        """Whether the server process still lives (its lock is held)."""
        return _held(self.home / "server.lock")

    def check_database(self) -> None:
        """ServerUnavailable when the database is not the file any more that it was: SQLite goes on writing to one that was
        removed, and all is lost when the server ends."""
        if self._database is None or self._identity() != self._database:
            raise ServerUnavailable(f"its database {self.home / 'prefect.db'} was removed or replaced")

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = (self.home / "prefect.db").stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def release(self, patience: float = STOP_TIMEOUT_SECONDS) -> None:
        """Give the hold back; stop the server if nobody else holds it, by force after `patience` seconds. Safe to call twice."""
        fd, self._clients_fd, self.api_url = self._clients_fd, None, None
        if fd is None:
            return
        try:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another client holds the server
                self._stop(patience)
        finally:
            os.close(fd)
            if self._process is not None:
                self._process.poll()

    def _find(self) -> str | None:
        """URL of the root's living server, waiting for it to answer; None if there is none."""
        if not self.alive():
            return None
        record, deadline = None, time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            record = _read_record(self.home)
            if record and healthy(str(record["api_url"])):
                return str(record["api_url"])
            if not self.alive():
                return None
            time.sleep(0.2)
        pid = (record or {}).get("pid", "?")
        raise ServerUnavailable(f"the Prefect server (pid {pid}) lives but does not answer; its log: {self.log_path}")

    def _start(self, port: int | None) -> str:
        first = not (self.home / "prefect.db").exists()
        if not first:
            _check_writable(self.home / "prefect.db")
        self.log(
            "starting the Prefect server" + (" (its first start in this store takes about 20 seconds)" if first else "")
        )
        for attempt in range(3):  # another process may take the free port first
            chosen = port or _free_port()
            url = f"http://127.0.0.1:{chosen}/api"
            try:
                self._launch(chosen, url)
                return url
            except ServerUnavailable as error:
                if port or attempt == 2 or "in use" not in str(error):
                    raise
        raise AssertionError("unreachable")

    def _launch(self, port: int, url: str) -> None:
        settings = server_environment(self.home) | {
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "0",  # the server's console is its log file
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            "PREFECT_UI_API_URL": url,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        }
        environment = {name: value for name, value in (os.environ | settings).items() if value is not None}
        with self.log_path.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.prefect_.server", str(self.home), str(port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal reaches the run first; the server ends after it
            )
        self._process = process
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        try:
            while not healthy(url):
                if process.poll() is not None:
                    raise ServerUnavailable(
                        f"the Prefect server ended with code {process.returncode} while starting; its log:"
                        f" {self.log_path}\n{_tail(self.log_path)}"
                    )
                if time.monotonic() > deadline:
                    raise ServerUnavailable(
                        f"the Prefect server did not answer within {START_TIMEOUT_SECONDS:.0f} s; its log: {self.log_path}"
                    )
                time.sleep(0.1)
        except BaseException:
            _end(process)
            raise

    def _stop(self, patience: float) -> None:
        """End the server; called with `clients.lock` held exclusively, so nobody needs it and nobody can join."""
        record = _read_record(self.home)
        if record is None or not self.alive():
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.kill(int(record["pid"]), number)
            deadline = time.monotonic() + patience
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.05)
            if not self.alive():
                break
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)


# Locks


def _lock(path: Path, kind: int, timeout: float, what: str) -> int:
    """File descriptor holding `kind` on `path`; waits up to `timeout` seconds, then raises ServerUnavailable."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServerUnavailable(f"waited {timeout:.0f} s for {what} ({path})") from None
                time.sleep(0.05)
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def _locked(path: Path, kind: int, timeout: float, what: str) -> Iterator[None]:
    fd = _lock(path, kind, timeout, what)
    try:
        yield
    finally:
        os.close(fd)


def _held(path: Path) -> bool:
    """Whether some process holds `path` exclusively. The probe asks for a shared lock, so probes do not disturb one another."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _read_record(home: Path) -> dict[str, object] | None:
    try:
        return json.loads((home / "server.json").read_text())
    except (FileNotFoundError, ValueError):
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
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(path: Path, lines: int = 12) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(unreadable: {error})"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# The server's own process


def _watch_clients(home: Path) -> None:
    """End this process once no client is left. The exclusive lock is kept until the end: a newcomer waits for it, and
    starts a fresh server."""
    fd = os.open(home / "clients.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    while True:
        time.sleep(WATCH_SECONDS)
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(STOP_TIMEOUT_SECONDS)
            os._exit(1)


def main(arguments: list[str]) -> None:
    """`python -m flows.prefect_.server HOME PORT`: `prefect server start`, bound to the locks. EmbeddedServer starts it."""
    home, port = Path(arguments[0]), int(arguments[1])
    lock = _lock(home / "server.lock", fcntl.LOCK_EX, 5.0, "the old Prefect server to end")
    temporary = home / f"server.json.{os.getpid()}"
    temporary.write_text(json.dumps({"api_url": f"http://127.0.0.1:{port}/api", "pid": os.getpid()}))
    os.replace(temporary, home / "server.json")
    threading.Thread(target=_watch_clients, args=(home,), daemon=True).start()
    sys.argv = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    try:
        from prefect.cli import app

        app()
    finally:
        os.close(lock)


if __name__ == "__main__":
    main(sys.argv[1:])
