"""When a run ends before its last round."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from storage.runs import RoundState, RunState, StageState
from storage.upkeep.stop_rules import StopRules


def state(*rounds: dict[str, float], seconds: float = 1800.0) -> RunState:
    """A run with these metrics in rounds 0, 1, ..., each evaluated, with two stages of equal time."""
    stages = {name: StageState(state="done", seconds=seconds) for name in ("train", "evaluate")}
    return RunState(
        name="run",
        rounds=[
            RoundState(round=number, student_sha256=f"s{number}", metrics=dict(metrics), stages=dict(stages))
            for number, metrics in enumerate(rounds)
        ],
    )


KL = "reverse_kl"


@pytest.mark.parametrize(
    ("rules", "rounds", "said"),
    [
        ({"accuracy": 0.9}, [{"accuracy_greedy": 0.95}, {"accuracy_greedy": 0.89}], None),
        ({"accuracy": 0.9}, [{}, {"accuracy_greedy": 0.9}], "policy.stop.accuracy: 90.0% is at least 90.0%"),
        ({"accuracy": 0.9}, [{}, {"accuracy_sampled": 0.91}], "91.0%"),
        ({"reverse_kl": 0.1}, [{KL: 0.5}, {KL: 0.1}], "policy.stop.reverse_kl: 0.1000 is at most 0.1"),
        ({"reverse_kl": 0.1}, [{KL: 0.5}, {KL: 0.11}], None),
        ({"rounds_without_gain": 2}, [{KL: 0.5}, {KL: 0.3}, {KL: 0.31}], None),
        ({"rounds_without_gain": 2}, [{KL: 0.5}, {KL: 0.3}, {KL: 0.31}, {KL: 0.3}], "since the best one, round 1"),
        ({"clipped": 0.5}, [{"clipped_ratio": 1.0}, {"clipped_ratio": 0.5}], "50.0% of the completions were cut off"),
        ({"entropy": 0.1}, [{}, {"train_student_entropy_last": 0.05}], "0.0500 nats per token is at most 0.1"),
        ({"hours": 2}, [{}, {}], "policy.stop.hours: 2.00 h"),
        ({"hours": 2.1}, [{}, {}], None),
        ({"tokens": 100}, [{}, {"rollout_tokens": 60.0}, {"rollout_tokens": 40.0}], "100 tokens of rollouts"),
        ({"accuracy": 0.5, "reverse_kl": 1.0}, [{}, {KL: 0.2}], "policy.stop.reverse_kl"),
        ({"accuracy": 0.5, "reverse_kl": 1.0}, [{}, {}], None),  # nothing was measured
        ({"reverse_kl": 10.0}, [{KL: 0.2}], None),  # round 0 ends no run
        ({}, [{}, {"accuracy_greedy": 1.0, KL: 0.0}], None),
    ],
)
def test_the_first_rule_that_holds_ends_the_run(rules, rounds, said):
    reason = StopRules.model_validate(rules).reason(state(*rounds))
    assert reason is None if said is None else said in str(reason)


@pytest.mark.parametrize(
    "rules", [{"accuracy": 1.2}, {"hours": 0}, {"tokens": 0}, {"rounds_without_gain": 0}, {"kl": 1}]
)
def test_bad_rules_are_refused(rules):
    with pytest.raises(ValidationError):
        StopRules.model_validate(rules)
