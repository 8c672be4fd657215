"""A schedule against a real Prefect server: consecutive rounds, none doubled, the student of `opd run`."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import pairwise

import pytest
from opd_cli import OPD, opd
from places import TINY
from shared_prefect import ask


@pytest.mark.slow
def test_ticks_drive_the_rounds_one_after_the_other(finished, prepared_root, shared_server):
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
    env = dict(os.environ) | {"PREFECT_API_URL": shared_server.api_url}
    scheduled = subprocess.run(command, env=env, cwd=root.parent, capture_output=True, text=True, timeout=800)
    assert scheduled.returncode == 0, scheduled.stdout + scheduled.stderr

    status = json.loads(opd("status", "base", "--json", root=root).stdout)
    assert status["status"] == "finished"
    assert [entry["round"] for entry in status["rounds"]] == [0, 1, 2, 3]
    assert [r["student_sha256"] for r in status["rounds"]] == [r["student_sha256"] for r in finished.status["rounds"]]

    ticks = ask(shared_server.api_url, "flow_runs/filter", {"deployments": {"name": {"like_": "base-"}}, "limit": 200})
    worked = sorted((run["start_time"], run["end_time"]) for run in ticks if run["state_type"] == "COMPLETED")
    assert len(worked) >= 3
    assert all(end <= start for (_, end), (start, _) in pairwise(worked)), "ticks overlapped"
    assert any(run["state_type"] == "CANCELLED" or run["state_name"] == "Skipped" for run in ticks), (
        "no tick was skipped"
    )
