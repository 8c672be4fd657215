"""SIGKILL of the whole tree with the real engines, then `opd resume`: the undisturbed result, nothing left behind (row 1)."""

from __future__ import annotations

import contextlib
import json
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
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "drafts": ("rollout.behaviour={kind: teacher_prefix, cap: 6, fraction: 0.5}",),
    "blended": (
        "rollout.behaviour={kind: trb, epsilon: 0.01}",
        "rollout.top_p=1.0",
        "rollout.shard_prompts=8",
        "teacher={source: {kind: ema, decay: 0.5, per: step}, warmup: null}",
    ),
    "rewards": (
        "rollout.num_generations=4",
        "rollout.prompts_per_round=16",
        "rollout.top_p=1.0",
        "teacher={source: {kind: initial}, warmup: null, context: ['{sibling} {prompt}', '{solution} {prompt}']}",
        "prompts.max_prompt_length=64",
        "judge={verifiers: [{kind: exact_match, extract: '#([0-9]+)$'}]}",
        "objective={estimator: credit, reward: group, clip: {}, add: {kind: anti_sd, warm_steps: 3}}",
    ),
}
"""What is changed in the tiny experiment: drafts of the teacher; a blended rollout, and the trainer's average as teacher;
rewards, contexts of samples, and an objective that remembers earlier steps (AntiSD, whose gate is warm after the third of 8)."""
WITHIN = {
    "drafts": ("1 draft", "1 rollout", "2 rollout"),
    "blended": ("1 rollout", "2 rollout", "1 train", "2 train"),
    "rewards": ("1 judge", "1 context", "1 supervise", "1 train", "2 judge", "2 train"),
}
WORDS = {
    "drafts": "drafts of the teacher",
    "blended": "blended rollouts, averaged teacher",
    "rewards": "rewards, contexts, AntiSD's gate",
}
MADE = {
    "drafts": set[str](),
    "blended": {"blending", "teacher_ema"},
    "rewards": {"judge", "context", "sampled", "mask", "trainer_state"},
}
"""What the replay of a round makes beside rollouts and student."""
"""Stages in which these runs are killed."""
PATIENCE = 600.0


class RealTrial(Trial):
    """The tiny experiment by `opd`; round 0 is in the store."""

    def start(self, failpoint: str = "", log: bool = False) -> Any:
        known = (self.root / "runs" / "trial").exists()
        changes = (f"policy.rounds={ROUNDS}", *VARIANTS[self.variant])
        sets = [word for change in changes for word in ("--set", change)]
        command = ["resume", "trial"] if known else ["run", str(TINY), "--name", "trial", *sets]
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


def undisturbed(prepared: Path, folder: Path, variant: str = "plain") -> Undisturbed:
    trial = RealTrial.of(prepared, folder, ROUNDS, variant)
    started = time.monotonic()
    assert trial.run() == 0, trial.output
    seconds = time.monotonic() - started
    rounds = Run.open(trial.root, "trial").state.rounds
    stages = {f"{r.round} {label}": stage.seconds or 0.0 for r in rounds for label, stage in r.stages.items()}
    found = Undisturbed(seconds, stages, trial.result())
    assert found.result["status"] == "finished" and set(STAGES) <= stages.keys()
    assert trial.leftovers() == [] and trial.orphans() == []
    if variant == "plain":
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
        killed_and_resumed(prepared, tmp_path, expected, name)
        assert set(Path("/dev/shm").iterdir()) <= shared

    names = [*STAGES, *(f"moment {number}" for number in range(MOMENTS))]
    trials(1, "SIGKILL of the tree at a random moment and in every stage, real engines", names, attempt)


@pytest.mark.parametrize("variant", WITHIN)
@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_killed_with_drafts_blends_and_rewards(
    prepared_root: Callable[[], Path], trials: Trials, tmp_path: Path, variant: str
) -> None:
    """Killed within the stages that these have beside a plain run's; and each round of the undisturbed run replays."""
    prepared = prepared_root()
    expected = undisturbed(prepared, tmp_path / "undisturbed", variant)
    what = WORDS[variant]

    def attempt(name: str) -> None:
        killed_and_resumed(prepared, tmp_path, expected, name, variant)

    def replayed(name: str) -> None:
        stages = "rollout,judge,context,supervise,train" if variant == "rewards" else "rollout,supervise,train"
        command = [str(OPD), "replay", "trial", "--round", name, "--stages", stages, "--json"]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OPD_"))}
        root = tmp_path / "undisturbed" / "store"
        done = subprocess.run(
            [*command, "--root", str(root)], capture_output=True, text=True, env=env, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)
        assert all(result["identical"] for result in results), results
        made = {result["artifact"].split("/")[0] for result in results}
        assert made >= {"rollout", "student"} | MADE[variant]

    trials(1, f"SIGKILL of the tree in a stage, real engines: {what}", WITHIN[variant], attempt)
    trials(13, f"a round replayed, real engines: {what}", [str(number + 1) for number in range(ROUNDS)], replayed)


def killed_and_resumed(
    prepared: Path, tmp_path: Path, expected: Undisturbed, name: str, variant: str = "plain"
) -> None:
    """`name`: "moment N", a twelfth of the run, or "round stage"."""
    trial = RealTrial.of(prepared, tmp_path / name.replace(" ", "-"), ROUNDS, variant)
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
    trial.remove()


def kill(trial: RealTrial, process: Any) -> None:
    """SIGKILL to everything that the trial has started; stopped first, so that nobody sees another die."""
    tree = trial.processes()
    for step in ("suspend", "kill"):
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(member, step)()
    process.wait(PATIENCE)
