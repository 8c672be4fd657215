"""Two small rounds of a recipe: how small, what must be in the store afterwards, and a row of docs/log.md's table."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flows.cross_checks import needs_judge
from flows.experiment import Experiment
from storage.runs import RoundState, RunState
from storage.schemas import MaskReason
from storage.store import Artifact, Store

SAMPLES, ROUNDS, EVALUATED = 128, 2, 100

Rows = list[dict[str, Any]]


def small(e: Experiment) -> list[str]:
    """What is set so that a round has 128 completions and 8 steps, and an evaluation 100 prompts. Models, warm-ups and lengths
    are the recipe's own."""
    sizes = [f"rollout.prompts_per_round={SAMPLES // e.rollout.num_generations}", f"prompts.eval.count={EVALUATED}"]
    return [*sizes, f"policy.rounds={ROUNDS}"]


def check_run(store: Store, e: Experiment, state: RunState) -> None:
    """Two committed rounds of finite losses, each with another student; every sample has what the recipe promises for it."""
    assert state.status == "finished" and [r.round for r in state.rounds] == list(range(ROUNDS + 1))
    assert len({r.student_sha256 for r in state.rounds}) == ROUNDS + 1
    for number in range(ROUNDS + 1):
        measured(e, state.rounds[number])
    if "train" in e.contexts:  # the same for all samples of a prompt
        prompts = store.require("prepare", state.rounds[0].stages["prepare"].artifacts["prepare"])
        rows = store.read_table(prompts, "prompts", ["split", "teacher_token_ids"]).to_pylist()
        assert all(row["teacher_token_ids"] for row in rows if row["split"] == "train")
    for number in range(1, ROUNDS + 1):
        Round(store, e, state.rounds[number]).check()


def measured(e: Experiment, round: RoundState) -> None:
    accuracy, kl = round.metrics["accuracy_greedy"], round.metrics["reverse_kl"]
    assert accuracy is not None and 0 <= accuracy <= 1 and round.metrics["accuracy_greedy_n"] == EVALUATED
    assert kl is not None and math.isfinite(kl)


