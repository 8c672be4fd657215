"""Trust regions, the student's candidates and a plugin's credit through the real trainer: one rank or two make no difference."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from places import CHECKOUT
from trainer_world import K, Made, World, assert_same_step, logprobs_of, make, tiny_model

from storage.errors import InputError
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec
from tasks.losses.config import PolicyGradientConfig
from tasks.losses.credit import CREDITS
from tasks.losses.trust_regions import TRUST_REGIONS
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import Worker

CONFIG = TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 12, "max_grad_norm": None, "metrics_every": 1})
FIELDS = {
    "tropd": {"k": K, "gate": "bernoulli"},
    "entropy_gate": {"k": K, "threshold": 5.12},
    "advantage_floor": {"floor": -0.5},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    kind: {"trust_region": {"kind": kind, **FIELDS.get(kind, {})}} for kind in TRUST_REGIONS.classes
} | {"candidates": {"support": {"kind": "student_topk", "k": K}}, "weighted": {"token_weight": {"kind": "position"}}}


def trained(world: World, worker: Worker, name: str, tag: str, **runtime: Any) -> Made:
    objective = PolicyGradientConfig.model_validate({"ppo_clip": 0.2, **OBJECTIVES[name]})
    work = train_work(CONFIG, objective, world.student, None, world.rollouts, world.signals, 0, 1)
    return make(work, world.store, worker, f"{name} {tag}", **runtime)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_and_micro_batches_change_no_gradient(name: str, world: World, trainers: dict[int, Worker]) -> None:
    one = trained(world, trainers[1], name, "one")
    two = trained(world, trainers[2], name, "two", micro_batch_tokens=24)
    assert_same_step(one, two, least=1e-4)
    (row,) = one.rows
    assert row["clip_fraction"] == 0 and abs(row["log_ratio_mean"]) < 1e-5  # the first step is on-policy
    gated = name in ("tropd", "entropy_gate", "advantage_floor")
    assert (row["outlier_fraction"] is not None and 0 < row["outlier_fraction"] < 1) == gated
    if name in ("tropd", "entropy_gate", "candidates"):
        assert 0 < row["teacher_mass"] <= 1 and 0 < row["student_mass"] <= 1
        # the share of the teacher's list: not known where the student's is all there is
        assert row["overlap_ratio"] is None if name == "candidates" else 0 < row["overlap_ratio"] < 1


def test_tropd_is_its_formula(world: World, trainers: dict[int, Worker]) -> None:
    """From stored signals and the model alone: M by the draws of (seed, sample id, position)."""
    from storage.identity import derive_seed

    student, total, count = tiny_model(1), torch.zeros(()), 0
    tables = {name: world.store.read_table(world.signals[name], name).to_pylist() for name in ("teacher_topk", "mask")}
    sampled = {row["sample_id"]: row for row in world.store.read_table(world.signals["sampled"], "sampled").to_pylist()}
    for row, lists, mask in zip(world.samples, tables["teacher_topk"], tables["mask"], strict=True):
        completion = torch.tensor(row["completion_token_ids"])
        log_p = logprobs_of.__wrapped__(student, row["prompt_token_ids"], row["completion_token_ids"])
        live = log_p.gather(1, completion[:, None])[:, 0]
        signal = sampled[row["sample_id"]]
        log_u = torch.tensor(signal["teacher_logprobs"]) - torch.tensor(signal["student_logprobs"])
        key = derive_seed(0, "draws", row["sample_id"])
        draws = np.random.Generator(np.random.Philox(key=key)).random(len(completion), np.float32)
        trusted = torch.tensor(draws) < log_u.exp()
        ids, log_q = torch.tensor(lists["ids"]), torch.tensor(lists["logprobs"])
        forward_kl = (log_q.exp() * (log_q - log_p.gather(1, ids))).sum(1)
        policy = -log_u.clamp(-6, 6) * (live - live.detach()).exp()
        keep = torch.tensor(mask["mask_reasons"]) == 0
        total = total + torch.where(trusted, policy, forward_kl)[keep].sum()
        count += int(keep.sum())
    (total / count).backward()
    made = trained(world, trainers[1], "tropd", "formula")
    assert made.losses[0] == pytest.approx(float(total.detach() / count), abs=1e-5)
    gradient = made.tensors("exp_avg")
    for name, parameter in student.named_parameters():
        if name in gradient:
            torch.testing.assert_close(gradient[name] * 10, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.fixture
def extra_credits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The credits of the plugin that the trainers have loaded, forgotten afterwards."""
    monkeypatch.setattr(CREDITS, "classes", dict(CREDITS.classes))
    monkeypatch.syspath_prepend(str(CHECKOUT / "tests" / "plugins"))
    sys.modules.pop("extra_credits", None)  # an earlier test may have imported it, with other registries
    importlib.import_module("extra_credits")
    yield
    sys.modules.pop("extra_credits", None)


