"""What differs is named: rows and columns, files, tensors and by how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file
from small_store import build, shard_path

from storage.artifacts.artifact import ArtifactSpec
from storage.errors import CorruptArtifact, Evicted
from storage.schemas import schema_for
from storage.store import Artifact, Store
from storage.upkeep.compare import Differences, differences
from storage.upkeep.gc import evict
from storage.upkeep.transfer import lend

SPEC = ArtifactSpec.of("train", 1, {}, {})


def trained(
    root: Path, losses: list[float], seconds: float, value: float, config: str = "{}"
) -> tuple[Store, Artifact]:
    store = Store(root)
    required = {"round": 1, "epoch": 0, "grad_norm": 1.0, "lr": 0.1, "samples": 4, "tokens": 9, "seconds": seconds}
    steps = [{"step": n, "loss": loss, **required} for n, loss in enumerate(losses)]
    with store.building(SPEC) as builder:
        builder.write_shard("training_steps", 0, pa.Table.from_pylist(steps, schema_for("training_steps")))
        folder = builder.directory("model")
        tensors = {"a": np.ones(4, "float32"), "b": np.array([1.0, 2.0, value], "float32")}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(config)
        return store, builder.commit()


def test_equal_but_for_wall_time_is_equal(tmp_path: Path) -> None:
    store, recorded = trained(tmp_path / "a", [1.0, 2.0], 0.5, 3.0)
    scratch, made = trained(tmp_path / "b", [1.0, 2.0], 7.5, 3.0)
    assert differences(recorded, store, made, scratch) == Differences()


def test_each_difference_is_named(tmp_path: Path) -> None:
    store, recorded = trained(tmp_path / "a", [1.0, 2.0], 0.5, 3.0)
    scratch, made = trained(tmp_path / "b", [1.0, 2.5], 0.5, 3.25, '{"x": 1}')
    found = differences(recorded, store, made, scratch)
    lines = found.lines
    assert found.largest is None, "config.json is not made of numbers"
    assert "training_steps.loss: 1 of 2 rows, first row 1: 2.5 not 2.0" in lines
    assert "model.safetensors: b F32[3]: 1 of 3 values, at most 0.25 apart" in lines
    assert "config.json: other bytes" in lines
    assert not any(" a F32" in line or "grad_norm" in line for line in lines)
    fewer, made = trained(tmp_path / "c", [1.0], 0.5, 3.0)
    assert "training_steps: 1 rows instead of 2" in differences(recorded, store, made, fewer).lines


def test_numbers_that_differ_are_measured(tmp_path: Path) -> None:
    store, recorded = trained(tmp_path / "a", [1.0, 2.0], 0.5, 3.0)
    for name, losses, value, expected in (
        ("b", [1.0, 2.5], 3.0, 0.5),
        ("c", [1.0, 2.0], 3.25, 0.25),
        ("d", [1.0, 2.0], float("nan"), None),
        ("e", [1.0], 3.0, None),
    ):
        scratch, made = trained(tmp_path / name, losses, 0.5, value)
        assert differences(recorded, store, made, scratch).largest == expected


def test_without_the_recorded_data_the_digests_still_tell(tmp_path: Path) -> None:
    store, recorded = trained(tmp_path / "a", [1.0], 0.5, 3.0)
    scratch, made = trained(tmp_path / "b", [1.5], 0.5, 3.0)
    evict(tmp_path / "a" / "artifacts" / "train" / SPEC.key)
    lines = differences(recorded, store, made, scratch).lines
    assert lines[0].startswith("training_steps: ") and "evicted" in lines[-1]
    _, same = trained(tmp_path / "c", [1.0], 0.5, 3.0)
    assert differences(recorded, store, same, Store(tmp_path / "c")) == Differences()


def test_what_is_lent_is_whole_there_and_stays_whole_here(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "a"), Store(tmp_path / "b")
    artifact = build(store)[0]
    lend(store, artifact, other)
    lend(store, artifact, other)
    assert other.get("mask", artifact.key) == artifact and other.verify(artifact) == []
    path = shard_path(other, artifact, 0)
    path.unlink()
    assert store.verify(artifact) == []
    evict(store.root / "artifacts" / "mask" / artifact.key)
    with pytest.raises(Evicted):
        lend(store, artifact, other)
    build(store)
    shard_path(store, artifact, 1).unlink()
    with pytest.raises(CorruptArtifact, match="missing"):
        lend(store, artifact, other)
