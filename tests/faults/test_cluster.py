"""A run on a Ray cluster that loses a node, an actor, its own process or the head ends, after `opd resume`, with the undisturbed
result of one machine, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_trials import Trials, both_forms
from ray_nodes import QUIET, nodes
from registries import plugin_path
from scripted_run import CLUSTER, Trial, prepare_root

pytestmark = pytest.mark.slow  # every trial starts a cluster
LOST = ("an actor", "a node", "the run", "the head")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with plugin_path():
        yield prepare_root(tmp_path_factory.mktemp("cluster") / "store")


@pytest.fixture(scope="module")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of one machine."""
    trial = Trial.of(template, tmp_path_factory.mktemp("undisturbed") / "trial", rounds=1)
    assert trial.run() == 0, trial.output
    return trial.result()


def workers(trial: Trial) -> list[psutil.Process]:
    """The worker processes on the nodes."""
    found = []
    for process in trial.processes():
        try:
            if "tasks.workers.main" in process.cmdline() and "guard.py" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("what", LOST)
@both_forms(1, 13)
def test_what_is_lost_costs_no_result(count, what, template, undisturbed, tmp_path, trials: Trials):
    def attempt(name: str) -> None:
        lose(what, name, template, undisturbed, tmp_path / name.replace(" ", "-"))

    trials(1, f"SIGKILL of {what} of a Ray cluster", [f"{what} {number}" for number in range(count)], attempt)


def lose(what: str, name: str, template: Path, undisturbed: dict[str, Any], folder: Path) -> None:
    seed = random.Random(name)
    with nodes(1, 1, 1) as cluster:
        trial = Trial.of(template, folder, rounds=1, **QUIET, **{CLUSTER: cluster.address})
        process = trial.start()
        actor = at_work(trial, process, seed)
        if what == "an actor":
            os.kill(actor, signal.SIGKILL)
        elif what == "a node":
            cluster.kill(seed.randrange(cluster.workers))
        elif what == "the run":
            trial.kill(process)
        else:
            cluster.kill_head()
        code = process.exitcode if what == "the run" else ended(process)
        if what == "the head":
            assert code not in (0, None) and "runtime.cluster.address: no Ray cluster answers" in trial.output
            assert trial.orphans(90) == []
    if code != 0:
        with nodes(1, 1, 1) as cluster:
            trial.environment[CLUSTER] = cluster.address
            assert ended(trial.start()) == 0, trial.output
    assert trial.orphans(90) == []
    assert trial.result() == undisturbed and trial.leftovers() == []
    trial.remove()


def at_work(trial: Trial, process: Any, seed: random.Random) -> int:
    """Waits until the run has a worker, and for some seconds more. The process of an actor that has one."""
    deadline, later = time.monotonic() + 180, seed.uniform(0, 4)
    while True:
        assert process.exitcode is None and time.monotonic() < deadline, trial.output
        with suppress(psutil.Error, IndexError):
            actor = workers(trial)[0].parents()[2].pid  # two guards, then the actor
            if later <= 0:
                return int(actor)
            time.sleep(later)
            later = 0
        time.sleep(0.05)


def ended(process: Any) -> int | None:
    process.join(500)
    code: int | None = process.exitcode
    return code
