"""Killed in the middle of a round: `opd resume` ends with the student of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from opd_cli import OPD, TINY, opd


def start(root) -> subprocess.Popen:
    command = [str(OPD), "run", str(TINY), "--name", "base", "--no-prefect", "--root", str(root)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_an_interruption_in_training_gives_the_undisturbed_student(finished, prepared_root, how):
    root = prepared_root()
    process = start(root)
    wait_for(process, root, 1 if how == signal.SIGKILL else 2, "train")
    children = descendants(process)
    assert children
    os.kill(process.pid, how)
    code = process.wait(30)
    assert gone(children)
    if how == signal.SIGINT:
        assert code == 130 and "opd resume base" in process.stderr.read()
    interrupted = json.loads(opd("status", "base", "--json", root=root).stdout)
    assert interrupted["rounds"][1]["stages"]["rollout"]["state"] == "done"
    resumed = json.loads(opd("resume", "base", "--no-prefect", "--json", root=root).stdout)
    assert [r["student_sha256"] for r in resumed["rounds"]] == [r["student_sha256"] for r in finished.status["rounds"]]
    assert resumed["rounds"][-1]["metrics"] == pytest.approx(finished.status["rounds"][-1]["metrics"])


def test_a_second_run_on_a_held_name_ends_at_once_and_stop_ends_the_first(prepared_root):
    root = prepared_root()
    process = start(root)
    children: list[psutil.Process] = []
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
