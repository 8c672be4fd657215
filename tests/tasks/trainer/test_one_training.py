"""Student, state and metrics of a round are of one training, whatever of it was lost and had to be made again."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from trainer_world import Made, World, make

from storage.artifacts.artifact import MANIFEST
from storage.artifacts.checkpoints import CHECKPOINT
from storage.disk import failpoints
from storage.errors import ConfigError, CorruptArtifact, OpdError
from storage.store import Artifact, Store
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.stage import Work
from tasks.train import train_work
from tasks.trainer.config import TrainConfig, WarmupConfig
from tasks.warmup import warmup_work
from tasks.workers.pool import Worker
from tasks.workers.runtime import RuntimeConfig

OTHER = {"micro_batch_tokens": 1}
"""A setting of the trainer at which sums are rounded otherwise."""


@pytest.fixture
def work(world: World, request: pytest.FixtureRequest) -> Work:
    """A training of this test's own: keys know the seed."""
    objective = DirectConfig(support=TopkSupport(k=8, outside="bucket"))
    config = TrainConfig(lr=1e-3, samples_per_step=4)
    seed = zlib.crc32(request.node.name.encode())
    return train_work(config, objective, world.student, None, world.rollouts, world.signals, seed, 1)


def folder(store: Store, artifact: Artifact) -> Path:
    return store.root / "artifacts" / artifact.stage / artifact.key


def contents(made: Made) -> dict[str, dict[str, str]]:
    return {name: artifact.content for name, artifact in made.artifacts.items()}


def no_state(store: Store, made: Made) -> None:
    """Killed after the student's commit."""
    shutil.rmtree(folder(store, made.artifacts["trainer_state"]))


def damaged_state(store: Store, made: Made) -> None:
    [file] = folder(store, made.artifacts["trainer_state"]).glob("state-*/exp_avg.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def no_table(store: Store, made: Made) -> None:
    shutil.rmtree(folder(store, made.artifacts["train"]))


def no_manifest_of_the_student(store: Store, made: Made) -> None:
    (folder(store, made.artifacts["student"]) / MANIFEST).write_text("{}")


LOSSES: dict[Callable[[Store, Made], None], str] = {
    no_state: "trainer_state",
    damaged_state: "trainer_state",
    no_table: "train",
    no_manifest_of_the_student: "student",
}


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_what_is_made_again_belongs_to_what_is_there(
    world: World, trainers: dict[int, Worker], work: Work, lose: Callable[[Store, Made], None]
) -> None:
    """As by another release of a library, which no setting tells of; with the old one back it is made as it was."""
    store = world.store
    before = make(work, store, trainers[1], None)
    lose(store, before)
    known = set((store.root / "quarantine").iterdir())
    with pytest.raises(CorruptArtifact, match="retraining gave weights") as refused:
        make(work, store, trainers[1], None, checkpoint_minutes=0, **OTHER)
    assert LOSSES[lose] in str(refused.value) and "opd fork NAME@0 --name NEW --set seed=" in str(refused.value)
    for name, artifact in before.artifacts.items():
        assert store.get(artifact.stage, artifact.key) == (None if name == LOSSES[lose] else artifact)
    moved = [
        path for path in set((store.root / "quarantine").iterdir()) - known if not path.name.endswith(".reason.json")
    ]
    assert len(moved) == (lose in (damaged_state, no_manifest_of_the_student)), "only what was damaged"
    assert list(store.root.rglob(".tmp-*")) == list(store.root.rglob(f"{CHECKPOINT}*")) == []
    again = make(work, store, trainers[1], None)
    assert contents(again) == contents(before)


def test_other_settings_are_refused_before_training(world: World, trainers: dict[int, Worker], work: Work) -> None:
    """Also where the student's own dtype would hide a difference."""
    before = make(work, world.store, trainers[1], None)
    no_state(world.store, before)
    said: list[str] = []
    for config, words in (
        (RuntimeConfig(device="cpu", threads=7), "runtime.threads 2, now 7"),
        (RuntimeConfig(device="cpu", trainer={"processes": 2}), "runtime.trainer.processes 1, now 2"),
        (
            RuntimeConfig(device="cpu", trainer={"deepspeed": "configs/deepspeed/zero2.json"}),
            "runtime.trainer.deepspeed",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            make(work, world.store, trainers[1], None, said=said, config=config)
    assert not any("steps" in line for line in said), "nothing is trained in vain"
    sampler = RuntimeConfig(device="cpu", sampler={"kv_cache_gib": 3})
    assert contents(make(work, world.store, trainers[1], None, config=sampler)) == contents(before)


def test_figures_of_an_attempt_that_was_not_committed_are_not_another_ones(
    world: World, trainers: dict[int, Worker], work: Work
) -> None:
    """Killed after the table's shard was written and before anything was committed; then at other settings."""
    failpoints.arm({failpoints.SPEC: "builder.before_collect=raise:OpdError"})
    try:
        with pytest.raises(OpdError, match="a failpoint"):
            make(work, world.store, trainers[1], None, **OTHER)
    finally:
        failpoints.arm({})
    assert list((world.store.root / "artifacts" / "train" / work.outputs["train"].key).glob("*.parquet"))
    made = make(work, world.store, trainers[1], None)
    assert contents(made) == contents(make(work, world.store, trainers[1], "undisturbed"))


def test_a_warm_ups_figures_are_its_students(world: World, trainers: dict[int, Worker]) -> None:
    work = warmup_work(WarmupConfig(lr=3e-3, steps=3, samples_per_step=6), world.student, world.prompts, 77)
    before = make(work, world.store, trainers[1], None)
    shutil.rmtree(folder(world.store, before.artifacts["warmup"]))
    with pytest.raises(CorruptArtifact, match="opd run CONFIG --name NEW --set seed=78"):
        make(work, world.store, trainers[1], None, **OTHER)
    assert contents(make(work, world.store, trainers[1], None)) == contents(before)
