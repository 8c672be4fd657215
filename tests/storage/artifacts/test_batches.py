"""Which shards were sampled together, and the shards that one worker writes for another."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_store import SHARDS, SPEC, flip, fresh, rows

from storage.artifacts import shards
from storage.artifacts.batches import (
    BATCH,
    BATCHES,
    Batch,
    BatchLog,
    provenance_of,
    recorded_batches,
    unfinished_batches,
)
from storage.artifacts.shards import INTERMEDIATE, SIDECAR
from storage.errors import CorruptArtifact, StoreError
from storage.store import ArtifactSpec, Store

FIRST = Batch([(0, 0), (1, 0), (2, 7)], [1, 0])
SECOND = Batch([(2, 0), (1, 3)], [2, 1])


def log(folder: Path, batch: Batch, table: str = "rollouts") -> Path:
    """Records a batch as a worker does: all shards are given, then those written."""
    record = BatchLog(folder, table)
    for shard, step in batch.queue:
        record.add(shard, step)
    assert not record.path.exists()
    for shard in batch.shards:
        record.writing(shard)
    return record.path


def test_batches_come_back_oldest_first(tmp_path: Path) -> None:
    assert unfinished_batches(tmp_path, "rollouts") == []
    log(tmp_path, FIRST)
    log(tmp_path, SECOND)
    log(tmp_path, Batch([(5, 0)], [5]), "evaluations")
    assert unfinished_batches(tmp_path, "rollouts") == [FIRST, SECOND]
    assert unfinished_batches(tmp_path, "evaluations") == [Batch([(5, 0)], [5])]


def test_a_batch_is_known_before_each_of_its_shards(tmp_path: Path) -> None:
    """A worker killed at any moment leaves no shard whose batch is not recorded, with what it was given until then."""
    record = BatchLog(tmp_path, "rollouts")
    record.add(0, 0)
    assert unfinished_batches(tmp_path, "rollouts") == []
    record.writing(0)
    assert unfinished_batches(tmp_path, "rollouts") == [Batch([(0, 0)], [0])]
    record.add(4, 9)
    record.writing(4)
    assert unfinished_batches(tmp_path, "rollouts") == [Batch([(0, 0), (4, 9)], [0, 4])]


def test_the_manifest_has_each_shard_once_in_the_last_batch_that_wrote_it(tmp_path: Path) -> None:
    log(tmp_path, FIRST)
    log(tmp_path, SECOND)
    log(tmp_path, Batch([(9, 0)], [9]))  # of a plan with more shards
    provenance = provenance_of(unfinished_batches(tmp_path, "rollouts"), 4)
    assert provenance == {
        BATCHES: [
            {"queue": [[0, 0], [1, 0], [2, 7]], "shards": [0]},
            {"queue": [[2, 0], [1, 3]], "shards": [1, 2]},
            {"queue": None, "shards": [3]},
        ]
    }
    assert recorded_batches(provenance, [0, 1]) == [Batch(FIRST.queue, [0]), Batch(SECOND.queue, [1])]
    assert recorded_batches(provenance, [1, 2, 3]) == [Batch(SECOND.queue, [1, 2]), Batch([(3, 0)], [3])]
    assert recorded_batches(provenance, []) == []


def test_a_batch_that_began_earlier_can_write_a_shard_last(tmp_path: Path) -> None:
    """Two workers: the one that began later dies while it writes shard 1, which the other then gets and writes."""
    early, late = BatchLog(tmp_path, "rollouts"), BatchLog(tmp_path, "rollouts")
    early.add(0, 0)
    late.add(1, 0)
    late.writing(1)
    early.writing(0)
    early.add(1, 5)
    early.writing(1)
    provenance = provenance_of(unfinished_batches(tmp_path, "rollouts"), 2)
    assert provenance == {BATCHES: [{"queue": [[0, 0], [1, 5]], "shards": [0, 1]}]}


def test_an_artifact_without_a_record_had_one_shard_per_batch() -> None:
    alone = [Batch([(1, 0)], [1]), Batch([(2, 0)], [2])]
    assert recorded_batches({"numerics": {"threads": 1}}, [2, 1]) == recorded_batches({BATCHES: None}, [1, 2]) == alone


def test_a_damaged_record_is_unknown(tmp_path: Path) -> None:
    """No flipped bit is believed, and a line that was cut off was never whole; the shards of other batches keep theirs."""
    path = log(tmp_path, FIRST)
    log(tmp_path, SECOND)
    whole = path.read_bytes()
    damaged = [whole[:end] for end in range(0, len(whole), 7)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        found = unfinished_batches(tmp_path, "rollouts")
        assert found[0] in (None, Batch(FIRST.queue, [1]), FIRST) and found[1] == SECOND
        if found[0] != FIRST:
            assert provenance_of(found, 3)[BATCHES] == [
                {"queue": [[2, 0], [1, 3]], "shards": [1, 2]},
                {"queue": None, "shards": [0]},
            ]
    path.write_text("{}")
    assert unfinished_batches(tmp_path, "rollouts") == [None, SECOND]


def test_a_builder_repeats_what_is_recorded_and_forgets_at_the_commit(store: Store) -> None:
    with store.building(SPEC) as builder:
        log(builder.path, FIRST, "mask")
        for shard in (0, 1):
            record = builder.write_shard("mask", shard, rows(shard))
        assert builder.batches_to_repeat("mask", [2], None) == []  # nothing is recorded of it yet
    flip(builder.path / record.file, 100)
    store = fresh(store)
    with store.building(SPEC) as builder:
        assert builder.missing("mask", SHARDS) == [1, 2]
        assert builder.batches_to_repeat("mask", [1, 2], None) == [Batch(FIRST.queue, [1])]
        for shard in (1, 2):
            builder.write_shard("mask", shard, rows(shard))
        artifact = builder.commit(tables={"mask": SHARDS}, provenance=builder.batches("mask", SHARDS))
    assert artifact.provenance[BATCHES] == [
        {"queue": [[0, 0], [1, 0], [2, 7]], "shards": [0, 1]},
        {"queue": None, "shards": [2]},
    ]
    assert not list(store.root.rglob(f"*{BATCH}"))
    flip(builder.path / store.shards(artifact, "mask")[1].file, 100)
    assert store.verify(artifact) != []
    with fresh(store).building(SPEC) as builder:
        assert builder.batches_to_repeat("mask", builder.missing("mask", SHARDS), None) == [Batch(FIRST.queue, [1])]
        builder.write_shard("mask", 1, rows(1))
        again = builder.commit(provenance={"numerics": "others"})
    assert again.content == artifact.content and again.provenance[BATCHES] == artifact.provenance[BATCHES]
    with store.building(ArtifactSpec.of("mask", 1, {"policy": "other"}, {})) as builder:  # in another store, say
        assert builder.batches_to_repeat("mask", [0], artifact.provenance) == [Batch(FIRST.queue, [0])]
        assert builder.batches_to_repeat("mask", [0], {}) == [Batch([(0, 0)], [0])]


# --- intermediate shards ---------------------------------------------------------------------------------------------


def test_intermediate_shards_outlive_a_killed_builder_and_go_at_the_commit(store: Store) -> None:
    with store.building(SPEC) as builder:
        between = store.shard_writer(SPEC.stage, SPEC.key).intermediate()
        assert between.read("mask", 0) is None
        between.write_shard("mask", 0, rows(7))
        between.write_shard("mask", 2, rows(8))
    store = fresh(store)
    with store.building(SPEC) as builder:
        assert builder.missing("mask", SHARDS) == [0, 1, 2], "they are no shards of the artifact"
        between = builder.intermediate()
        assert between.read("mask", 0).equals(between.require("mask", 0))
        assert between.read("mask", 0)["sample_id"].to_pylist() == rows(7)["sample_id"].to_pylist()
        assert between.read("mask", 1) is None and between.read("sampled", 0) is None
        for shard in range(SHARDS):
            builder.write_shard("mask", shard, rows(shard))
        artifact = builder.commit()
    assert artifact.rows == {"mask": SHARDS * 40} and store.verify(artifact) == []
    assert not list(store.root.rglob(INTERMEDIATE))


def test_reading_an_intermediate_shard_opens_its_own_sidecar_only(store: Store, monkeypatch) -> None:
    with store.building(SPEC) as builder:
        between = builder.intermediate()
        for shard in range(6):
            between.write_shard("mask", shard, rows(shard))
        opened = []
        whole = shards.unseal
        monkeypatch.setattr(shards, "unseal", lambda path: opened.append(path.name) or whole(path))
        for shard in range(6):
            assert between.read("mask", shard)["sample_id"].to_pylist() == rows(shard)["sample_id"].to_pylist()
        assert len(opened) == 6
        between.forget("mask", 3)
        assert between.read("mask", 3) is None and between.read("mask", 4) is not None


@pytest.mark.parametrize("damage", ["file", "sidecar", "no sidecar", "no file"])
def test_a_damaged_intermediate_shard_is_read_as_missing(store: Store, damage: str) -> None:
    with store.building(SPEC) as builder:
        between = builder.intermediate()
        path = between.path / between.write_shard("mask", 0, rows(0)).file
        note = path.with_name(path.name + SIDECAR)
        match damage:
            case "file":
                flip(path, 100)
            case "sidecar":
                flip(note, note.read_bytes().index(b"sha256") + 12)
            case "no sidecar":
                note.unlink()
            case "no file":
                path.unlink()
        assert between.read("mask", 0) is None
        with pytest.raises(CorruptArtifact, match="shard 0 of mask is missing or damaged"):
            between.require("mask", 0)
        between.write_shard("mask", 0, rows(0))
        assert between.require("mask", 0).num_rows == 40


def test_intermediate_shards_are_written_while_somebody_builds(store: Store) -> None:
    between = store.shard_writer(SPEC.stage, SPEC.key).intermediate()
    with pytest.raises(StoreError, match="not being built"):
        between.write_shard("mask", 0, rows(0))
