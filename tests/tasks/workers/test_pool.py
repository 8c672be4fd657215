"""The supervisor's promises: answers in order, crashes contained, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from places import PLUGINS

from storage.errors import ConfigError, InputError
from tasks.workers.pool import WorkerDied, WorkerFailed, WorkerPool
from tasks.workers.runtime import RuntimeConfig, ScorerRuntime


def pool(tmp_path: Path, **runtime) -> WorkerPool:
    config = RuntimeConfig(device="cpu", threads=1, **runtime)
    return WorkerPool(config, tmp_path / "logs", ("scripted_worker",), str(PLUGINS))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_one_warm_worker_serves_a_stream_of_jobs(tmp_path):
    seen = []
    with pool(tmp_path) as workers:
        jobs = [{"op": "echo", "value": i} for i in range(5)]
        first = workers.run("scorer", jobs, lambda job, done, total: seen.append((job, done, total)))
        second = workers.run("scorer", jobs[:1])
        workers.stage_done()
    assert [r["value"] for r in first] == [0, 1, 2, 3, 4]
    assert second[0]["served"] == 6 and second[0]["pid"] == first[0]["pid"]
    assert seen == [(i, 1, 1) for i in range(5)]
    assert not alive(first[0]["pid"])


@pytest.mark.parametrize(("length", "there"), [(20, True), (60, False), (200, False)])
def test_a_long_folder_for_temporary_files_leaves_room_for_sockets(tmp_path, monkeypatch, length, there):
    """A socket's path has at most 107 characters. Nothing stays in either place, also of a run that was killed."""
    with tempfile.TemporaryDirectory(prefix="opd-", dir="/tmp") as short:
        folder = Path(short, "x" * (length - len(short) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        left = [place / ended_process_name() for place in (folder, Path("/tmp"))]
        for path in left:
            path.mkdir()
        with pool(tmp_path) as workers:
            own = Path(workers.run("scorer", [{"op": "socket"}])[0]["folder"])
            assert own.is_dir() and own.parent == (folder if there else Path("/tmp"))
        assert not any(path.exists() for path in (own, *left))


def ended_process_name() -> str:
    code = "import storage.disk.files; print(storage.disk.files.temporary_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_figures_of_a_job_reach_whoever_listens(tmp_path):
    """The first and the last always; in between not more often than five times a second."""
    metrics = [{"loss": 3.0 - step, "entropy": None} for step in range(3)]
    seen = []
    with pool(tmp_path) as workers:
        listen = lambda job, done, total, metrics=None: seen.append((done, metrics))  # noqa: E731
        workers.run("scorer", [{"op": "train", "metrics": metrics, "pause": 0.3}], listen)
        assert seen == [(1, metrics[0]), (2, metrics[1]), (3, metrics[2])]
        seen.clear()
        workers.run("scorer", [{"op": "train", "metrics": metrics * 20, "pause": 0.001}], listen)
        assert seen[0] == (1, metrics[0]) and seen[-1] == (60, metrics[2]) and len(seen) < 10
        seen.clear()
        workers.run("scorer", [{"op": "echo", "value": 1}], lambda job, done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_two_workers_share_the_jobs_and_answers_keep_their_order(tmp_path):
    with pool(tmp_path, scorer=ScorerRuntime(workers=2)) as workers:
        results = workers.run("scorer", [{"op": "echo", "value": i} for i in range(20)])
    assert [r["value"] for r in results] == list(range(20))


def test_cold_workers_end_with_their_stage(tmp_path):
    with pool(tmp_path, keep_warm=False) as workers:
        (result,) = workers.run("scorer", [{"op": "echo", "value": 1}])
        workers.stage_done()
        assert not alive(result["pid"])


def test_a_worker_that_dies_is_replaced_and_its_job_tried_again(tmp_path):
    with pool(tmp_path) as workers:
        (result,) = workers.run("scorer", [{"op": "die_once", "marker": str(tmp_path / "died")}])
    assert result == {"value": "second try"}


def test_retries_are_bounded_and_the_error_names_the_log(tmp_path):
    with pool(tmp_path) as workers, pytest.raises(WorkerDied, match=r"killed by signal 9[\s\S]*scorer\.log"):
        workers.run("scorer", [{"op": "die"}])


def test_a_users_error_keeps_its_type_and_text_and_the_worker(tmp_path):
    with pool(tmp_path) as workers:
        with pytest.raises(InputError, match=r"prompts\.jsonl:3"):
            workers.run("scorer", [{"op": "refuse"}])
        assert workers.run("scorer", [{"op": "echo", "value": 7}])[0]["value"] == 7


def test_a_bug_is_reported_with_its_traceback(tmp_path):
    with pool(tmp_path) as workers, pytest.raises(WorkerFailed, match="ZeroDivisionError: a bug"):
        workers.run("scorer", [{"op": "crash"}])


def test_workers_that_runs_share_stay_warm_and_log_to_each_runs_own_place(tmp_path):
    plugins = ("scripted_worker",)
    with pool(tmp_path) as workers:
        with workers.serving(workers.runtime, tmp_path / "one", plugins):
            first = workers.run("scorer", [{"op": "echo", "value": 1}])
        (tmp_path / "two").mkdir()
        with workers.serving(workers.runtime, tmp_path / "two", plugins):
            second = workers.run("scorer", [{"op": "echo", "value": 2}])
            with pytest.raises(WorkerFailed, match=r"two/scorer\.log"):
                workers.run("scorer", [{"op": "crash"}])
    assert second[0]["pid"] == first[0]["pid"]
    assert "ZeroDivisionError" in (tmp_path / "two" / "scorer.log").read_text()
    assert "ZeroDivisionError" not in (tmp_path / "one" / "scorer.log").read_text()


def test_a_run_that_ends_in_an_error_leaves_the_next_one_fresh_workers(tmp_path):
    with pool(tmp_path) as workers:
        with pytest.raises(KeyError), workers.serving(workers.runtime, tmp_path / "one", workers.plugins):
            (before,) = workers.run("scorer", [{"op": "echo", "value": 1}])
            raise KeyError
        assert not alive(before["pid"])
        with workers.serving(workers.runtime, tmp_path / "two", workers.plugins):
            assert workers.run("scorer", [{"op": "echo", "value": 2}])[0]["served"] == 1


def test_workers_are_not_shared_with_a_run_that_asks_for_others(tmp_path):
    with pool(tmp_path) as workers:
        other = RuntimeConfig(device="cpu", threads=2)
        with pytest.raises(ConfigError, match="runtime, plugins"), workers.serving(other, tmp_path, workers.plugins):
            pass


def test_a_job_past_its_time_limit_is_stopped_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    with pool(tmp_path, stage_timeout=5, retries=0) as workers, pytest.raises(WorkerDied, match="stage_timeout"):
        workers.run("scorer", [{"op": "grandchild", "pids": str(pids)}])
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_a_killed_supervisor_leaves_nothing_behind(tmp_path):
    pids = tmp_path / "pids"
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from tasks.workers.runtime import RuntimeConfig; from tasks.workers.pool import WorkerPool\n"
        "pool = WorkerPool(RuntimeConfig(device='cpu', threads=1), Path(sys.argv[1]), ('scripted_worker',), sys.argv[3])\n"
        "pool.run('scorer', [{'op': 'grandchild', 'pids': sys.argv[2]}])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "logs"), str(pids), str(PLUGINS)])
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = [int(pid) for pid in pids.read_text().split()]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in family)
