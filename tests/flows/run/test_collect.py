"""A run collects by itself after every round: what goes, what stays, and what earlier runs keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scripted_run
import yaml
from in_process import go, gone

from flows.experiment import Experiment, experiment_of
from flows.run.runner import bytes_of_run, fork_experiment, resume_experiment
from storage.errors import ConfigError
from storage.runs import RoundState, Run, RunState, StageState, _experiment
from storage.upkeep.retention import Retention, best_round, droppable, rebuild_cost


def experiment(rounds: int, **policy: Any) -> Experiment:
    return Experiment.model_validate(scripted_run.EXPERIMENT | {"policy": {"rounds": rounds} | policy})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return scripted_run.prepare_root(tmp_path / "store")


def test_a_new_run_keeps_two_trainer_states_and_the_best(root):
    said = go(root, experiment(5))
    best = best_round(Run.open(root, "one").state)
    assert gone(root) == {"trainer_state": [number for number in (1, 2, 3) if number != best]}
    assert any("trainer_state of round 1" in text and "collected" in text for text in said)
    assert any("fork at round 1" in text and "round 2" in text for text in said)
    assert go(root, experiment(5)) == []  # nothing was built, so nothing is collected


def test_named_rounds_and_fork_points_stay(root):
    go(root, experiment(2))
    go(root, fork_experiment("one", 2, root, ["seed=1", "policy.rounds=3"]), "fork")
    go(root, experiment(6, keep_rounds=[3]))
    best = best_round(Run.open(root, "one").state)
    assert gone(root)["trainer_state"] == [number for number in (1, 4) if number != best]


def test_other_retention_is_collected_too_and_a_restore_stays(root):
    go(root, experiment(4, retain={"rollouts": 1, "signals": 0}))
    lost = gone(root)
    assert lost["rollout"] == [1, 2, 3] and lost["teacher_topk"] == [1, 2, 3, 4] and 1 in lost["trainer_state"]
    go(root, resume_experiment("one", root, []), restore=2)
    assert 2 not in gone(root)["rollout"] and 2 not in gone(root)["teacher_topk"]


def test_a_run_can_keep_everything(root):
    go(root, experiment(4, collect=False))
    assert gone(root) == {}
    go(root, experiment(4, retain={"trainer_state": None}))
    go(root, experiment(5, retain={"trainer_state": None}))
    assert gone(root) == {}


def before_collection(root: Path, name: str) -> None:
    """Rewrites a run's experiment as a version without these fields stored it."""
    run = Run.open(root, name)
    data = run.experiment
    data["policy"] = {"rounds": data["policy"]["rounds"], "retain": data["policy"]["retain"] | {"trainer_state": None}}
    (run.directory / "experiment.yaml").write_bytes(_experiment(name, data))


def test_a_run_begun_before_keeps_what_it_kept(root):
    """However it goes on: by its config, by resume, in a fork."""
    go(root, experiment(1, collect=False))
    before_collection(root, "one")
    go(root, experiment(3))
    before_collection(root, "one")
    go(root, resume_experiment("one", root, ["policy.rounds=4"]))
    assert gone(root) == {}
    stored = Run.open(root, "one").experiment["policy"]
    assert stored["collect"] is False and stored["retain"]["trainer_state"] is None
    before_collection(root, "one")
    assert fork_experiment("one", 2, root, []).policy.collect is False
    go(root, experiment(5, collect=True, retain={"trainer_state": 1}))  # unless its config asks for it
    assert 1 in gone(root)["trainer_state"] or best_round(Run.open(root, "one").state) == 1


def test_another_running_run_keeps_its_artifacts(root):
    go(root, experiment(2, collect=False))
    go(root, experiment(2, collect=False), "other")  # the same experiment: it shares all artifacts
    with Run.open(root, "other").lock():
        go(root, experiment(4, retain={"rollouts": 0}))
        assert gone(root)["rollout"] == [3, 4]


def test_a_damaged_run_elsewhere_stops_the_collection_not_the_run(root):
    go(root, experiment(1, collect=False), "other")
    (Run.open(root, "other").directory / "state.json").write_text("{}")
    said = go(root, experiment(4))
    assert gone(root) == {} and any("nothing was collected" in text for text in said)
    assert Run.open(root, "one").state.status == "finished"


