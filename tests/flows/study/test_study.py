"""Studies: what a study's YAML may say, which learning rate is chosen, and how a study goes on after anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import CHECKOUT

from flows.experiment import load_experiment
from flows.run.runner import open_run
from flows.study.results import best_lr, best_lrs, read_rows
from flows.study.run import run_study
from flows.study.spec import StudyPlan, load_study
from storage.errors import ConfigError, IdentityMismatch, NotEnoughSpace, OpdError
from storage.runs import RoundState, Run, StageState

RECIPES = CHECKOUT / "configs" / "recipes"
OPD_LR = load_experiment(RECIPES / "opd.yaml").train.lr
DIVERGED = "the loss is not finite at step 3 (round 1, epoch 0); samples: p1/1/0"


def small() -> dict[str, Any]:
    """Two methods in one group and one outside, two learning rates, two seeds."""
    return {
        "name": "small",
        "base": str(CHECKOUT / "tests" / "data" / "tiny.yaml"),
        "seeds": [0, 1],
        "rounds": 2,
        "methods": {
            "bucket": {"group": "direct"},
            "forward": {"set": {"objective.divergence": {"kind": "forward_kl"}}, "group": "direct"},
            "opd": {"config": str(RECIPES / "opd.yaml")},
        },
        "sweep": {"seeds": [7], "rounds": 1, "groups": {"direct": {"method": "bucket", "lrs": [1e-4, 1e-3, 1e-2]}}},
    }


def loaded(tmp_path: Path, study: dict[str, Any], root: Path | None = None) -> StudyPlan:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return load_study(path, root)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The small study with another value at a dotted path."""
    study = small()
    *parents, last = path.split("/")
    place: Any = study
    for key in parents:
        place = place[key]
    place[last] = value
    return study


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods/opd/groop", "direct", r"methods\.opd\.groop: unknown field; did you mean 'group'"),
        ("methods/opd/group", "dirct", r"methods\.opd\.group: 'dirct' is not in sweep\.groups; did you mean 'direct'"),
        ("methods/opd/set", {"student.warmup.stop_los": 1}, r"methods\.opd: .*\n +student\.warmup\.stop_los: unknown"),
        ("methods/opd/set", {"seed": 3}, r"methods\.opd\.set\.seed"),
        ("methods/opd/set", {"runtime.threads": 2}, r"methods\.opd\.set\.runtime"),
        ("methods/forward/set", {"train.lr": 1}, r"methods\.forward\.set\.train\.lr: the sweep of group 'direct'"),
        ("methods/opd/config", "recipes/none.yaml", r"recipes/none\.yaml: no such config file"),
        ("methods/not a name", {}, r"'study-small-not a name-s0' is not a valid run name"),
        ("set", {"policy": {"rounds": 3}}, r"set\.policy: a study sets seeds and rounds itself"),
        ("seeds", [1, 1], r"seeds: a value is repeated"),
        ("sweep", None, r"methods\.bucket\.group: 'direct' is not in sweep\.groups; there are: none"),
        ("sweep/groups/direct/method", "opd", r"groups\.direct\.method: 'opd' must belong to the group"),
        ("sweep/groups/direct/lrs", [1e-4, 1e-4], r"groups\.direct\.lrs: a value is repeated"),
        ("sweep/groups/other", {"method": "opd", "lrs": [1e-4]}, r"direct 3, other 1; give each equally many"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_place(tmp_path, path, value, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, changed(path, value))


def test_a_recipe_lies_over_the_studys_base_and_the_studys_fields_over_both(tmp_path):
    plan = loaded(tmp_path, changed("set", {"train.betas": [0.5, 0.6], "train": {"lr": 3e-4}}))
    opd = plan.experiment("opd", 5, None)
    assert (opd.rollout.top_p, opd.objective.estimator) == (1.0, "policy_gradient"), "the recipe's"
    assert (opd.train.lr, opd.train.betas) == (3e-4, (0.5, 0.6)), "the study's, for all methods"
    assert (opd.rollout.prompts_per_round, opd.train.samples_per_step) == (32, 16), "not those of the recipe's own base"
    assert (opd.seed, opd.policy.rounds) == (5, 2)
    assert plan.experiment("forward", 0, 1e-2).train.lr == 1e-2


@pytest.mark.parametrize(("folder", "path"), [(".", "configs/study.yaml"), ("configs", "study.yaml")])
def test_a_study_is_read_by_a_path_relative_to_the_working_directory(monkeypatch, folder, path):
    monkeypatch.chdir(CHECKOUT / folder)
    assert load_study(path).study.base == CHECKOUT / "configs" / "quickstart.yaml"


def test_the_studys_own_configs_fit_its_rounds_and_have_equal_budgets():
    plan = load_study(CHECKOUT / "configs" / "study.yaml")
    experiments = [plan.experiment(name, 0, None) for name in plan.study.methods]
    assert len({e.train.schedule for e in experiments}) == 1
    assert all(e.train.schedule.horizon_steps == plan.study.rounds * e.steps_per_round for e in experiments)
    assert (
        len({(e.rollout.prompts_per_round, e.rollout.num_generations, e.train.epochs_per_round) for e in experiments})
        == 1
    )


@pytest.mark.parametrize(
    ("finals", "best"),
    [
        ({1e-4: {0: 0.5}, 1e-3: {0: 0.2}, 1e-2: {0: 0.3}}, 1e-3),
        ({1e-3: {0: 0.2}, 1e-4: {0: 0.2}}, 1e-4),  # a tie: the smaller
        ({1e-4: {0: 0.5, 1: 0.5}, 1e-3: {0: 0.1, 1: None}}, 1e-4),  # failed on one seed
        ({1e-4: {0: 0.4, 1: 0.4}, 1e-3: {0: 0.1, 1: 0.9}}, 1e-4),  # the mean decides
        ({1e-4: {0: None}}, None),
        ({}, None),
    ],
)
def test_the_rate_with_the_lowest_mean_final_kl_is_chosen(finals, best):
    assert best_lr(finals) == best


def test_or_the_one_with_the_highest_mean_accuracy():
    finals = {1e-4: {0: 0.4, 1: 0.4}, 1e-3: {0: 0.9, 1: 0.1}, 1e-2: {0: 0.9, 1: None}}
    assert best_lr(finals, "accuracy") == 1e-3


class FakeRuns:
    """Takes the place of `run_experiment`: real run folders and states, no engines. The KL falls fastest at lr 1e-3."""

    def __init__(self, diverging: tuple[str, ...] = (), stop_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.diverging, self.stop_at = diverging, stop_at
        self.error: OpdError = OpdError(DIVERGED)

    def __call__(self, experiment, *, name, root, rounds, prefect, reporter, workers):
        run = open_run(experiment, name, root)
        state = run.state
        if state.status == "finished":
            return state, 0
        self.calls.append(name)
        if self.stop_at == len(self.calls):
            raise KeyboardInterrupt
        last = 1 if name in self.diverging else rounds + 1
        pace = 1 / (1 + abs(math.log10(experiment.train.lr / 1e-3)))
        state.rounds = [
            RoundState(
                round=number,
                metrics={"accuracy_greedy": 1 - math.exp(-number * pace), "reverse_kl": math.exp(-number * pace)},
                stages={"evaluate": StageState(state="done")},
            )
            for number in range(last)
        ]
        state.status = "finished"
        if name in self.diverging:
            state.status = "failed"
            state.rounds.append(
                RoundState(round=1, stages={"train": StageState(state="failed", error=str(self.error))})
            )
        run.save(state)
        if name in self.diverging:
            raise self.error
        return state, rounds


def fake(monkeypatch, **kwargs) -> FakeRuns:
    runs = FakeRuns(**kwargs)
    monkeypatch.setattr("flows.study.run.run_experiment", runs)
    return runs


def by_run(plan: StudyPlan, root: Path) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in read_rows(plan, root)}


def test_the_sweeps_choice_is_used_by_every_method_of_its_group_alone(tmp_path, monkeypatch):
    runs, plan = fake(monkeypatch), loaded(tmp_path, small())
    run_study(plan, tmp_path)
    assert runs.calls[:3] == [f"study-small-sweep-direct-{lr}-s7" for lr in ("0.0001", "0.001", "0.01")]
    lrs = {name: row["lr"] for name, row in by_run(plan, tmp_path).items() if row["part"] == "study"}
    assert lrs == {
        f"study-small-{method}-s{seed}": lr
        for method, lr in (("bucket", 1e-3), ("forward", 1e-3), ("opd", OPD_LR))
        for seed in (0, 1)
    }


def test_a_rate_that_diverges_is_out_and_a_method_that_does_is_recorded(tmp_path, monkeypatch):
    fake(monkeypatch, diverging=("study-small-sweep-direct-0.001-s7", "study-small-forward-s0"))
    plan = loaded(tmp_path, small())
    lines: list[str] = []
    run_study(plan, tmp_path, say=lines.append)
    found = by_run(plan, tmp_path)
    assert found["study-small-bucket-s0"]["lr"] == 1e-4
    assert (
        found["study-small-forward-s0"]["status"] == "failed" and DIVERGED in found["study-small-forward-s0"]["error"]
    )
    assert found["study-small-opd-s1"]["status"] == "finished", "the study goes on"
    assert sum(DIVERGED in line for line in lines) == 2


def test_a_group_without_a_rate_leaves_its_methods_out(tmp_path, monkeypatch):
    plan = loaded(tmp_path, small())
    fake(monkeypatch, diverging=tuple(run.name for run in plan.sweep_runs()))
    run_study(plan, tmp_path)
    done = {row["method"] for row in read_rows(plan, tmp_path) if row["part"] == "study"}
    assert done == {"opd"} and best_lrs(plan, read_rows(plan, tmp_path)) == {}


def test_repeating_goes_on_where_it_stopped_and_then_builds_nothing(tmp_path, monkeypatch):
    plan = loaded(tmp_path, small())
    stopped = fake(monkeypatch, stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, tmp_path)
    resumed = fake(monkeypatch)
    assert run_study(plan, tmp_path) > 0
    assert resumed.calls[0] == stopped.calls[-1] and len(stopped.calls) - 1 + len(resumed.calls) == 3 + 2 * 3
    again = fake(monkeypatch)
    assert run_study(plan, tmp_path) == 0 and again.calls == []


def test_no_rate_is_chosen_before_all_candidates_were_tried(tmp_path, monkeypatch):
    plan = loaded(tmp_path, small())
    fake(monkeypatch, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, tmp_path)
    assert best_lrs(plan, read_rows(plan, tmp_path)) == {}


def test_what_every_further_run_would_meet_stops_the_study(tmp_path, monkeypatch):
    runs = fake(monkeypatch, diverging=("study-small-sweep-direct-0.0001-s7",))
    runs.error = NotEnoughSpace("the disk is full")
    with pytest.raises(NotEnoughSpace):
        run_study(loaded(tmp_path, small()), tmp_path)
    assert len(runs.calls) == 1


def test_a_study_that_changed_asks_for_another_name(tmp_path, monkeypatch):
    fake(monkeypatch)
    run_study(loaded(tmp_path, small()), tmp_path)
    with pytest.raises(IdentityMismatch, match=r"train\.samples_per_step[\s\S]*give the study another `name`"):
        run_study(loaded(tmp_path, changed("set", {"train.samples_per_step": 8})), tmp_path)
    assert len(Run.list(tmp_path)) == 9


def test_a_study_that_has_begun_goes_on_with_a_field_without_effect(tmp_path, monkeypatch):
    """Also with the methods that have no run yet: they were in the file when it began. A new study is refused."""
    study = changed("methods/unread", {"config": str(RECIPES / "sdpo.yaml"), "set": {"objective.ratio": "none"}})
    with pytest.raises(ConfigError, match=r"methods\.unread: 1 problem.*\n  objective\.ratio: none has no effect"):
        loaded(tmp_path, study, tmp_path)
    fake(monkeypatch, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        run_study(loaded(tmp_path, small()), tmp_path)  # an earlier version accepted the file
    plan = loaded(tmp_path, study, tmp_path)
    again = fake(monkeypatch)
    run_study(plan, tmp_path)
    assert "study-small-unread-s1" in again.calls
    with pytest.raises(ConfigError, match=r"objective\.ratio: none has no effect"):
        loaded(tmp_path, study | {"set": {"train.samples_per_step": 8}}, tmp_path)
