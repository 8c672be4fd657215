"""Ranks of the trainer on two nodes of a Ray cluster give what two ranks on one machine give."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from places import CHECKOUT, PLUGINS
from ray_nodes import nodes
from trainer_world import Made, World, make

from storage.artifacts.digests import weights_digest
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import Worker, WorkerPool
from tasks.workers.runtime import RuntimeConfig

pytestmark = pytest.mark.slow
OBJECTIVE = DirectConfig(support=TopkSupport(k=8, outside="bucket"))
ONE_STEP = TrainConfig(lr=1e-3, samples_per_step=12, max_grad_norm=None)
"""All samples in one step: from zero moments, exp_avg is 0.1 x the gradient."""
FOUR_EPOCHS = TrainConfig(lr=1e-3, samples_per_step=4, epochs_per_round=4)


@pytest.fixture(scope="module")
def over_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A trainer of two ranks, each on a node of its own, of different addresses."""
    with nodes(1, 1, addresses=(None, "127.0.0.2")) as cluster:
        runtime = RuntimeConfig.model_validate(
            {
                "device": "cpu",
                "threads": 1,
                "cluster": {"kind": "ray", "address": cluster.address},
                "trainer": {
                    "processes": 2,
                    "micro_batch_tokens": 64,
                    "head_chunk_tokens": 16,
                    "checkpoint_minutes": None,
                },
            }
        )
        folder = tmp_path_factory.mktemp("over-nodes")
        with WorkerPool(runtime, folder, ("trainer_with_overrides",), str(PLUGINS)) as pool:
            yield pool._worker("trainer", 0)
        log = (folder / "trainer.log").read_text()
        assert sum("trainer on node" in line and "(127.0.0.2)" in line for line in log.splitlines()) == 2  # of four


def trained(world: World, worker: Worker, tag: str, settings: TrainConfig, **runtime: object) -> Made:
    work = train_work(settings, OBJECTIVE, world.student, None, world.rollouts, world.signals, 0, 1)
    return make(work, world.store, worker, f"{tag} {settings.epochs_per_round} {sorted(runtime.items())}", **runtime)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_are_those_of_one_machine(world, trainers, over_nodes, stage):
    file = str(CHECKOUT / "configs" / "deepspeed" / f"zero{stage}.json")
    here = trained(world, trainers[2], "here", ONE_STEP, deepspeed=file)
    there = trained(world, over_nodes, "nodes", ONE_STEP, deepspeed=file)
    mine, others = here.tensors("exp_avg"), there.tensors("exp_avg")
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        torch.testing.assert_close(others[name], value, rtol=1e-6, atol=1e-6)


def test_students_are_equal_and_nothing_of_the_round_is_left(world, trainers, over_nodes):
    here = trained(world, trainers[2], "here", FOUR_EPOCHS)
    there = trained(world, over_nodes, "nodes", FOUR_EPOCHS)
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-6)
    students = [made.store.materialize(made.artifacts["student"]) for made in (here, there)]
    assert weights_digest(students[0]) == weights_digest(students[1])
    assert list(world.store.root.glob(".tmp-*")) == []
