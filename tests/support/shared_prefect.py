"""One Prefect server for all tests that are not about its start, one on PostgreSQL for those that use a server by its URL, and a
migrated database for those that are about its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from postgres import PASSWORD, postgres

from flows.prefect_.server import StoreServer, healthy, store_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """The server of a store whose path has what URLs trip over."""
    root = tmp_path_factory.mktemp("a store") / "root #1 qu?ry 50%41"
    with store_server(root) as server:
        assert (root / "prefect" / "prefect.db").exists()
        yield server
    assert not server.alive()


@contextmanager
def running(command: Sequence[Any], folder: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended as a user would, without this process's settings of Prefect and of the store; what it printed is in
    `folder`/log, and printed at its end."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OPD_"))}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=own | dict(environment), cwd=folder, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
        print((folder / "log").read_text())


@dataclass(frozen=True)
class Api:
    """A server of which a test knows only where it is."""

    api_url: str


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """`prefect server start` as docs/deploy.md has it, on a PostgreSQL server."""
    home = tmp_path_factory.mktemp("on postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    with postgres() as (database, user):
        address = f"postgresql+asyncpg://{user}:{quote(PASSWORD, safe='')}@127.0.0.1:{database}/postgres"
        environment = {
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": address,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        command = [
            Path(sys.executable).parent / "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        with running(command, home, environment) as server:
            eventually(lambda: healthy(url) or server.poll() is not None, 600)
            assert server.poll() is None, (home / "log").read_text()
            yield Api(url)
            assert not list(home.glob("*.db"))


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def by_url(request: pytest.FixtureRequest) -> Api:
    """The shared server, then one on PostgreSQL."""
    return Api(
        request.getfixturevalue({"sqlite": "shared_server", "postgres": "postgres_server"}[request.param]).api_url
    )


@pytest.fixture(scope="session")
def migrated(shared_server: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's folder with a database that has its tables: the first start of a server takes long to make them."""
    home = tmp_path_factory.mktemp("migrated") / "prefect"
    home.mkdir()
    places = (shared_server.home / "prefect.db", home / "prefect.db")
    with closing(sqlite3.connect(places[0])) as source, closing(sqlite3.connect(places[1])) as copy:
        source.backup(copy)
    return home


@pytest.fixture
def no_prefect_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)


def ask(api_url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """A POST to Prefect's API. A server whose database another request holds answers 503, and is asked again, as Prefect's own
    client does."""
    data, headers = json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
    for left in reversed(range(20)):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{api_url}/{path}", data, headers), timeout=30
            ) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code != 503 or not left:
                raise
            time.sleep(0.5)
    raise AssertionError("unreachable")


def eventually(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `what()` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return found
