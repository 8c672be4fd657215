"""Stopping leaves nothing behind (row 10): no process, no temporary file, no lock, whatever the workers have started; the exit
code and the run's state say what happened, and `opd resume` goes on to the undisturbed result."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_trials import Trials, both_forms
from stopping import PATIENCE, STOPS, StoppedRun, by, one_stop

ROLES = ("sampler", "scorer", "trainer")


class Undisturbed:
    def __init__(self, template: Path, folder: Path) -> None:
        self.template = template
        run = self.run(folder)
        run.write(None)
        started = time.monotonic()
        process = run.begin()
        process.join(PATIENCE)
        assert run.ended(process) == 0, run.output
        self.seconds = time.monotonic() - started
        self.result = run.result()

    def run(self, folder: Path) -> StoppedRun:
        return StoppedRun.of(self.template, folder)


@pytest.fixture(scope="module")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(template, tmp_path_factory.mktemp("undisturbed") / "run")


SHORT = ("trainer SIGINT-twice", "sampler SIGKILL", "scorer opd-stop", "scorer guard-killed")


@both_forms(short=len(SHORT), full=3 * len(ROLES) * len(STOPS))
def test_no_family_outlives_its_run(undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int) -> None:
    names = [f"{role} {how} {number}" for number in range(3) for role in ROLES for how in STOPS]

    def attempt(name: str) -> None:
        role, how, *_ = name.split()
        run = undisturbed.run(tmp_path / name.replace(" ", "-"))
        one_stop(run, role, how)
        assert run.resumed() == undisturbed.result
        run.remove()

    fault = "stopped in each way with grandchildren that ignore signals, left the session, lost their parent"
    trials(10, fault, SHORT if count == len(SHORT) else names, attempt, parallel=2)


@both_forms(short=1, full=100)
def test_stopped_at_a_random_moment(undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int) -> None:
    """Also while it starts, commits and ends: it either stops, and says so, or has finished."""

    def attempt(name: str) -> None:
        draw = random.Random(f"stop {name}")
        run = undisturbed.run(tmp_path / name)
        run.write(None)
        process = run.begin()
        wait_for_the_run(run, process)
        time.sleep(draw.uniform(0, undisturbed.seconds))
        numbers = draw.choice([(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGTERM, signal.SIGINT)])
        by(*numbers)(run, process, [])
        code = run.ended(process)
        assert code in (0, 130), run.output
        assert run.leftovers() == []
        assert run.resumed() == undisturbed.result
        run.remove()

    trials(10, "SIGINT, SIGTERM, SIGHUP at a random moment", map(str, range(count)), attempt, parallel=2)


def wait_for_the_run(run: StoppedRun, process: Any) -> None:
    """Until the run is known to the store."""
    while not (run.root / "runs" / "trial" / "state.json").exists():
        assert process.is_alive(), run.output
        time.sleep(0.01)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_the_runs_own_prefect_server_ends_with_it(
    undisturbed: Undisturbed, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)

    def attempt(name: str) -> None:
        role, how, *_ = name.split()
        run = undisturbed.run(tmp_path / name.replace(" ", "-"))
        one_stop(run, role, how, prefect=True)
        assert run.resumed() == undisturbed.result
        run.remove()

    names = [f"{role} {how}" for how in ("SIGINT", "SIGTERM", "SIGKILL", "opd-stop") for role in ROLES]
    trials(10, "the same with the store's own Prefect server", names, attempt)
