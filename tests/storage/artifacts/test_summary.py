"""What the store remembers of large manifests is what they say, and no change of a file goes unseen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from small_store import build, flip, shard_path

from storage.artifacts import summary as summaries
from storage.artifacts.artifact import artifact_directory
from storage.artifacts.summary import summary
from storage.store import Artifact, Store
from storage.upkeep.gc import evict


@pytest.fixture
def made(store: Store, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(summaries, "LEAST_SHARDS", 1)
    monkeypatch.setattr(summaries, "_RACY_SECONDS", -1.0)
    artifact, _ = build(store)
    assert store.get(artifact.stage, artifact.key) == artifact
    return artifact


def remembered(store: Store, artifact: Artifact) -> bool:
    found = summary(artifact_directory(store.root, artifact.stage, artifact.key), store.memo)
    return found is not None and found.manifest is None


def test_what_is_remembered_is_what_the_manifest_says(store: Store, made: Artifact) -> None:
    assert remembered(store, made) and store.get(made.stage, made.key) == made and store.list() == [made]
    size, shards, evicted = store.size(made), store.shard_count(made), store.evicted(made)
    shutil.rmtree(store.memo)
    store.memo.mkdir()
    assert (size, shards, evicted) == (store.size(made), store.shard_count(made), store.evicted(made)) and size > 0
    assert shards == 3 and evicted is None


@pytest.mark.parametrize("harm", ["gone", "shorter", "another time"])
def test_a_changed_file_is_seen(store: Store, made: Artifact, harm: str) -> None:
    assert remembered(store, made)
    path = shard_path(store, made, 1)
    if harm == "gone":
        path.unlink()
    elif harm == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path, 300)
        os.utime(path, ns=(1, 1))
    assert store.get(made.stage, made.key) is None


def test_a_copy_with_other_times_is_hashed_and_found(store: Store, made: Artifact) -> None:
    for shard in range(3):
        os.utime(shard_path(store, made, shard), ns=(1, 1))
    (artifact_directory(store.root, made.stage, made.key) / "mask-00009-left.parquet").write_bytes(b"left over")
    assert store.get(made.stage, made.key) == made


def test_an_eviction_is_seen_and_a_damaged_memo_does_no_harm(store: Store, made: Artifact) -> None:
    for path in store.memo.iterdir():
        flip(path, 20)
    assert store.get(made.stage, made.key) == made
    folder: Path = artifact_directory(store.root, made.stage, made.key)
    evict(folder)
    assert store.evicted(made) is not None and store.size(made) == 0
