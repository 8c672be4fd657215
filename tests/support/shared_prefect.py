"""One Prefect server for all tests that are not about its start, and a migrated database for those that are about its end."""

from __future__ import annotations

import json
import os
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows.prefect_.server import StoreServer, store_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """The server of a store whose path has what URLs trip over."""
    root = tmp_path_factory.mktemp("a store") / "root #1 qu?ry 50%41"
    with store_server(root) as server:
        assert (root / "prefect" / "prefect.db").exists()
        yield server
    assert not server.alive()


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
