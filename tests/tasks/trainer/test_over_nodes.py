"""Ranks of the trainer on several nodes of a Ray cluster, or hosts of a hostfile, give what two ranks on one machine give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from places import CHECKOUT, PLUGINS
from pretend_hosts import hosts
from ray_nodes import nodes
from trainer_world import Made, World, make

from storage.artifacts.digests import weights_digest
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import Worker, WorkerDied, WorkerPool
from tasks.workers.runtime import RuntimeConfig

pytestmark = pytest.mark.slow
OBJECTIVE = DirectConfig(support=TopkSupport(k=8, outside="bucket"))
ONE_STEP = TrainConfig(lr=1e-3, samples_per_step=12, max_grad_norm=None)
"""All samples in one step: from zero moments, exp_avg is 0.1 x the gradient."""
FOUR_EPOCHS = TrainConfig(lr=1e-3, samples_per_step=4, epochs_per_round=4)


PLACED = {"2 ranks on 2 nodes": (1, 1), "4 ranks on 2 nodes": (2, 2), "4 ranks on 4 nodes": (1, 1, 1, 1)}
"""CPUs of the nodes, each of an address of its own; a rank needs one."""
ON_HOSTS = {"2 ranks on 2 hosts": (1, 1), "2 ranks on 1 host": (2,), "3 ranks on 2 hosts": (2, 1)}
"""Slots of the hosts."""


def pool_of(cluster: dict[str, str], ranks: int, folder: Path) -> WorkerPool:
    trainer = {"processes": ranks, "micro_batch_tokens": 64, "head_chunk_tokens": 16, "checkpoint_minutes": None}
    fields = {"device": "cpu", "threads": 1, "cluster": cluster, "trainer": trainer}
    return WorkerPool(RuntimeConfig.model_validate(fields), folder, ("trainer_with_overrides",), str(PLUGINS))


@contextmanager
def on_hosts(slots: tuple[int, ...], folder: Path) -> Iterator[Worker]:
    """A trainer whose ranks fill hosts with so many slots; nothing is left of it on them."""
    names = {f"127.0.0.{number}": count for number, count in enumerate(slots, 1)}
    with hosts(folder / "hosts", names) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CHECKOUT / "tests" / "support"))
        with pool_of({"kind": "hostfile", "hostfile": str(running.file)}, sum(slots), folder) as pool:
            yield pool._worker("trainer", 0)
        assert running.empty() and len(running.asked()) == len(slots)


@pytest.fixture(scope="module", params=[*PLACED, *ON_HOSTS])
def over_nodes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Worker, int, str]]:
    """A trainer whose ranks fill the nodes, their number, and what it is called."""
    folder = tmp_path_factory.mktemp("over-nodes")
    if slots := ON_HOSTS.get(request.param):
        with on_hosts(slots, folder) as worker:
            yield worker, sum(slots), request.param
        return
    cpus = PLACED[request.param]
    others = [f"127.0.0.{number}" for number in range(2, len(cpus) + 1)]
    with nodes(*cpus, addresses=(None, *others)) as cluster:
        with pool_of({"kind": "ray", "address": cluster.address}, sum(cpus), folder) as pool:
            yield pool._worker("trainer", 0), sum(cpus), request.param
        placed = [line for line in (folder / "trainer.log").read_text().splitlines() if "trainer on node" in line]
        for count, address in zip(cpus[1:], others, strict=True):
            assert sum(f"({address})" in line for line in placed) == count * len(placed) / sum(cpus) > 0


def trained(world: World, worker: Worker, tag: str, settings: TrainConfig, **runtime: object) -> Made:
    work = train_work(settings, OBJECTIVE, world.student, None, world.rollouts, world.signals, 0, 1)
    return make(work, world.store, worker, f"{tag} {settings.epochs_per_round} {sorted(runtime.items())}", **runtime)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_are_those_of_one_machine(world, trainers, over_nodes, stage):
    file = str(CHECKOUT / "configs" / "deepspeed" / f"zero{stage}.json")
    worker, _, which = over_nodes
    here = trained(world, trainers[2], f"here, beside {which}", ONE_STEP, deepspeed=file)
    there = trained(world, worker, which, ONE_STEP, deepspeed=file)
    mine, others = here.tensors("exp_avg"), there.tensors("exp_avg")
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        torch.testing.assert_close(others[name], value, rtol=1e-6, atol=1e-6)


def test_students_are_equal_and_nothing_of_the_round_is_left(world, trainers, over_nodes):
    worker, ranks, which = over_nodes
    here = trained(world, trainers[2], f"here, beside {which}", FOUR_EPOCHS)
    there = trained(world, worker, which, FOUR_EPOCHS)
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-6 if ranks == 2 else 1e-4)
    if ranks == 2:  # more add gradients up in another order
        students = [made.store.materialize(made.artifacts["student"]) for made in (here, there)]
        assert weights_digest(students[0]) == weights_digest(students[1])
    assert list(world.store.root.glob(".tmp-*")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_on_its_host_costs_the_steps_since_the_last_checkpoint(world, trainers, tmp_path, rank):
    here = trained(world, trainers[2], f"here, beside a killed rank {rank}", FOUR_EPOCHS)
    work = train_work(FOUR_EPOCHS, OBJECTIVE, world.student, None, world.rollouts, world.signals, 0, 1)
    given = (world.store, f"rank {rank} killed")
    with on_hosts((1, 1), tmp_path / "first") as worker, pytest.raises(WorkerDied, match=rf"\(rank {rank}\) ended"):
        make(work, given[0], worker, given[1], checkpoint_minutes=0, failpoints=f"train.after_step=kill#{rank}@7")
    with on_hosts((1, 1), tmp_path / "second") as worker:
        there = make(work, given[0], worker, given[1], checkpoint_minutes=0)
    assert any("continuing after step 6" in line for line in there.said)
    students = [made.store.materialize(made.artifacts["student"]) for made in (here, there)]
    assert weights_digest(students[0]) == weights_digest(students[1])
