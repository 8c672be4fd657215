"""The store's own Prefect server: shared by the commands on a root, ended with the last of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKOUT
from shared_prefect import ask

from flows.prefect_ import server
from flows.prefect_.server import ServerUnavailable, StoreServer, store_server
from flows.prefect_.session import prefect_session

TAKEN = "[Errno 98] error while attempting to bind on address ('127.0.0.1', 44351): address already in use"


def test_a_second_command_uses_the_same_server_and_a_killed_one_leaves_it_to_the_first(
    shared_server: StoreServer,
) -> None:
    root = shared_server.home.parent
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom flows.prefect_.server import store_server\n"
        "with store_server(Path(sys.argv[1])) as server:\n"
        "    print(server.api_url, flush=True)\n    os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(root)], cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL
    assert result.stdout.strip() == shared_server.api_url
    with store_server(root) as again:
        assert again.api_url == shared_server.api_url
    assert shared_server.alive()


def test_its_database_is_where_the_root_is(shared_server: StoreServer) -> None:
    """Whatever characters the root's path has; nothing is made beside it."""
    root = shared_server.home.parent
    assert {"?", "#", "%"} <= set(root.name)
    assert [path.name for path in root.parent.iterdir()] == [root.name]
    shared_server.check_database()
    assert ask(shared_server.api_url, "flow_runs/count") >= 0


def test_a_database_that_cannot_be_used_costs_a_warning_only(tmp_path: Path, no_prefect_of_the_users: None) -> None:
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "prefect.db").write_bytes(b"this is no database" * 1000)
    lines: list[str] = []
    with prefect_session(tmp_path, warn=lines.append) as broken:
        assert not broken.active
    text = "\n".join(lines)
    assert "without Prefect" in text and str(tmp_path / "prefect") in text


@pytest.mark.parametrize(
    ("port", "said", "starts"), [(None, TAKEN, 1 + server.PORTS), (4200, TAKEN, 1), (None, "a bug", 1)]
)
def test_a_port_that_is_taken_meanwhile_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int | None, said: str, starts: int
) -> None:
    """With a program in the server's place: a real one takes many seconds to find out."""
    begun = list[int | None]()

    def start(home: Path, port: int | None, note: object) -> subprocess.Popen[bytes]:
        begun.append(port)
        (home / "server.log").write_text(said)
        return subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(server, "_start", start)
    with pytest.raises(ServerUnavailable, match="code 3 while starting"), store_server(tmp_path, port=port):
        pass
    assert begun == [port] * starts


def test_an_api_url_that_does_not_answer_costs_a_warning_only(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    lines: list[str] = []
    with prefect_session(tmp_path, warn=lines.append) as broken:
        assert not broken.active
        assert os.environ["PREFECT_CLIENT_MAX_RETRIES"] == "0"  # the user's own counts
    assert "PREFECT_API_URL=http://127.0.0.1:9/api" in lines[0]
    assert not (tmp_path / "prefect").exists()
