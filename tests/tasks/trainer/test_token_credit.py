"""Rewards and token credit through the real trainer: rewards of the judge, contexts, and one rank or two."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from trainer_world import Judged, K, Made, World, assert_same_step, commit_table, make, make_judged

from storage.store import Artifact
from tasks.losses.token_credit.config import CreditConfig
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import Worker

CONFIG = TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 12, "max_grad_norm": None, "metrics_every": 1})
GROUP = {"kind": "group", "success_threshold": 0.5}
TOP = {"support": {"kind": "student_topk", "k": K, "outside": "bucket"}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"reward": GROUP, "clip": {}},
    "sdpo": {"route": "contexts", "beside": {**TOP, "is_clip": 2.0}},
    "srpo": {"reward": GROUP, "route": "srpo", "clip": {}, "beside": {**TOP, "weight": {"kind": "teacher_entropy"}}},
    "sod": {"reward": GROUP, "add": {"kind": "sod", "segments_of": "judge"}},
    "visd": {"reward": GROUP, "scale": {"kind": "visd", "k": K}, "advantage_at": "live"},
    "vopd": {"add": {"kind": "vopd", "k": K}, "ratio": "none", "advantage_at": "live"},
    "distil": {"beside": {**TOP, "sequence_gradient": {"gamma": 0.9}}},
    "power": {"add": {"kind": "power", "a": 0.5}, "ratio": "none", "last_token": False},
    "trace": {"reward": GROUP, "route": "spans", "beside": TOP},
}


@pytest.fixture(scope="module")
def judged(world: World) -> Judged:
    return make_judged(world)


def trained(judged: Judged, worker: Worker, name: str, tag: str, **runtime: Any) -> Made:
    world, objective = judged.world, CreditConfig.model_validate(OBJECTIVES[name])
    work = train_work(
        CONFIG, objective, world.student, None, judged.rollouts, world.signals, 0, 1,
        judged=judged.rewards, contexts=judged.contexts,
    )  # fmt: skip
    return make(work, world.store, worker, f"{name} {tag}", **runtime)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_and_micro_batches_change_no_gradient(name: str, judged: Judged, trainers: dict[int, Worker]) -> None:
    one = trained(judged, trainers[1], name, "one")
    two = trained(judged, trainers[2], name, "two", micro_batch_tokens=24)
    assert_same_step(one, two)
    (row,) = one.rows
    assert math.isfinite(row["grad_norm"]) and abs(row["log_ratio_mean"]) < 1e-5  # the first step is on-policy
    if "clip" in OBJECTIVES[name]:
        assert row["clip_fraction"] == 0


def test_rewards_alone_need_no_teacher(judged: Judged, trainers: dict[int, Worker]) -> None:
    """Where the teacher was not run the student is the same bit for bit, and what compares with the teacher is null."""
    world = judged.world
    rows = world.store.read_table(world.signals["sampled"], "sampled").to_pylist()
    unscored = [row | {"teacher_logprobs": None, "teacher_entropy": None} for row in rows]
    signals = world.signals | {"sampled": commit_table(world.store, "unscored", "sampled", unscored)}
    full = trained(judged, trainers[1], "grpo", "with a teacher")
    none = trained(replace(judged, world=replace(world, signals=signals)), trainers[1], "grpo", "without")
    mine, theirs = full.tensors("master"), none.tensors("master")
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)
    (of_full,), (row,) = full.rows, none.rows
    assert of_full["reverse_kl"] is not None and of_full["teacher_entropy"] is not None
    assert row["reverse_kl"] is None and row["teacher_entropy"] is None and row["loss"] == of_full["loss"]


def test_the_gate_of_antisd_survives_between_rounds(judged: Judged, trainers: dict[int, Worker]) -> None:
    """Two rounds of three steps, with a warm-up of four, remember what one round of six steps does."""
    world = judged.world
    objective = CreditConfig.model_validate({"reward": GROUP, "add": {"kind": "anti_sd", "warm_steps": 4}})
    config = CONFIG.model_copy(update={"samples_per_step": 4})

    def round_of(number: int, state: Artifact | None, student: Artifact, epochs: int) -> Made:
        work = train_work(
            config.model_copy(update={"epochs_per_round": epochs}), objective, student, state, judged.rollouts, world.signals,
            0, number, judged=judged.rewards, contexts=judged.contexts,
        )  # fmt: skip
        return make(work, world.store, trainers[1], f"gate {number} {epochs}")

    def memory(made: Made) -> dict[str, Any]:
        from tasks.trainer.state import read_memory

        folder = world.store.materialize(made.artifacts["trainer_state"], "state")
        return {name: values.tolist() for name, values in read_memory(folder).items()}

    first = round_of(1, None, world.student, 1)
    assert memory(first)["steps"] == [3] and not memory(first)["warm"] and memory(first)["entropies"]
    second = round_of(2, first.artifacts["trainer_state"], first.artifacts["student"], 1)
    assert memory(second)["steps"] == [6] and len(memory(second)["warm"]) == 1 and not memory(second)["entropies"]
