"""A schedule against a real Prefect server: consecutive rounds, none doubled, the student of `opd run`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from opd_cli import OPD, opd
from places import TINY


@pytest.fixture
def prefect_server(tmp_path: Path) -> Iterator[str]:
    """A `prefect server` of the test's own, on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "prefect"
    env = dict(os.environ) | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).read()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def flow_runs(url: str) -> list[dict]:
    request = urllib.request.Request(
        f"{url}/flow_runs/filter", data=b'{"limit": 200}', headers={"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=10).read())


def test_ticks_drive_the_rounds_one_after_the_other(finished, prepared_root, prefect_server):
    root = prepared_root()
    command = [
        str(OPD),
        "schedule",
        str(TINY),
        "--name",
        "base",
        "--every",
        "5s",
        "--rounds",
        "1",
        "--root",
        str(root),
    ]
    env = dict(os.environ) | {"PREFECT_API_URL": prefect_server}
    scheduled = subprocess.run(command, env=env, cwd=root.parent, capture_output=True, text=True, timeout=800)
    assert scheduled.returncode == 0, scheduled.stdout + scheduled.stderr

    status = json.loads(opd("status", "base", "--json", root=root).stdout)
    assert status["status"] == "finished"
    assert [entry["round"] for entry in status["rounds"]] == [0, 1, 2, 3]
    assert [r["student_sha256"] for r in status["rounds"]] == [r["student_sha256"] for r in finished.status["rounds"]]

    ticks = [run for run in flow_runs(prefect_server) if run["deployment_id"]]
    worked = sorted((run["start_time"], run["end_time"]) for run in ticks if run["state_type"] == "COMPLETED")
    assert len(worked) >= 3
    assert all(end <= start for (_, end), (start, _) in pairwise(worked)), "ticks overlapped"
    assert any(run["state_type"] == "CANCELLED" or run["state_name"] == "Skipped" for run in ticks), (
        "no tick was skipped"
    )
