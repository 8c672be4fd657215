"""Ranks on two hosts, started by DeepSpeed's own runner and launchers, keep the promises of ranks on one machine, and nothing of
them is left on a host. The hosts are on this machine, and so are stand-ins for pdsh and ssh (`pretend_hosts.py`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from places import PLUGINS
from pretend_hosts import Hosts, alive, hosts, with_word

from tasks.workers.pool import WorkerDied, WorkerPool
from tasks.workers.runtime import RuntimeConfig

sys.path.insert(0, str(PLUGINS))
from scripted_jobs import ScriptedJob

pytestmark = pytest.mark.slow


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Hosts]:
    with hosts(tmp_path / "hosts", {"127.0.0.2": 2, "127.0.0.1": 4}) as running:
        yield running


def config(two: Hosts, **fields) -> RuntimeConfig:
    own = {"kind": "hostfile", "hostfile": str(two.file)}
    return RuntimeConfig.model_validate(
        {"device": "cpu", "threads": 1, "cluster": own, "trainer": {"processes": 3}} | fields
    )


def pool(two: Hosts, folder: Path, **fields) -> WorkerPool:
    return WorkerPool(config(two, **fields), folder / "logs", ("scripted_ranks",), str(PLUGINS))


def test_every_rank_does_the_job_and_no_secret_is_shown(two, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not for others")
    with pool(two, tmp_path) as workers:
        assert workers.run("trainer", ScriptedJob(do="tell", path=str(tmp_path), value=7)).value == 7
        assert workers.run("trainer", ScriptedJob(do="tell", path=str(tmp_path), value=8)).value == 8
        assert list((tmp_path / "logs").iterdir()) == [tmp_path / "logs" / "trainer.log"]  # no order is left
        [relay] = with_word(2, "tasks.workers.hosts", psutil.Process().children(recursive=True))
        folders = {Path(p.environ()["TMPDIR"]) for p in with_word(2, "tasks.workers.main", two.processes())}
    assert two.empty() and not alive(relay) and len(folders) == 3 and not any(folder.exists() for folder in folders)
    told = [json.loads((tmp_path / f"rank-{number}").read_text()) for number in range(3)]
    assert [(of["LOCAL_RANK"], of["CUDA_VISIBLE_DEVICES"]) for of in told] == [("0", "0,1"), ("1", "0,1"), ("0", "0")]
    assert {(of["WORLD_SIZE"], of["OPD_NODES"], of["GLOO_SOCKET_IFNAME"], of["OMP_NUM_THREADS"]) for of in told} == {
        ("3", "2", "lo", "1")
    }
    assert len({of["OPD_MEETING"] for of in told}) == 1 and all("MLFLOW_TRACKING_PASSWORD" not in of for of in told)
    shown = (tmp_path / "logs" / "trainer.log").read_text() + str(two.asked())
    assert "not for others" not in shown and re.search(r"[0-9a-f]{64}", shown) is None
    assert [host for host, _ in sorted(two.asked())] == ["127.0.0.1", "127.0.0.2"]
    assert sum("trainer rank" in line and "on host" in line for line in shown.splitlines()) >= 3


def test_a_rank_that_dies_ends_the_others_and_another_trainer_goes_on(two, tmp_path):
    with pool(two, tmp_path, retries=0) as workers:
        with pytest.raises(WorkerDied, match=r"trainer worker \(rank 1\) ended without an answer") as error:
            workers.run("trainer", ScriptedJob(do="die_once", path=str(tmp_path)))
        assert "has ended (killed by signal 9)" in str(error.value)
        assert two.empty()
        for number in range(3):
            (tmp_path / f"rank-{number}").touch()
        assert workers.run("trainer", ScriptedJob(do="die_once", path=str(tmp_path), value=2)).value == 2


def test_a_host_that_is_lost_at_the_start_ends_the_others(two, tmp_path):
    (two.folder / "hosts").write_text("127.0.0.2")
    with pool(two, tmp_path, retries=0) as workers, pytest.raises(WorkerDied, match=r"\(exit 255\)") as error:
        workers.run("trainer", ScriptedJob(do="tell", path=str(tmp_path)))
    assert "the launcher on host 127.0.0.1 has ended, and " in str(error.value)
    assert two.empty() and [path.name for path in (tmp_path / "logs").iterdir()] == ["trainer.log"]


@pytest.mark.parametrize("lost", ["run", "relay", "launcher", "ssh"])
def test_nothing_is_left_on_a_host(two, tmp_path, lost):
    """The last rank is stopped (SIGSTOP), so it can do nothing; each has started a process in a session of its own."""
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tasks.workers.runtime import RuntimeConfig; from tasks.workers.pool import WorkerPool\n"
        "runtime = RuntimeConfig.model_validate_json(sys.argv[3])\n"
        "pool = WorkerPool(runtime, Path(sys.argv[1], 'logs'), ('scripted_ranks',), sys.argv[2])\n"
        "from scripted_jobs import ScriptedJob\n"
        "pool.run('trainer', ScriptedJob(do='hang', path=sys.argv[1]))\n"
    )
    given = [str(tmp_path), str(PLUGINS), config(two, retries=0).model_dump_json()]
    run = subprocess.Popen([sys.executable, "-c", script, *given], stderr=subprocess.PIPE, text=True)
    places, deadline = [tmp_path / f"rank-{number}" for number in range(3)], time.monotonic() + 240
    while not all(place.exists() for place in places):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(pid) for place in places for pid in place.read_text().split()]
    here = psutil.Process(run.pid).children(recursive=True)
    on_hosts = {process.pid for process in two.processes()}
    assert on_hosts >= set(pids)

    victims = {
        "run": [psutil.Process(run.pid)],
        "relay": with_word(2, "tasks.workers.hosts", here),
        "launcher": with_word(3, "deepspeed.launcher.launch", two.processes()),
        "ssh": with_word(2, "pdsh", here),
    }
    victims[lost][0].kill()
    assert two.empty(60), two.processes()
    said = run.communicate(timeout=60)[1]
    assert not any("pkill" in command for _, command in two.asked())  # it would end launchers of other runs
    assert lost == "run" or "WorkerDied: trainer worker" in said
    deadline = time.monotonic() + 20
    while any(map(alive, here)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["trainer.log"]
