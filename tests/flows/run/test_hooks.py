"""Commands of the user's: what they get, and that nothing of theirs ends a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest
from places import TINY
from shared_prefect import eventually

from flows.experiment import load_experiment
from flows.hooks import Hooks
from flows.run import runner
from flows.run.hooks import after_failure, after_round
from storage.errors import ConfigError, StoreError
from storage.runs import RoundState, Run, RunState

STATE = RunState(
    name="demo",
    status="running",
    rounds=[
        RoundState(round=0, student_sha256="a"),
        RoundState(round=1, metrics={"reverse_kl": 0.5}, student_sha256="b"),
    ],
)
WRITE = (
    "import json, os, sys; told = {k: v for k, v in os.environ.items() if k.startswith('OPD_')};"
    " json.dump([told, json.load(sys.stdin)], open(sys.argv[1], 'w'))"
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, "demo", {}, {})


def test_a_round_is_told_in_variables_and_on_standard_input(run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("OPD_ROOT", raising=False)
    out = tmp_path / "out.json"
    hooks = Hooks(on_round=(sys.executable, "-c", WRITE, str(out)))
    assert after_round(hooks, run, STATE, 1, tmp_path) is None
    variables, metrics = json.loads(out.read_text())
    assert {
        "OPD_RUN": "demo",
        "OPD_ROUND": "1",
        "OPD_STATUS": "running",
        "OPD_ROOT": str(tmp_path),
    }.items() <= variables.items()
    assert metrics == {"reverse_kl": 0.5}


def test_a_failure_has_its_reason(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    failed = STATE.model_copy(update={"status": "failed", "error": "disk full"})
    assert after_failure(Hooks(on_failure=f'echo "$OPD_STATUS $OPD_ERROR" > {out}'), run, failed, tmp_path) is None
    assert out.read_text() == "failed disk full\n"


@pytest.mark.parametrize(
    ("command", "why"),
    [(("false",), "exit code 1"), ("exit 3", "exit code 3"), (("no-such-program",), "no-such-program")],
)
def test_a_command_that_fails_is_a_warning_with_its_field(run: Run, tmp_path: Path, command, why) -> None:
    warning = after_round(Hooks(on_round=command), run, STATE, 1, tmp_path)
    assert warning is not None and "hooks.on_round" in warning and why in warning


def test_a_command_that_takes_too_long_ends_with_its_children(run: Run, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hooks = Hooks(on_round=f"sleep 1000 & echo $! > {pid}; wait", timeout=1)
    warning = after_round(hooks, run, STATE, 1, tmp_path)
    assert warning is not None and "hooks.timeout" in warning
    child = int(pid.read_text())
    eventually(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_an_empty_command_is_refused() -> None:
    for value in ("[]", "''", "['']"):
        with pytest.raises(ConfigError, match=r"hooks\.on_round"):
            load_experiment(TINY, [f"hooks.on_round={value}"])


def test_a_run_that_fails_calls_the_command_and_one_that_is_stopped_does_not(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    e = load_experiment(TINY, [f'hooks.on_failure=echo "$OPD_RUN $OPD_ERROR" >> {out}; exit 1'])
    for error in (KeyboardInterrupt(), StoreError("the disk went away")):

        def fail(*args: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(runner, "distill", fail)
        monkeypatch.setattr(runner, "nothing_to_do", lambda *args: False)
        with pytest.raises(type(error)):
            runner.run_experiment(e, name="base", root=tmp_path / "store", prefect=False)
    assert out.read_text() == "base the disk went away\n"
    log = Run.open(tmp_path / "store", "base").log_path("run").read_text()
    assert "warning: hooks.on_failure: exit code 1" in log
