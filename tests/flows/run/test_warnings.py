"""Warnings over a run's metrics: each at its threshold, none on a healthy run, once per run."""

from __future__ import annotations

import pytest

from flows.run.warnings import fresh, run_warnings
from storage.runs import RoundState, RunState

HEALTHY = {
    "reverse_kl": 0.4, "clipped_ratio": 0.1, "rollout_clipped_ratio": 0.1, "mean_length": 50.0, "rollout_mean_length": 50.0,
    "train_tokens": 900.0, "train_empty_steps": 0.0, "train_teacher_mass_last": 0.99, "train_student_entropy_last": 0.8,
    "train_tokens/math": 5.0,
}  # fmt: skip


def run(*changes: dict[str, float | None]) -> RunState:
    """Round 0, round 1 as it should be, then a round per change."""
    rounds = [{"reverse_kl": 0.5}, HEALTHY, *(HEALTHY | change for change in changes)]
    return RunState(name="demo", rounds=[RoundState(round=n, metrics=metrics) for n, metrics in enumerate(rounds)])


def test_a_healthy_run_has_none() -> None:
    assert run_warnings(run({}, {"mean_length": 99.0, "train_student_entropy_last": 0.3})) == []
    assert run_warnings(RunState(name="new")) == []


@pytest.mark.parametrize(
    ("change", "field", "number"),
    [
        ({"rollout_clipped_ratio": 0.8}, "rollout.max_completion_length", "80%"),
        ({"clipped_ratio": 1.0}, "evaluate.max_completion_length", "100%"),
        ({"train_tokens": 0.0}, "train.mask_reasons", "no token"),
        ({"train_empty_steps": 3.0}, "train.mask_reasons", "3 steps"),
        ({"train_tokens/math": 0.0}, "teachers.math", "no token"),
        ({"train_teacher_mass_last": 0.8}, "objective.support", "1.0% to 20.0%"),
        ({"rollout_mean_length": 101.0}, "rollout.max_completion_length", "50 to 101"),
        ({"mean_length": 150.0}, "evaluate", "50 to 150"),
        ({"judge_timed_out": 5.0, "judge_reward_n": 95.0, "judge_failed": 5.0}, "judge.timeout", "5 of 100"),
        ({"train_student_entropy_last": 0.1}, "policy.stop.entropy", "0.80 to 0.10"),
    ],
)
def test_each_names_its_field_its_round_and_its_number(change: dict[str, float], field: str, number: str) -> None:
    (line,) = run_warnings(run(change))
    assert line.startswith("round 2: ") and field in line and number in line and "\n" not in line


@pytest.mark.parametrize(
    "change",
    [
        {"rollout_clipped_ratio": 0.79},
        {"train_teacher_mass_last": 0.95},
        {"rollout_mean_length": 100.0},
        {"train_student_entropy_last": 0.17},
        {"clipped_ratio": None},
    ],
)
def test_just_below_a_threshold_there_is_none(change: dict[str, float | None]) -> None:
    assert run_warnings(run(change)) == []


def test_a_teacher_that_is_the_student_shows_at_round_0() -> None:
    state = RunState(name="demo", rounds=[RoundState(round=0, metrics={"reverse_kl": 1e-9})])
    (line,) = run_warnings(state)
    assert "teacher.source" in line


def test_a_mass_that_is_low_from_the_first_round_is_no_fall() -> None:
    low = {"train_teacher_mass_last": 0.7}
    state = RunState(name="demo", rounds=[RoundState(round=1, metrics=low), RoundState(round=2, metrics=low)])
    assert run_warnings(state) == []


def test_a_warning_is_new_once_and_gone_when_it_no_longer_holds() -> None:
    first, second = {"rollout_clipped_ratio": 0.9}, {"rollout_clipped_ratio": 0.95}
    before, after = run_warnings(run(first)), run_warnings(run(first, second))
    assert len(fresh([], before)) == 1 and len(after) == 1 and fresh(before, after) == []
    assert run_warnings(run(first, second, {})) == []
