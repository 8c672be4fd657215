"""Stopped, held and killed: `opd resume` ends with the student of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from opd_cli import OPD, opd
from places import TINY


def start(root, *more: str, **environment: str) -> subprocess.Popen:
    command = [str(OPD), "run", str(TINY), "--name", "base", "--no-prefect", "--root", str(root), *more]
    env = os.environ | environment
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(process: subprocess.Popen, root, round: int, label: str, timeout: float = 300) -> None:
    """Until the stage is under way."""
    deadline = time.monotonic() + timeout
    path = root / "runs" / "base" / "state.json"
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        if path.exists():
            rounds = {entry["round"]: entry for entry in json.loads(path.read_text())["rounds"]}
            if rounds.get(round, {}).get("stages", {}).get(label, {}).get("state") == "running":
                return
        time.sleep(0.1)
    raise AssertionError(f"{label} of round {round} did not start within {timeout} s")


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.mark.promise(10, "Ctrl-C, opd stop, SIGKILL, one after the other; real engines")
@pytest.mark.slow
def test_a_run_that_is_stopped_held_and_killed_ends_with_the_undisturbed_student(finished, prepared_root):
    """One story, because every start of the engines costs half a minute."""
    root = prepared_root()

    # Ctrl-C: children end, the way to go on is said
    process = start(root)
    wait_for(process, root, 1, "rollout")
    children = descendants(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert "opd resume base" in process.stderr.read()
    assert gone(children)

    # while a run is held, a second one ends at once and names the holder; `opd stop` ends the first
    process = start(root)
    try:
        wait_for(process, root, 1, "rollout")
        second = opd("run", TINY, "--name", "base", "--no-prefect", root=root, check=False, timeout=60)
        assert second.returncode == 75 and str(process.pid) in second.stderr
        children = descendants(process)
        opd("stop", "base", root=root)
        assert process.wait(30) == 130
    finally:
        process.kill()
    assert gone(children)

    # SIGKILL in the middle of a round: nothing of what was committed is lost or made again
    process = start(root)
    wait_for(process, root, 2, "train")
    children = descendants(process)
    process.kill()
    process.wait()
    assert gone(children)
    interrupted = json.loads(opd("status", "base", "--json", root=root).stdout)
    assert interrupted["rounds"][2]["stages"]["rollout"]["state"] == "done"
    assert interrupted["rounds"][2]["stages"]["train"]["state"] == "pending"

    resumed = json.loads(opd("resume", "base", "--no-prefect", "--json", root=root).stdout)
    assert [r["student_sha256"] for r in resumed["rounds"]] == [r["student_sha256"] for r in finished.status["rounds"]]
    assert resumed["rounds"][-1]["metrics"] == finished.status["rounds"][-1]["metrics"]


@pytest.mark.promise(10, "SIGTERM, SIGKILL, a killed rank of two; real engines")
@pytest.mark.faults
def test_two_deepspeed_ranks_leave_nothing_behind(prepared_root, tmp_path):
    """In the middle of training: SIGTERM, SIGKILL, a rank that is killed. Then the same run to its end."""
    root, temporary = prepared_root(), Path(tempfile.mkdtemp(prefix="opd-"))  # short: workers' sockets lie in it
    more = ("--rounds", "1", "--set", "runtime.trainer.processes=2", "--set", "runtime.retries=0")
    shared = set(Path("/dev/shm").iterdir())
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL), (None, 1)):
        process = start(root, *more, TMPDIR=str(temporary), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        wait_for(process, root, 1, "train")
        deadline = time.monotonic() + 300
        while len(ranks := [p for p in descendants(process) if p.environ().get("RANK")]) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        children = descendants(process)
        assert len(children) >= 4  # the guard, DeepSpeed's launcher, two ranks
        if number is None:
            next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
        else:
            process.send_signal(number)
        assert process.wait(60) == code
        assert gone(children)
        said = process.stderr.read()
        assert number is signal.SIGKILL or "opd resume base" in said
        if number is None:
            assert re.search(r"trainer worker.* ended[\s\S]*last lines of .*trainer\.log", said)
        assert list(temporary.iterdir()) == []
        assert set(Path("/dev/shm").iterdir()) <= shared
    resumed = json.loads(opd("resume", "base", "--no-prefect", "--json", *more[:4], root=root).stdout)
    assert resumed["rounds"][1]["stages"]["train"]["state"] == "done"
    temporary.rmdir()
