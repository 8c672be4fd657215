"""What Prefect is told of a failure, without a server."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flows.prefect_.failure import failure
from flows.run.executor import stage_error
from flows.run.hints import opd_command
from storage.errors import InputError, RunBusy
from storage.runs import RoundState, Run, RunState, StageState
from tasks.workers.logs import attempt_begins, last_lines
from tasks.workers.process import WorkerDied


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose trainer failed just now, after an attempt of before; its sampler wrote an hour ago."""
    run = Run.create(tmp_path, "demo", {}, {})
    run.log_path("sampler").write_text("an hour ago\n")
    run.log_path("trainer").write_text("of another attempt\n")
    attempt_begins(run.log_path("trainer"), "trainer: next job")
    with run.log_path("trainer").open("a") as log:
        log.writelines(f"line {n}\n" for n in range(40))
    old = time.time() - 3600
    os.utime(run.log_path("sampler"), (old, old))
    run.log_path("run").write_text("the run's own log\n")
    return run


def fail(run: Run, error: Exception) -> None:
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - 5))
    stage = StageState(state="failed", seconds=5.0, error=stage_error(error), started=started)
    run.save(RunState(name="demo", status="running", rounds=[RoundState(round=2, stages={"train": stage})]))


def test_an_error_has_its_stage_the_workers_last_lines_and_the_remedy(run: Run, tmp_path: Path) -> None:
    error = InputError("prompts.jsonl: line 3 is no JSON")
    fail(run, error)
    found = failure(error, "demo", tmp_path)
    resume = opd_command(tmp_path, "resume", "demo")
    for text in (found.message(), found.markdown(tmp_path, "demo")):
        assert "round 2 train: prompts.jsonl: line 3 is no JSON" in text
        assert "line 39" in text and "line 28" in text and "line 27\n" not in text
        assert "an hour ago" not in text and "the run's own log" not in text
        assert resume in text
    assert found.message().splitlines()[-1].endswith(resume)


def test_the_lines_of_a_worker_that_died_are_told_once(run: Run, tmp_path: Path) -> None:
    error = WorkerDied("trainer worker ended without an answer", last_lines(run.log_path("trainer")))
    fail(run, error)
    assert failure(error, "demo", tmp_path).message().count("line 39") == 1


def test_lines_of_another_attempt_are_not_this_failures(run: Run, tmp_path: Path) -> None:
    attempt_begins(run.log_path("trainer"), "trainer: next job")
    error = InputError("nothing was written")
    fail(run, error)
    found = failure(error, "demo", tmp_path).message()
    assert "this attempt wrote nothing to" in found and "line 39" not in found and "of another attempt" not in found


def test_an_error_of_no_stage_has_no_place(run: Run, tmp_path: Path) -> None:
    fail(run, InputError("an earlier one"))
    assert failure(KeyError("x"), "demo", tmp_path).message().startswith("KeyError: 'x'\n")
    busy = RunBusy("run 'demo' is held by pid 1", "pid 1")
    assert failure(busy, "demo", tmp_path).message() == str(busy)  # to resume would be refused too
    assert failure(InputError("no config"), "other", tmp_path).message() == "no config"  # before the run is there


def test_secrets_are_left_out(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz012345")
    run.log_path("trainer").write_text("token hf_abcdefghijklmnopqrstuvwxyz012345\n")
    error = InputError("hf_abcdefghijklmnopqrstuvwxyz012345 is refused")
    fail(run, error)
    found = failure(error, "demo", tmp_path)
    assert "hf_abc" not in found.message() + found.markdown(tmp_path, "demo")
    assert "token" in found.message()
