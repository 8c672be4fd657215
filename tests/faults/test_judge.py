"""A verifier that hangs, ends its process, prints secrets or returns nonsense costs one completion's reward (row 20), and a run
that ends meanwhile leaves nothing behind (row 10). An edited verifier makes what depends on it again, and says so (row 12).

`tests/tasks/test_judge.py` has the same faults at the level of the stage."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_trials import Trials, both_forms
from registries import plugin_path
from scripted_run import EXPERIMENT, NAME, OWN_PLUGINS, VARIANTS, Trial, experiment, prepare_root
from secrets_search import places
from stopping import PATIENCE, STOPS, StoppedRun, one_stop

from storage.runs import Run
from storage.store import Store

SECRET = "correct-horse-battery-staple"
WHY = {
    "hang": "'judges:struck' took longer than judge.timeout (1 s)",
    "spin": "'judges:struck' took longer than judge.timeout (1 s)",
    "stop": "'judges:struck' took longer than judge.timeout (1 s)",
    "family": "'judges:struck' took longer than judge.timeout (1 s)",
    "exit": "'judges:struck' ended its process (exit 3)",
    "quit": "'judges:struck' ended its process (exit 1)",
    "linger": "'judges:struck' ended its process (exit 4)",
    "disconnect": "'judges:struck' ended its process (it closed its connection)",
    "mute": "'judges:struck' ended its process (it closed its connection)",
    "crash": "'judges:struck' ended its process (killed by signal 11)",
    "slain": "'judges:struck' ended its process (killed by signal 9)",
    "raise": "'judges:struck': ValueError: no score, key *** second line",
    "nan": "'judges:struck': the reward is nan, no finite number",
    "inf": "'judges:struck': the reward is inf, no finite number",
    "span": "'judges:struck': 'spans': (0, 99) is past the completion of {tokens} tokens",
    "print": None,
    "leak": None,
}
"""A fault of one completion -> why it has no reward; null where it has one."""
GIVEN = {"print": (1.0, None), "leak": (0.5, "see ***")}
"""Reward and feedback of those that have one."""


@dataclass
class World:
    template: Path
    result: dict[str, Any]
    rewards: dict[str, dict[str, Any]]
    completions: dict[str, dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


def rows_of(root: Path, stage: str, table: str) -> dict[str, dict[str, Any]]:
    """The first round's rows by sample_id."""
    key = Run.open(root, NAME).state.rounds[1].stages[stage].artifacts[stage]
    store = Store(root)
    rows = store.read_table(store.require(stage, key), table).to_pylist()
    return {row["sample_id"]: row for row in rows}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run whose verifier meets no fault."""
    folder = tmp_path_factory.mktemp("struck")
    root = prepare_root(folder / "store", experiment(0, "struck"))
    trial = Trial.of(root, folder / "run", variant="struck")
    assert trial.run() == 0, trial.output
    rewards, completions = rows_of(trial.root, "judge", "rewards"), rows_of(trial.root, "rollout", "rollouts")
    assert {row["reward"] for row in rewards.values()} == {0.0, 1.0}
    found = World(root, trial.result(), rewards, completions)
    trial.remove()
    return found


SHORT = ("stop 1", "crash 2")


@both_forms(short=len(SHORT), full=3 * len(WHY))
def test_a_verifier_that_fails_costs_one_reward(world: World, trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        kind = name.split()[0]
        text = random.Random(name).choice(sorted(row["completion_text"] for row in world.completions.values()))
        fault = {"OPD_TEST_JUDGE": json.dumps({"kind": kind, "text": text}), "JUDGE_API_KEY": SECRET}
        trial = Trial.of(world.template, tmp_path / name.replace(" ", "-"), variant="struck", **fault)
        trial.environment["OPD_TEST_JUDGE_FOLDER"] = str(trial.folder)
        assert trial.run() == 0, trial.output
        assert rows_of(trial.root, "rollout", "rollouts") == world.completions
        found, struck = rows_of(trial.root, "judge", "rewards"), 0
        for sample, row in found.items():
            completion = world.completions[sample]
            if completion["completion_text"] != text:
                assert row == world.rewards[sample]
                continue
            struck += 1
            reason = WHY[kind]
            why = None if reason is None else reason.format(tokens=len(completion["completion_token_ids"]))
            assert row["failed"] == why
            assert (row["reward"], row["feedback"]) == GIVEN.get(kind, (None, None))
        assert struck
        assert trial.orphans() == [] and trial.leftovers() == []
        log = "".join(path.read_text() for path in trial.root.glob(f"runs/{NAME}/logs/*.log"))
        assert ("have no reward" in log) == (WHY[kind] is not None)
        assert (kind != "print") or all(f"{what} ***" in log for what in ("printed", "to stderr", "by the system"))
        assert places([SECRET], trial.folder) == [] and places([SECRET], trial.temporary) == []
        trial.remove()

    names = [f"{kind} {number}" for number in range(3) for kind in WHY]
    fault = "a verifier hangs, ends its process, crashes, raises, prints secrets, returns nonsense at one completion"
    trials(20, fault, SHORT if count == len(SHORT) else names, attempt, parallel=2)


# --- a run that ends meanwhile ---------------------------------------------------------------------------------------


class HangingJudge(StoppedRun):
    """A run whose verifier starts a family and hangs at the first completion, where a role is written."""

    def write(self, role: str | None) -> None:
        judge = VARIANTS["struck"]["judge"] | {"timeout": 600}
        config = EXPERIMENT | VARIANTS["struck"] | {"judge": judge, "policy": {"rounds": self.rounds}}
        (self.folder / "config.yaml").write_text(json.dumps(config))
        if role is not None:
            (self.root / "family").write_text(role)

    def begin(self, *more: str, prefect: bool = False, **environment: str) -> Any:
        if (self.root / "family").exists():
            environment |= {"OPD_TEST_JUDGE": json.dumps({"kind": "family", "text": None})}
            environment |= {"OPD_TEST_JUDGE_FOLDER": str(self.root)}
        return super().begin(*more, prefect=prefect, **environment)


STOPPED = ("SIGKILL", "worker-killed")


@both_forms(short=1, full=2 * len(STOPS))
def test_a_run_that_ends_while_its_verifier_hangs(world: World, trials: Trials, tmp_path: Path, count: int) -> None:
    whole = HangingJudge.of(world.template, tmp_path / "whole")
    whole.write(None)
    process = whole.begin()
    process.join(PATIENCE)
    assert whole.ended(process) == 0, whole.output
    expected = whole.result()

    def attempt(name: str) -> None:
        run = HangingJudge.of(world.template, tmp_path / name.replace(" ", "-"))
        one_stop(run, "judge", name.split()[0])
        assert run.resumed() == expected
        run.remove()

    names = [f"{how} {number}" for number in range(2) for how in (*STOPPED, *(x for x in STOPS if x not in STOPPED))]
    trials(10, "stopped in each way while a verifier hangs over a family of processes", names[:count], attempt)


# --- an edited verifier ----------------------------------------------------------------------------------------------

JUDGE = "def score(completion, answer):\n    return sum(map(ord, completion)) % 2\n"
EDITED = JUDGE.replace("% 2", "% 3 == 0")


class EditedJudge(StoppedRun):
    """A run whose verifier is a function in a file beside the store."""

    def write(self, role: str | None = None) -> None:
        judge = {"verifiers": [{"kind": "function", "target": "own_judge:score"}]}
        config = EXPERIMENT | VARIANTS["struck"] | {"judge": judge, "policy": {"rounds": self.rounds}}
        (self.folder / "config.yaml").write_text(json.dumps(config))
        self.file.write_text(JUDGE)

    @property
    def file(self) -> Path:
        return self.folder / "own_judge.py"

    def call(self, *arguments: str) -> str:
        """The output of a command that ends well."""
        before = len(self.output)
        process = self.opd(*arguments, **{OWN_PLUGINS: str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"})
        process.join(PATIENCE)
        assert process.exitcode == 0, self.output
        return self.output[before:]

    def keys(self) -> dict[tuple[int, str], dict[str, str]]:
        rounds = Run.open(self.root, NAME).state.rounds
        return {(r.round, label): dict(stage.artifacts) for r in rounds for label, stage in r.stages.items()}


@pytest.mark.promise(
    12, "the file of a judge's function edited between run and resume: what depends on it, and a warning"
)
def test_an_edited_verifier_makes_what_depends_on_it_and_says_so(world: World, tmp_path: Path) -> None:
    run, warning = EditedJudge.of(world.template, tmp_path / "run"), "the code of 'own_judge:score' has changed"
    run.write()
    assert warning not in run.call("run", str(run.folder / "config.yaml"), "--name", NAME, "--no-prefect")
    before, first = run.keys(), run.result()
    run.file.write_text(EDITED)
    output = " ".join(run.call("resume", NAME, "--no-prefect").split())
    after = run.keys()
    assert output.count(warning) == 1 and before[1, "judge"]["judge"] in output
    changed = {place for place in before if after[place] != before[place]}
    later = {(2, label) for label in ("rollout", "judge", "supervise", "train", "evaluate")}
    assert changed == {(1, "judge"), (1, "train"), (1, "evaluate")} | later
    run.file.write_text(JUDGE)
    assert warning not in " ".join(run.call("resume", NAME, "--no-prefect").split())
    assert run.keys() == before
    again = run.result()
    assert again["students"] == first["students"] and again["metrics"] == first["metrics"]
    assert first["contents"].items() <= again["contents"].items()
