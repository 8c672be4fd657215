"""`estimator: pairs` (PBSD) through the real trainer: its formula, ranks and micro-batches, a round that goes on, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus
from trainer_world import Made, Paired, World, assert_same_step, logprobs_of, make, make_paired, tiny_model

from storage.errors import InputError, OpdError
from storage.schemas import MaskReason
from tasks.losses.config import PairsConfig
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import Worker

BETA = 0.2
CONFIG = TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 12, "max_grad_norm": None, "metrics_every": 1})
LOST = 3
"""The sample of which no token counts."""


@dataclass
class Trained:
    """Trains on the world's samples as pairs."""

    world: World
    paired: Paired

    def __call__(self, worker: Worker, tag: str, config: TrainConfig = CONFIG, **runtime: Any) -> Made:
        objective, of = PairsConfig(beta=BETA), self.paired
        work = train_work(config, objective, self.world.student, None, of.rollouts, of.signals, 0, 1)
        return make(work, self.world.store, worker, f"pairs {tag}", **runtime)


@pytest.fixture(scope="module")
def trained(world: World) -> Trained:
    return Trained(world, make_paired(world))


def counted(made: Made) -> tuple[float, float]:
    """Of the round's metrics."""
    metrics = made.artifacts["train"].meta["metrics"]
    return metrics["pairs"], metrics["pairs_left_out"]


def test_it_is_its_formula(trained: Trained, trainers: dict[int, Worker]) -> None:
    """From stored signals and the model alone: tokens that the teacher wrote count, masked ones do not, and a pair with a
    completion of which nothing counts is not in the mean."""
    world, student, margins = trained.world, tiny_model(1), []
    sampled = {row["sample_id"]: row for row in world.store.read_table(world.signals["sampled"], "sampled").to_pylist()}
    heights = []
    for row, mask in zip(world.samples, trained.paired.masks, strict=True):
        completion = torch.tensor(row["completion_token_ids"])
        log_p = logprobs_of.__wrapped__(student, row["prompt_token_ids"], row["completion_token_ids"])
        d = log_p.gather(1, completion[:, None])[:, 0] - torch.tensor(sampled[row["sample_id"]]["teacher_logprobs"])
        heights.append(d[(torch.tensor(mask) & ~int(MaskReason.TEACHER_PREFIX)) == 0])
    for own, teachers in zip(heights[::2], heights[1::2], strict=True):
        if len(own) and len(teachers):
            margins.append(teachers.sum() - own.sum())
    assert len(margins) == 5 and len(heights[LOST]) == 0 and len(heights[LOST - 1]) > 0
    loss = softplus(-BETA * torch.stack(margins)).mean()
    loss.backward()
    made = trained(trainers[1], "formula")
    assert made.losses[0] == pytest.approx(float(loss.detach()), abs=1e-5)
    gradient = made.tensors("exp_avg")
    for name, parameter in student.named_parameters():
        if name in gradient:
            torch.testing.assert_close(gradient[name] * 10, parameter.grad, rtol=1e-3, atol=1e-6)
    (row,) = made.rows
    assert row["tokens"] == sum(map(len, heights)) and row["samples"] == 12
    assert counted(made) == (6, 1)
    assert any("left out 1 of 6 pairs" in line for line in made.said)


def test_ranks_and_micro_batches_change_no_gradient(trained: Trained, trainers: dict[int, Worker]) -> None:
    """Also where no pair fits into the budget: each is a micro-batch of its own."""
    one = trained(trainers[1], "one", micro_batch_tokens=4096)
    for tokens in (64, 24, 1):
        two = trained(trainers[2], f"two {tokens}", micro_batch_tokens=tokens)
        assert_same_step(one, two)
        assert counted(one) == counted(two) == (6, 1)


def test_the_margin_grows_step_by_step(trained: Trained, trainers: dict[int, Worker]) -> None:
    config = CONFIG.model_copy(update={"samples_per_step": 4, "epochs_per_round": 8})
    losses = trained(trainers[1], "descent", config).losses
    assert len(losses) == 24 and losses[-3:].mean() < losses[:3].mean() - 0.1


def test_a_round_that_stops_goes_on_bit_for_bit(trained: Trained, trainers: dict[int, Worker]) -> None:
    config = CONFIG.model_copy(update={"samples_per_step": 4, "epochs_per_round": 2})
    whole = trained(trainers[1], "whole", config)
    with pytest.raises(OpdError, match="a failpoint"):
        stop = {"checkpoint_minutes": 0, "failpoints": "train.after_step=raise:OpdError@4"}
        trained(trainers[1], "stopped", config, **stop)
    again = trained(trainers[1], "stopped", config, checkpoint_minutes=0)
    assert any("continuing after step 3" in line for line in again.said)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in whole.rows] and len(again.rows) == 6
    for name in ("student", "trainer_state"):
        assert again.artifacts[name].content == whole.artifacts[name].content
    assert counted(again) == counted(whole) == (12, 2)


def test_rollouts_that_are_no_pairs_are_refused(trained: Trained, trainers: dict[int, Worker]) -> None:
    other = Trained(trained.world, replace(trained.paired, rollouts=trained.world.rollouts))
    with pytest.raises(InputError, match=r"'p0/1/0' \(written by student\) has no partner"):
        other(trainers[1], "no pairs")