FAILED = (1, 2, 6, 10)
"""Samples whose judge failed: one of a group's three, and all of another's."""


def judged(world: World) -> tuple[Artifact, Artifact, list[dict[str, Any]]]:
    """The world's rollouts as three samples of each of four prompts, their rewards, and the rows of both together. The old column
    `rollouts.reward` has numbers that must not be read."""
    drawn = np.random.Generator(np.random.PCG64(7)).random(len(world.samples)).round(3).tolist()
    rows = [row | {"prompt_id": f"p{i % 4}", "reward": 100.0 + i} for i, row in enumerate(world.samples)]
    rewards = [
        {
            "sample_id": row["sample_id"],
            "reward": None if i in FAILED else drawn[i],
            "failed": "x" if i in FAILED else None,
        }
        for i, row in enumerate(rows)
    ]
    with world.store.building(ArtifactSpec.of("rollout", 1, {"judged": True}, {})) as builder:
        builder.write_shard("rollouts", 0, pa.Table.from_pylist(rows, schema_for("rollouts")))
        rollouts = builder.commit(content={}, tables={"rollouts": 1})
    with world.store.building(ArtifactSpec.of("judge", 1, {"judged": True}, {})) as builder:
        builder.write_shard("rewards", 0, pa.Table.from_pylist(rewards, schema_for("rewards")))
        table = builder.commit(content={}, tables={"rewards": 1})
    return rollouts, table, [row | {"reward": own["reward"]} for row, own in zip(rows, rewards, strict=True)]


def test_a_credit_of_a_plugin_is_its_formula(world: World, trainers: dict[int, Worker], extra_credits: None) -> None:
    """Every factor of a PPO(rho, m A_r + delta) + b w D by hand, from stored tables and the model alone; on one rank, and on
    two with micro-batches that tear groups apart."""
    rollouts, rewards, rows = judged(world)
    end = rows[0]["completion_token_ids"][1]
    objective = PolicyGradientConfig.model_validate(
        {"ppo_clip": 0.2, "advantage": {"kind": "grouped", "k": K, "end": end}}
    )
    work = train_work(CONFIG, objective, world.student, None, rollouts, world.signals, 0, 1, judged=rewards)
    one = make(work, world.store, trainers[1], "grouped one")
    two = make(work, world.store, trainers[2], "grouped two", micro_batch_tokens=24)
    tables = {
        name: {row["sample_id"]: row for row in world.store.read_table(world.signals[name], name).to_pylist()}
        for name in ("sampled", "teacher_topk", "mask")
    }
    student, total, count, trusted = tiny_model(1), torch.zeros(()), 0, 0
    for row in rows:
        signal, lists, mask = (tables[name][row["sample_id"]] for name in ("sampled", "teacher_topk", "mask"))
        completion = row["completion_token_ids"]
        log_p = logprobs_of.__wrapped__(student, row["prompt_token_ids"], completion)
        live = log_p.gather(1, torch.tensor(completion)[:, None])[:, 0]
        log_u = torch.tensor(signal["teacher_logprobs"]) - live.detach()
        group = [other["reward"] for other in rows if other["prompt_id"] == row["prompt_id"]]
        known = [reward for reward in group if reward is not None]
        reward = 0.0 if row["reward"] is None else row["reward"] - np.mean(known)
        segment = torch.tensor([completion[:t].count(end) for t in range(len(completion))])
        advantage = 0.5**segment * reward + log_u.clamp(-6, 6) / 10
        a = torch.tensor(signal["teacher_entropy"]) < 5.12
        ids, log_q = torch.tensor(lists["ids"]), torch.tensor(lists["logprobs"])
        forward_kl = (log_q.exp() * (log_q - log_p.gather(1, ids))).sum(1)
        weight = (-torch.tensor(signal["student_entropy"]) / 5).exp()
        loss = -(a * advantage) * (live - live.detach()).exp() + (reward < 0) * weight * forward_kl
        keep = torch.tensor(mask["mask_reasons"]) == 0
        total = total + loss[keep].sum()
        count, trusted = count + int(keep.sum()), trusted + int(a[keep].sum())
    assert 0 < trusted < count
    (total / count).backward()
    for made in (one, two):
        assert made.losses[0] == pytest.approx(float(total.detach() / count), abs=1e-5)
        gradient = made.tensors("exp_avg")
        for name, parameter in student.named_parameters():
            if name in gradient:
                torch.testing.assert_close(gradient[name] * 10, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_job_that_needs_rewards_is_refused_without(world: World, extra_credits: None) -> None:
    objective = PolicyGradientConfig.model_validate({"advantage": {"kind": "grouped", "k": K}})
    with pytest.raises(InputError, match="needs the rewards of the stage `judge`"):
        train_work(CONFIG, objective, world.student, None, world.rollouts, world.signals, 0, 1)
