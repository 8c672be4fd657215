"""Workers on a Ray cluster of two nodes keep the promises of workers on one machine (`test_pool.py`), and leave no actor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from places import PLUGINS
from ray_nodes import QUIET, Nodes, gone, nodes
from registries import plugin_path
from scripted_run import CLUSTER, WARM, Trial, prepare_root

from storage.errors import ConfigError, InputError
from tasks.workers.cluster import require
from tasks.workers.pool import WorkerDied, WorkerFailed, WorkerPool
from tasks.workers.runtime import RuntimeConfig

sys.path.insert(0, str(PLUGINS))
from scripted_jobs import ScriptedItem, ScriptedJob


@pytest.fixture(scope="module")
def two() -> Iterator[Nodes]:
    """Two nodes of two CPUs each, which count as two machines."""
    with nodes(2, 2, addresses=(None, "127.0.0.2")) as cluster:
        yield cluster


def config(cluster: Nodes, **fields) -> RuntimeConfig:
    on_ray = {"kind": "ray", "address": cluster.address, "placement_timeout": fields.pop("placement_timeout", 120)}
    return RuntimeConfig.model_validate({"device": "cpu", "threads": 1, "cluster": on_ray} | fields)


def pool(cluster: Nodes, folder: Path, **fields) -> WorkerPool:
    return WorkerPool(config(cluster, **fields), folder / "logs", ("scripted_worker",), str(PLUGINS))


def test_workers_on_both_nodes_share_a_queue(two, tmp_path):
    seen: list[int] = []
    with pool(two, tmp_path, scorer={"workers": 2}) as workers:
        items = [ScriptedItem(shard) for shard in range(8)]
        job = ScriptedJob(do="shards", path=str(tmp_path), pause=0.5)
        results, answers = workers.share("scorer", job, items, seen.append)
        assert [result.shard for result in results] == list(range(8))
        assert sum(answer.value for answer in answers) == 8 and len(answers) == 2
        pids = {result.pid for result in results}
        assert len(pids) == 2 and seen == sorted(seen) and seen[-1] == 8
        # warm workers serve the next job too
        again, _ = workers.share("scorer", job, items)
        assert {result.pid for result in again} == pids
    logs = [(tmp_path / "logs" / name).read_text() for name in ("scorer.log", "scorer-1.log")]
    places = [log.partition("scorer on node ")[2].partition(")")[0].rpartition("(")[2] for log in logs]
    assert "127.0.0.2" in places and len(set(places)) == 2
    assert gone(*pids)


def test_errors_deaths_and_retries_are_those_of_one_machine(two, tmp_path):
    with pool(two, tmp_path) as workers:
        with pytest.raises(InputError, match=r"prompts\.jsonl:3"):
            workers.run("scorer", ScriptedJob(do="refuse"))
        assert workers.run("scorer", ScriptedJob(do="echo", value=7)).served == 2  # the worker has outlived it
        assert workers.run("scorer", ScriptedJob(do="die_once", path=str(tmp_path / "died"))).value == 2
        with pytest.raises(WorkerFailed, match="ZeroDivisionError: a bug"):
            workers.run("scorer", ScriptedJob(do="crash"))
        with pytest.raises(WorkerDied, match=r"killed by signal 9[\s\S]*scorer\.log"):
            workers.run("scorer", ScriptedJob(do="die"))


def test_no_room_for_a_worker_is_said_with_what_is_free(two, tmp_path):
    asked = pool(two, tmp_path, placement_timeout=2, threads=3, retries=0)
    with asked as workers, pytest.raises(WorkerDied) as error:
        workers.run("scorer", ScriptedJob(do="echo"))
    assert "runtime.scorer: no room for 3 CPUs within 2 s" in str(error.value)


def test_the_checks_before_a_run(two, tmp_path):
    found = require(config(two, keep_warm=False), tmp_path / "store")
    assert found is not None and found.startswith("2 nodes, 4 CPUs, 0 GPUs: ")
    assert "(127.0.0.2)" in found
    with pytest.raises(ConfigError) as error:
        require(config(two, device="cuda", scorer={"workers": 3}, keep_warm=False), tmp_path)
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "runtime.sampler.workers",
        "runtime.scorer.workers",
        "runtime.trainer.processes",
    ]
    with pytest.raises(ConfigError, match=r"^runtime\.keep_warm: true keeps"):
        require(config(two, threads=2), tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_actor(two, tmp_path):
    pids = tmp_path / "pids"
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from tasks.workers.runtime import RuntimeConfig; from tasks.workers.pool import WorkerPool\n"
        "runtime = RuntimeConfig.model_validate_json(sys.argv[4])\n"
        "pool = WorkerPool(runtime, Path(sys.argv[1]), ('scripted_worker',), sys.argv[3])\n"
        "from scripted_jobs import ScriptedJob\n"
        "pool.run('scorer', ScriptedJob(do='grandchild', path=sys.argv[2]))\n"
    )
    given = [str(tmp_path / "logs"), str(pids), str(PLUGINS), config(two).model_dump_json()]
    parent = subprocess.Popen([sys.executable, "-c", script, *given])
    deadline = time.monotonic() + 120
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(*(int(pid) for pid in pids.read_text().split()))
    # its place and its name are free again
    with pool(two, tmp_path) as workers:
        assert workers.run("scorer", ScriptedJob(do="echo", value=3)).value == 3


def test_a_whole_run_gives_the_result_of_one_machine(two, tmp_path):
    with plugin_path():
        template = prepare_root(tmp_path / "template")
        here = Trial.of(template, tmp_path / "here", rounds=1)
        assert here.run() == 0, here.output
        there = Trial.of(template, tmp_path / "there", rounds=1, **QUIET, **{CLUSTER: two.address, WARM: "1"})
        assert forked.exit_code(there.start(), 400) == 0, there.output  # minutes on a busy machine
        assert there.result() == here.result()
        assert there.orphans(90) == [] and there.leftovers() == []
