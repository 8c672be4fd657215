"""Batches, schedules and launch commands: pure functions."""

from __future__ import annotations

import base64
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.trainer.batching import plan_steps, split_step
from tasks.trainer.config import LoraSettings, LrSchedule, TrainConfig
from tasks.trainer.launch import launch_command


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4))
def test_every_epoch_uses_every_row_once(rows: int, per_step: int, epochs: int) -> None:
    steps = plan_steps(3, 1, rows, per_step, rows * epochs)
    stream = [row for step in steps for row in step.rows]
    for epoch in range(epochs):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert all(len(step.rows) == per_step for step in steps[:-1])
    assert [step.epoch for step in steps] == [number * per_step // rows for number in range(len(steps))]


def test_order_depends_on_seed_round_and_epoch_alone() -> None:
    steps = plan_steps(3, 1, 20, 10, 40)
    assert steps == plan_steps(3, 1, 20, 10, 40)
    assert steps[:2] == plan_steps(3, 1, 20, 10, 20), "more epochs do not change the first"
    orders = {(steps[0].rows, steps[1].rows), (steps[2].rows, steps[3].rows)}
    orders |= {tuple(step.rows for step in plan_steps(seed, round, 20, 10, 20)) for seed, round in ((4, 1), (3, 2))}
    assert len(orders) == 4


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 200))
def test_a_split_keeps_every_sample_and_the_ranks_in_step(lengths: list[int], world: int, budget: int) -> None:
    ranks = split_step(lengths, world, budget)
    assert len(ranks) == world and len({len(micros) for micros in ranks}) == 1
    real = [micro for micros in ranks for micro in micros if not micro.filler]
    assert sorted(place for micro in real for place in micro.places) == list(range(len(lengths)))
    for micro in real:
        padded = len(micro.places) * max(lengths[place] for place in micro.places)
        assert padded <= budget or len(micro.places) == 1


def test_budget_does_not_change_which_rank_trains_what() -> None:
    lengths = [5, 9, 2, 7, 7, 1]
    wide, narrow = (split_step(lengths, 2, budget) for budget in (1000, 1))
    for few, many in zip(wide, narrow, strict=True):
        assert [p for m in few if not m.filler for p in m.places] == [p for m in many if not m.filler for p in m.places]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_pairs_stay_together_in_every_step(count: int, per_step: int, epochs: int, draw: random.Random) -> None:
    rows = list(range(2 * count))
    draw.shuffle(rows)
    pairs = np.array(rows).reshape(-1, 2)
    steps = plan_steps(3, 1, 2 * count, 2 * per_step, 2 * count * epochs, pairs)
    stream = [step.rows[at : at + 2] for step in steps for at in range(0, len(step.rows), 2)]
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == sorted(map(tuple, pairs.tolist()))
    assert all(step.together == 2 for step in steps)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=15), st.integers(1, 5), st.integers(1, 200))
def test_a_split_tears_no_pair(lengths: list[int], world: int, budget: int) -> None:
    lengths = [length for length in lengths for length in (length, (length * 7) % 50 + 1)]
    ranks = split_step(lengths, world, budget, 2)
    assert len(ranks) == world and len({len(micros) for micros in ranks}) == 1
    real = [micro for micros in ranks for micro in micros if not micro.filler]
    assert sorted(place for micro in real for place in micro.places) == list(range(len(lengths)))
    for micro in real:
        assert micro.places[1::2] == tuple(place + 1 for place in micro.places[::2]), (
            "both of a pair, one after the other"
        )
        assert all(place % 2 == 0 for place in micro.places[::2])
        padded = len(micro.places) * max(lengths[place] for place in micro.places)
        assert padded <= budget or len(micro.places) == 2, "a pair above the budget is alone"


def test_what_would_tear_a_pair_is_refused() -> None:
    pairs = np.arange(6).reshape(-1, 2)
    for per_step, total in ((3, 6), (2, 5)):
        with pytest.raises(ValueError, match="torn apart"):
            plan_steps(0, 1, 6, per_step, total, pairs)
    with pytest.raises(ValueError, match="torn apart"):
        plan_steps(0, 1, 8, 2, 8, pairs)
    with pytest.raises(ValueError, match="units of 2"):
        split_step([1, 2, 3], 1, 10, 2)


def test_schedule_warms_up_comes_down_and_holds() -> None:
    cosine = LrSchedule(kind="cosine", warmup_steps=4, horizon_steps=12, final_ratio=0.1)
    assert [cosine.factor(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert cosine.factor(8) == pytest.approx(0.55)
    assert cosine.factor(12) == cosine.factor(1000) == pytest.approx(0.1)
    linear = LrSchedule(kind="linear", horizon_steps=10)
    assert [linear.factor(step) for step in (1, 5, 10, 11)] == pytest.approx([0.9, 0.5, 0.0, 0.0])
    assert [LrSchedule(warmup_steps=2).factor(step) for step in (1, 2, 500)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"schedule": {"kind": "cosine"}}, "horizon_steps"),
        ({"schedule": {"kind": "linear", "warmup_steps": 9, "horizon_steps": 9}}, "horizon_steps"),
        ({"schedule": {"horizon_steps": 9}}, "horizon_steps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"lora": {"target_modules": ["lm_head"]}}, "target_modules"),
        ({"mask_reasons": ["eos"]}, "mask_reasons"),
        ({"importance_correction": {"kind": "truncated", "cap": 0}}, "cap"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
    ],
)
def test_config_refuses(fields: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 4} | fields)


def test_lora_is_null_by_default() -> None:
    assert TrainConfig(lr=0.1, samples_per_step=1).lora is None and LoraSettings().alpha == 32


def test_launch_gives_every_rank_its_gpu_in_order() -> None:
    def visible(argv: list[str]) -> list:
        [world] = [item.removeprefix("--world_info=") for item in argv if item.startswith("--world_info=")]
        return json.loads(base64.urlsafe_b64decode(world))["localhost"]

    assert visible(launch_command(2, "cuda", 1, ["GPU-1f", "5"])[0]) == ["GPU-1f", "5"]
    assert visible(launch_command(2, "cpu", 1)[0]) == [0, 1]


def test_a_single_rank_needs_no_launcher() -> None:
    argv, environment = launch_command(1, "cuda", 7, ["GPU-1f"])
    assert argv[1:] == ["-m", "tasks.workers.main", "trainer"]
    assert {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "7"}.items() <= environment.items()
