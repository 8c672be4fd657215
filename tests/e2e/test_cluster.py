"""The true run of these tests on a Ray cluster and over a hostfile: the students of one machine."""

from __future__ import annotations

import json

import pytest
from opd_cli import opd
from places import TINY
from pretend_hosts import ASKED, hosts
from ray_nodes import nodes

pytestmark = pytest.mark.slow


def test_every_student_of_a_ray_cluster_is_that_of_one_machine(finished, tmp_path):
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


def test_every_student_of_two_hosts_is_that_of_two_ranks_here(tmp_path):
    changes = [word for text in ("runtime.trainer.processes=2", "policy.rounds=2") for word in ("--set", text)]
    with hosts(tmp_path / "hosts", {"127.0.0.1": 1, "127.0.0.2": 1}) as running:
        over = [
            word
            for text in ("kind=hostfile", f"hostfile={running.file}")
            for word in ("--set", f"runtime.cluster.{text}")
        ]
        started = {
            name: ("run", TINY, "--name", name, "--no-prefect", "--json", *changes) for name in ("here", "hosts")
        }
        here = json.loads(opd(*started["here"], root=tmp_path / "one").stdout)
        assert not (running.folder / ASKED).exists()
        there = json.loads(opd(*started["hosts"], *over, root=tmp_path / "two").stdout)
        trained = [command for _, command in running.asked() if "deepspeed" in command]
        assert trained and running.empty()
    shas = [[entry["student_sha256"] for entry in run["rounds"]] for run in (here, there)]
    assert shas[0] == shas[1] and len(set(shas[0])) == 3