class Round:
    """One round's tables, by sample."""

    def __init__(self, store: Store, e: Experiment, round: RoundState) -> None:
        self.store, self.e, self.metrics, self.stages = store, e, round.metrics, round.stages
        assert {stage.state for stage in round.stages.values()} <= {"done", "cached"}
        self.rollouts = {row["sample_id"]: row for row in self.rows("rollout", "rollout", "rollouts")}

    def artifact(self, label: str, stage: str) -> Artifact:
        return self.store.require(stage, self.stages[label].artifacts[stage])

    def rows(self, label: str, stage: str, table: str) -> Rows:
        return self.store.read_table(self.artifact(label, stage), table).to_pylist()

    def check(self) -> None:
        assert len(self.rollouts) == SAMPLES
        assert all(row["completion_token_ids"] for row in self.rollouts.values())
        self.steps()
        rewards = self.rewards()
        contexts = self.contexts(rewards)
        self.signals()
        self.routed(rewards, contexts)

    def steps(self) -> None:
        """Every sample is in a step of every epoch; losses and gradients are finite, and there is a gradient."""
        rows = self.rows("train", "train", "training_steps")
        assert len(rows) == SAMPLES * self.e.train.epochs_per_round // self.e.train.samples_per_step
        assert sum(row["samples"] for row in rows) == SAMPLES * self.e.train.epochs_per_round
        assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
        assert any(row["grad_norm"] > 0 for row in rows)

    def rewards(self) -> dict[str, dict[str, Any]]:
        """By sample; empty where nothing reads rewards."""
        if not needs_judge(self.e):
            assert "judge" not in self.stages
            return {}
        rows = self.rows("judge", "judge", "rewards")
        assert [row["sample_id"] for row in rows] == list(self.rollouts)
        assert all(row["failed"] is None and row["reward"] in (0.0, 1.0) for row in rows)
        assert self.metrics["judge_reward"] == pytest.approx(sum(row["reward"] for row in rows) / SAMPLES)
        return {row["sample_id"]: row for row in rows}

    def contexts(self, rewards: dict[str, dict[str, Any]]) -> dict[str, bool]:
        """Whether each sample has a context."""
        if not self.e.sample_contexts:
            assert "context" not in self.stages
            return dict.fromkeys(self.rollouts, "train" in self.e.contexts)
        rows = self.rows("context", "context", "contexts")
        assert [row["sample_id"] for row in rows] == list(self.rollouts)
        found = {row["sample_id"]: row["prompt_token_ids"] is not None for row in rows}
        for row in rows:
            expected = len(self.e.sample_contexts) > 1 or self.has_sibling(row["sample_id"], rewards)
            assert found[row["sample_id"]] == expected, row
            assert (row["source"] == "none") == (not expected)
        return found

    def has_sibling(self, sample: str, rewards: dict[str, dict[str, Any]]) -> bool:
        """Whether another completion of the prompt is correct, and another text."""
        own = self.rollouts[sample]
        return any(
            other["prompt_id"] == own["prompt_id"]
            and other["completion_text"] != own["completion_text"]
            and rewards[name]["reward"] == 1
            for name, other in self.rollouts.items()
        )

    def signals(self) -> None:
        """Every signal has every sample, with a value for each token; nothing is without a token to learn from, but what is a
        teacher's prefix alone."""
        tables = [
            (label, name)
            for label, stage in self.stages.items()
            if label.startswith("supervise")
            for name in stage.artifacts
        ]
        asked = {need.name for need in self.e.objective.needs().signals}
        assert {name for _, name in tables} >= asked
        for name in asked:
            rows = {
                row["sample_id"]: row for label, one in tables if one == name for row in self.rows(label, name, name)
            }
            assert rows.keys() == self.rollouts.keys()
            for sample, row in rows.items():
                self.of_sample(name, sample, row)

    def of_sample(self, name: str, sample: str, row: dict[str, Any]) -> None:
        tokens = len(self.rollouts[sample]["completion_token_ids"])
        if name == "sampled":
            of = {"teacher": self.e.supervise.teacher.kind != "none", "student": self.e.supervise.student == "full"}
            given = [f"{model}_logprobs" for model, asked in of.items() if asked]
            assert given and all(row[f"{model}_logprobs"] is None for model, asked in of.items() if not asked)
            assert all(len(row[column]) == tokens and all(map(math.isfinite, row[column])) for column in given)
        elif name in ("teacher_topk", "student_topk"):
            assert len(row["ids"]) == tokens and all(count >= 1 for count in row["valid"])
        elif name == "mask":
            counted = [
                not reasons & int(sum(MaskReason[r.upper()] for r in self.e.train.mask_reasons))
                for reasons in row["mask_reasons"]
            ]
            assert len(counted) == tokens
            assert any(counted) or self.rollouts[sample]["prefix_length"] > 0, sample

    def routed(self, rewards: dict[str, dict[str, Any]], contexts: dict[str, bool]) -> None:
        """The share of samples whose divergence counts, by the rule of the route."""
        share = self.metrics.get("train_routed_samples")
        objective = self.e.objective
        if objective.estimator != "credit" or objective.beside is None:
            assert share is None
            return
        correct = {name: row["reward"] == 1 for name, row in rewards.items()}
        rule = {
            "all": lambda name: True,
            "divergence": lambda name: True,
            "contexts": lambda name: contexts[name],
            "srpo": lambda name: contexts[name] and not correct[name],
            "failed_groups": lambda name: not correct[name],
            "spans": lambda name: correct[name],
        }[objective.route.kind]
        expected = sum(map(rule, self.rollouts)) / SAMPLES
        assert share == pytest.approx(expected) if objective.route.kind != "spans" else 0 <= share <= expected


def table_row(name: str, state: RunState) -> str:
    """| recipe | KL before, after | loss of the last step | accuracy before, after | routed share of round 2 |"""
    before, after = state.rounds[0].metrics, state.rounds[-1].metrics

    def shown(metrics: dict[str, Any], metric: str, form: str) -> str:
        error = metrics.get(f"{metric}_se")
        return form.format(metrics[metric]) + (f" ± {form.format(error)}" if error is not None else "")

    cells = [f"`{name}`"]
    cells += [shown(metrics, "reverse_kl", "{:.4f}") for metrics in (before, after)]
    cells.append(f"{after['train_loss_last']:.4f}")
    cells += [shown(metrics, "accuracy_greedy", "{:.1%}") for metrics in (before, after)]
    routed = after.get("train_routed_samples")
    cells.append("" if routed is None else f"{routed:.1%}")
    return f"| {' | '.join(cells)} |"
