"""A run on a Ray cluster that loses a node, an actor, its own process or the head ends, after `opd resume`, with the undisturbed
result of one machine, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
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
    trial = Trial.of(template, tmp_path_factory.mktemp("undisturbed") / "trial")
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


@both_forms(1, 12)
def test_what_is_lost_costs_no_result(count, template, undisturbed, tmp_path, trials: Trials):
    for what in LOST:

        def attempt(name: str, what: str = what) -> None:
            lose(what, name, template, undisturbed, tmp_path / name.replace(" ", "-"))

        fault = f"SIGKILL of {what} of a Ray cluster"
        trials(1, fault, [f"{what} {number}" for number in range(count)], attempt)


def lose(what: str, name: str, template: Path, undisturbed: dict[str, Any], folder: Path) -> None:
    seed = random.Random(name)
    with nodes(1, 1, 1) as cluster:
        trial = Trial.of(template, folder, **QUIET, **{CLUSTER: cluster.address})
        process = trial.start()
        victim = at_work(trial, process, seed)
        if what == "an actor":
            os.kill(victim.parent().ppid(), signal.SIGKILL)  # type: ignore[union-attr]  # worker, guard, actor
        elif what == "a node":
            cluster.kill(seed.randrange(len(cluster.workers)))
        elif what == "the run":
            trial.kill(process)
        else:
            cluster.kill_head()
        code = process.exitcode if what == "the run" else ended(process)
        if what == "the head":
            assert code not in (0, None) and "runtime.cluster.address: no Ray cluster answers" in trial.output
            assert trial.orphans(60) == []
    if code != 0:
        with nodes(1, 1, 1) as cluster:
            trial.environment[CLUSTER] = cluster.address
            assert trial.run() == 0, trial.output
    assert trial.orphans(60) == []
    assert trial.result() == undisturbed and trial.leftovers() == []
    trial.remove()


def at_work(trial: Trial, process: Any, seed: random.Random) -> psutil.Process:
    """A worker of the run, at some moment after one has begun."""
    deadline = time.monotonic() + 180
    while not (found := workers(trial)):
        assert process.exitcode is None and time.monotonic() < deadline, trial.output
        time.sleep(0.05)
    time.sleep(seed.uniform(0, 8))
    return seed.choice(workers(trial) or found)


def ended(process: Any) -> int | None:
    process.join(300)
    code: int | None = process.exitcode
    return code
