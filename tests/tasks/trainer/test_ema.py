"""The average that a teacher of kind `ema` is made of: real training against plain arithmetic in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer_world import Made, World, make

from storage.artifacts.checkpoints import CHECKPOINT
from storage.errors import OpdError
from tasks.inputs.teachers import EmaStudent
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import CHECKOUT, Worker

BUCKET = DirectConfig(support=TopkSupport(k=8, outside="bucket"))
ZERO = CHECKOUT / "configs" / "deepspeed"
Tensors = dict[str, torch.Tensor]


def settings(**fields: Any) -> TrainConfig:
    return TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 4} | fields)


FROZEN = settings(lr=0.0, betas=(0.0, 0.0))


def work_of(world: World, config: TrainConfig, average: EmaStudent, after: Made | None = None, round: int = 1) -> Any:
    student, state = (after.artifacts["student"], after.artifacts["trainer_state"]) if after else (world.student, None)
    return train_work(
        config, BUCKET, student, state, world.rollouts, world.signals, 0, round, average=average
    )  # fmt: skip


def averaged(before: Tensors, live: Tensors, decay: float) -> Tensors:
    """One update, each operation rounded to float32."""
    d, rest = np.float32(decay), np.float32(1 - decay)
    return {name: torch.from_numpy(d * before[name].numpy() + rest * live[name].numpy()) for name in before}


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


def weights(made: Made, name: str) -> Tensors:
    return load_file(made.store.materialize(made.artifacts[name]) / "model.safetensors")


def test_per_step_every_step_is_an_update(world: World, trainers: dict[int, Worker]) -> None:
    work = work_of(world, settings(), EmaStudent(decay=0.8, per="step"))
    with pytest.raises(OpdError, match="a failpoint"):
        make(
            work,
            world.store,
            trainers[1],
            "steps",
            checkpoint_minutes=0,
            failpoints="train.after_step=raise:OpdError@3",
        )
    saved = sorted((world.store.root / "artifacts").glob(f"*/*/{CHECKPOINT}*"))
    seen = [load_file(path / "rank-00000.safetensors") for path in saved]
    made = make(work, world.store, trainers[1], "steps", checkpoint_minutes=0)
    assert any("continuing after step 2" in line for line in made.said)
    kinds = [
        {
            kind: {n.removeprefix(f"{kind}/"): t for n, t in one.items() if n.startswith(f"{kind}/")}
            for kind in ("master", "ema")
        }
        for one in seen
    ]
    kinds.append({kind: made.tensors(kind) for kind in ("master", "ema")})
    assert len(kinds) == 3
    start = weights_of_student(world, kinds[0]["master"])
    for now in kinds:
        start = averaged(start, now["master"], 0.8)
        assert_equal(now["ema"], start)


def weights_of_student(world: World, like: Tensors) -> Tensors:
    found = load_file(world.store.materialize(world.student) / "model.safetensors")
    return {name: found[name].float() for name in like}


@pytest.fixture(scope="module")
def first(world: World, trainers: dict[int, Worker]) -> Made:
    return make(work_of(world, settings(), EmaStudent(decay=0.9)), world.store, trainers[1], "rounds")


def test_per_round_the_last_step_alone_counts_and_rounds_go_on(
    world: World, trainers: dict[int, Worker], first: Made
) -> None:
    average = EmaStudent(decay=0.9)
    start = averaged(weights_of_student(world, first.tensors("master")), first.tensors("master"), 0.9)
    assert_equal(first.tensors("ema"), start)
    second = make(work_of(world, settings(), average, first, 2), world.store, trainers[1], "rounds")
    after = averaged(start, second.tensors("master"), 0.9)
    assert_equal(second.tensors("ema"), after)
    exported = weights(second, "teacher_ema")
    assert_equal({name: exported[name] for name in after}, after)
    assert second.artifacts["teacher_ema"].meta["student_weights"] == second.artifacts["student"].content["weights"]
    assert second.artifacts["teacher_ema"].content["tokenizer"] == world.student.content["tokenizer"]


@pytest.mark.parametrize(("ranks", "zero"), [(1, None), (2, "zero2"), (2, "zero3")])
def test_no_topology_changes_a_bit(
    world: World, trainers: dict[int, Worker], first: Made, ranks: int, zero: str | None
) -> None:
    """Weights that stand still, so that three updates are known whatever the ranks."""
    runtime = {} if zero is None else {"deepspeed": str(ZERO / f"{zero}.json")}
    work = work_of(world, FROZEN, EmaStudent(decay=0.7, per="step"), first, 2)
    made = make(work, world.store, trainers[ranks], f"still {ranks} {zero}", **runtime)
    expected = first.tensors("ema")
    for _ in range(3):
        expected = averaged(expected, first.tensors("master"), 0.7)
    assert_equal(made.tensors("master"), first.tensors("master"))
    assert_equal(made.tensors("ema"), expected)


def test_with_adapters_the_adapters_are_averaged(world: World, trainers: dict[int, Worker]) -> None:
    config = settings(lora={"r": 4, "alpha": 8, "target_modules": ["q_proj"]}, lr=1e-2)
    made = make(work_of(world, config, EmaStudent(decay=0.6)), world.store, trainers[1], "adapters")
    ema, master = made.tensors("ema"), made.tensors("master")
    assert all("lora_" in name for name in ema)
    for name in (name for name in ema if "lora_B" in name):  # which begins as zero
        assert torch.equal(ema[name], master[name] * np.float32(1 - 0.6))
    [a, b] = [ema[f"model.layers.0.self_attn.q_proj.lora_{part}.default.weight"] for part in "AB"]
    base = load_file(world.store.materialize(world.student) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(weights(made, "teacher_ema")[name], base[name] + 2 * b @ a, atol=1e-6, rtol=0)
