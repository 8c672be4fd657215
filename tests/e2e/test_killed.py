"""SIGKILL of the whole tree with the real engines, then `opd resume`: the undisturbed result, nothing left behind (row 1)."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_trials import FULL_SECONDS, Trials
from opd_cli import OPD
from places import TINY
from scripted_run import MARK, Trial

from storage.runs import Run
from storage.store import Store

ROUNDS = 2
STAGES = [f"{number} {label}" for number in (1, 2) for label in ("rollout", "supervise", "train", "evaluate")]
MOMENTS = 12
PATIENCE = 600.0


class RealTrial(Trial):
    """The tiny experiment by `opd`; round 0 is in the store."""

    def start(self, failpoint: str = "", log: bool = False) -> Any:
        known = (self.root / "runs" / "trial").exists()
        command = (
            ["resume", "trial"] if known else ["run", str(TINY), "--name", "trial", "--set", f"policy.rounds={ROUNDS}"]
        )
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OPD_"))}
        # libraries keep what they compile; that is no leftover of a run
        env |= {MARK: str(self.folder), "TMPDIR": str(self.temporary)}
        env |= {name: str(self.folder / "caches") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        with (self.folder / "output").open("a") as output:
            argv = [str(OPD), *command, "--no-prefect", "--root", str(self.root)]
            return subprocess.Popen(
                argv, stdout=output, stderr=output, cwd=self.folder, env=env, start_new_session=True
            )

    def run(self, failpoint: str = "", log: bool = False) -> int:
        return self.start().wait(PATIENCE)

    def stages(self) -> dict[str, str]:
        """ "round label" -> its state, of the stages that the run knows."""
        if not (self.root / "runs" / "trial" / "state.json").exists():
            return {}
        rounds = Run.open(self.root, "trial").state.rounds
        return {f"{r.round} {label}": stage.state for r in rounds for label, stage in r.stages.items()}

    def result(self) -> dict[str, Any]:
        store, state = Store(self.root), Run.open(self.root, "trial").state
        artifacts = store.list()
        assert all(store.verify(artifact, move=False) == [] for artifact in artifacts)
        return {
            "status": state.status,
            "students": {str(r.round): r.student_sha256 for r in state.rounds},
            "metrics": {str(r.round): r.metrics for r in state.rounds},
            "contents": {f"{a.stage}/{a.key}": a.content for a in artifacts},
        }


@dataclass
class Undisturbed:
    """What the run ends with when nothing happens to it, and how long it takes."""

    seconds: float
    stages: dict[str, float]
    result: dict[str, Any]


def undisturbed(prepared: Path, folder: Path) -> Undisturbed:
    trial = RealTrial.of(prepared, folder, ROUNDS)
    started = time.monotonic()
    assert trial.run() == 0, trial.output
    seconds = time.monotonic() - started
    rounds = Run.open(trial.root, "trial").state.rounds
    stages = {f"{r.round} {label}": stage.seconds or 0.0 for r in rounds for label, stage in r.stages.items()}
    found = Undisturbed(seconds, stages, trial.result())
    assert found.result["status"] == "finished" and set(STAGES) <= stages.keys()
    assert trial.leftovers() == [] and trial.orphans() == []
    trial.remove()
    return found


def wait_for(trial: RealTrial, process: Any, stage: str) -> None:
    """Until the stage is under way; warm engines do some in a tenth of a second."""
    deadline = time.monotonic() + PATIENCE
    while trial.stages().get(stage) not in ("running", "done"):
        assert process.poll() is None and time.monotonic() < deadline, trial.output
        time.sleep(0.01)


@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_killed_with_the_real_engines(prepared_root: Callable[[], Path], trials: Trials, tmp_path: Path) -> None:
    """Twelve moments, one in every twelfth of the run, and one within each stage of each round."""
    prepared = prepared_root()
    expected = undisturbed(prepared, tmp_path / "undisturbed")
    shared = set(Path("/dev/shm").iterdir())

    def attempt(name: str) -> None:
        trial = RealTrial.of(prepared, tmp_path / name.replace(" ", "-"), ROUNDS)
        draw = random.Random(f"real {name}")
        process = trial.start()
        what, _, number = name.partition(" ")
        if what == "moment":
            time.sleep(expected.seconds * (int(number) + draw.random()) / MOMENTS)
        else:
            wait_for(trial, process, name)
            time.sleep(draw.uniform(0, expected.stages[name]))
        kill(trial, process)
        assert trial.orphans() == []
        before = trial.stages()
        assert trial.run() == 0, trial.output
        found = trial.result()
        for part in found:
            assert found[part] == expected.result[part], part
        assert all(trial.stages()[stage] == "done" for stage, state in before.items() if state == "done")
        assert trial.leftovers() == [] and trial.orphans() == []
        assert set(Path("/dev/shm").iterdir()) <= shared
        trial.remove()

    names = [*STAGES, *(f"moment {number}" for number in range(MOMENTS))]
    trials(1, "SIGKILL of the tree at a random moment and in every stage, real engines", names, attempt)


def kill(trial: RealTrial, process: Any) -> None:
    """SIGKILL to everything that the trial has started; stopped first, so that nobody sees another die."""
    tree = trial.processes()
    for step in ("suspend", "kill"):
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(member, step)()
    process.wait(PATIENCE)