def test_policy_defaults_depend_on_what_the_config_says():
    assert experiment(1).policy.retain.trainer_state == 2 and experiment(1).policy.collect
    assert experiment(1, retain={"rollouts": 3}).policy.retain.model_dump() == {
        "rollouts": 3, "signals": None, "trainer_state": 2, "students": None,
    }  # fmt: skip
    assert experiment(1, retain={"trainer_state": None}).policy.retain.trainer_state is None
    whole = experiment(1)
    assert experiment_of(yaml.safe_load(whole.to_yaml()), "again").policy == whole.policy
    with pytest.raises(ConfigError, match="keep_rounds"):
        experiment_of(scripted_run.EXPERIMENT | {"policy": {"keep_rounds": [-1]}}, "bad")


def state_of(metrics: dict[int, dict[str, float]]) -> RunState:
    rounds = [
        RoundState(
            round=number, student_sha256="ab", metrics=values,
            stages={"train": StageState(state="done", seconds=10.0 + number, artifacts={
                "student": f"s{number}", "trainer_state": f"t{number}"})},
        )
        for number, values in metrics.items()
    ]  # fmt: skip
    return RunState(name="n", rounds=rounds)


def test_the_best_round_is_by_accuracy_else_by_kl():
    assert best_round(state_of({n: {"accuracy_greedy": a} for n, a in enumerate([0.1, 0.5, 0.5, 0.2])})) == 1
    equal = [(0.5, 0.3), (0.5, 0.1), (0.5, 0.1), (0.2, 0.0)]
    assert best_round(state_of({n: {"accuracy_greedy": a, "reverse_kl": kl} for n, (a, kl) in enumerate(equal)})) == 1
    assert best_round(state_of({n: {"reverse_kl": kl} for n, kl in enumerate([0.4, 0.3, 0.1, 0.2])})) == 2
    assert best_round(state_of({0: {}, 1: {}})) is None
    state = state_of({n: {"accuracy_greedy": a} for n, a in enumerate([0.1, 0.5, 0.4, 0.2, 0.3])})
    retain = Retention(trainer_state=1, students=1)
    assert droppable(state, retain) == {("trainer_state", f"t{n}") for n in (2, 3)} | {
        ("student", f"s{n}") for n in (2, 3)
    }
    assert droppable(state, retain, named=(2,), forked=(3,)) == set()
    assert ("student", "s1") in droppable(state, retain, best=False)  # `opd gc --keep`


def test_what_a_fork_costs_is_the_trainings_since_the_last_kept_state():
    state = state_of({n: {} for n in range(6)})
    dropped = {("trainer_state", f"t{n}") for n in (1, 3, 4)}
    assert rebuild_cost(state, dropped, 4) == ([3, 4], 27.0)
    assert rebuild_cost(state, dropped, 2) == ([], 0)
    assert rebuild_cost(state, dropped, 1) == ([1], 11.0)


def test_the_disk_of_a_run_is_the_sum_of_what_its_rounds_keep():
    """By hand: 4 prompts x 2 samples x 6 tokens; 8 bytes of rollouts and 24 + 8 x 4 of signals per token; 1000 parameters."""

    def disk(train: dict[str, Any], **policy: Any) -> dict[str, int]:
        data = scripted_run.EXPERIMENT | {"policy": {"rounds": 10} | policy}
        return bytes_of_run(Experiment.model_validate(data | {"train": scripted_run.EXPERIMENT["train"] | train}), 1000)

    tables = {"rollouts": 10 * 48 * 8, "signals": 10 * 48 * 56}
    assert disk({}) == tables | {"students": 40_000, "trainer_state": 3 * 12_000}
    assert disk({}, collect=False) == tables | {"students": 40_000, "trainer_state": 10 * 12_000}
    assert disk({"dtype": "bfloat16"}, retain={"rollouts": 0, "students": 1}) == {
        "rollouts": 48 * 8, "signals": 10 * 48 * 56, "students": 2 * 2_000, "trainer_state": 3 * 12_000,
    }  # fmt: skip
    assert disk({"lora": {"r": 4}}) == tables | {"students": 40_000, "trainer_state": 4_000}
