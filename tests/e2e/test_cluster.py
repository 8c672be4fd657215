"""The true run of these tests, with its workers on two nodes of a Ray cluster: the same students."""

from __future__ import annotations

import json

import pytest
from opd_cli import opd
from places import TINY
from ray_nodes import nodes

pytestmark = pytest.mark.slow


def test_every_student_is_that_of_one_machine(finished, tmp_path):
    root = tmp_path / "store"
    with nodes(1, 1, addresses=(None, "127.0.0.2")) as cluster:
        on_ray = [
            "runtime.cluster.kind=ray",
            f"runtime.cluster.address={cluster.address}",
            "runtime.keep_warm=false",
            "runtime.sampler.workers=2",
            "policy.rounds=2",
        ]
        changes = [word for text in on_ray for word in ("--set", text)]
        checked = opd("check", TINY, *changes, root=root).stdout
        assert "cluster: 2 nodes, 2 CPUs, 0 GPUs" in checked
        status = json.loads(opd("run", TINY, "--name", "ray", "--no-prefect", "--json", *changes, root=root).stdout)
    assert [entry["student_sha256"] for entry in status["rounds"]] == [finished.sha(round) for round in range(3)]
    logs = root / "runs" / "ray"
    # a stage has a sampler on each node; of two stages the first may be on either
    placed = [
        line for path in logs.rglob("sampler*.log") for line in path.read_text().splitlines() if "on node" in line
    ]
    assert 2 * sum("(127.0.0.2)" in line for line in placed) == len(placed) >= 4
