"""An engine over two of three nodes, which claim two GPUs each; the head has none. The engine is a scripted one: what is
tested is where it is placed and what ends it (vLLM's is in tests/tasks/engines/test_over_nodes.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import PLUGINS
from ray_nodes import Nodes, gone, nodes

from storage.errors import ConfigError
from tasks.workers.cluster import require
from tasks.workers.pool import WorkerDied, WorkerPool
from tasks.workers.runtime import RuntimeConfig

sys.path.insert(0, str(PLUGINS))
from scripted_jobs import ScriptedJob

WITH_GPUS = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]


@pytest.fixture(scope="module")
def three() -> Iterator[Nodes]:
    with nodes(1) as cluster:
        for address in WITH_GPUS:
            cluster.start(1, 2, address)
        yield cluster


def config(cluster: Nodes, **sampler) -> RuntimeConfig:
    on_ray = {"kind": "ray", "address": cluster.address, "placement_timeout": 30}
    spread = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "engine_nodes": 2}
    return RuntimeConfig.model_validate(
        {"device": "cuda", "threads": 1, "cluster": on_ray, "sampler": spread | sampler}
    )


def pool(cluster: Nodes, folder: Path, **sampler) -> WorkerPool:
    return WorkerPool(config(cluster, **sampler), folder / "logs", ("scripted_engine",), str(PLUGINS))


def written(path: Path) -> dict:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return json.loads(path.read_text())


def test_the_plan_names_nodes_and_refuses_what_does_not_fit(three, tmp_path):
    found = require(config(three), tmp_path)
    assert found is not None and found.startswith("4 nodes, 4 CPUs, 6 GPUs: ")
    assert "; sampler: an engine of 2 GPUs on each of 2 nodes (" in found
    with pytest.raises(ConfigError, match=r"^runtime\.sampler\.workers: 2 are asked for, but .* have room for 1 \("):
        require(config(three, workers=2), tmp_path)
    with pytest.raises(ConfigError, match=r"have room for 0 .* an engine of 3 GPUs on each of 2 nodes"):
        require(config(three, tensor_parallel_size=3), tmp_path)


def test_an_engine_has_its_gpus_on_the_nodes_that_the_log_names(three, tmp_path):
    with pool(three, tmp_path) as workers:
        assert workers.run("sampler", ScriptedJob(do="where", path=str(tmp_path / "found"))).value == 4
        found = written(tmp_path / "found")
        # no room for a second one: its GPUs would be on one node
        with pool(three, tmp_path / "second", tensor_parallel_size=1, engine_nodes=2) as others:
            others.runtime.retries, others.runtime.cluster.placement_timeout = 0, 3
            with pytest.raises(WorkerDied) as error:
                others.run("sampler", ScriptedJob(do="where", path=str(tmp_path / "none")))
        assert "runtime.sampler: no room for 1 CPUs and an engine of 1 GPU on each of 2 nodes" in str(error.value)
    places = [(node, gpu) for node, gpu, _ in found["parts"]]
    assert len(set(places)) == 4 and len({node for node, _ in places}) == 2
    assert found["node"] == places[0][0] == places[1][0]  # the first part is beside the worker
    log = (tmp_path / "logs" / "sampler.log").read_text()
    [line] = [line for line in log.splitlines() if line.startswith("sampler: an engine of 2 GPUs on each of 2 nodes")]
    assert all(f"({node})" in line for node, _ in places)
    assert gone(*(pid for _, _, pid in found["parts"]))


@pytest.mark.slow
def test_an_engine_ends_with_its_worker_and_another_takes_its_place(three, tmp_path):
    with pool(three, tmp_path) as workers:
        path = tmp_path / "found"
        asked = threading.Thread(target=workers.run, args=("sampler", ScriptedJob(do="sleep", path=str(path))))
        asked.start()
        before = written(path)
        os.kill(before["pid"], signal.SIGKILL)
        assert gone(*(pid for _, _, pid in before["parts"]))
        asked.join(120)
        assert not asked.is_alive() and written(path)["pid"] != before["pid"]


@pytest.mark.slow
def test_an_engine_that_loses_a_node_is_placed_on_others(three, tmp_path):
    with pool(three, tmp_path) as workers:
        path = tmp_path / "found"
        asked = threading.Thread(target=workers.run, args=("sampler", ScriptedJob(do="sleep", path=str(path))))
        asked.start()
        before = written(path)
        used = {node for node, _, _ in before["parts"]}
        [lost] = [node for node in used if node != before["node"]]
        three.kill(WITH_GPUS.index(lost))
        asked.join(180)
        assert not asked.is_alive()
        after = {node for node, _, _ in written(path)["parts"]}
        assert len(after) == 2 and after != used
        assert gone(*(pid for _, _, pid in before["parts"]))
    assert "has lost a node" in (tmp_path / "logs" / "sampler.log").read_text()
