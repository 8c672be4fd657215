"""Damaged bytes are noticed, quarantined, and rebuilt by the shard."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_store import SPEC, STUDENT, build, build_student, flip, fresh, model, quarantined, rows, shard_path

from storage.artifacts import digests
from storage.artifacts.shards import SIDECAR
from storage.errors import CorruptArtifact, InputError
from storage.store import Store


def test_every_flipped_bit_is_noticed(store: Store) -> None:
    artifact, _ = build(store)
    path = shard_path(store, artifact, 1)
    good = path.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 50)):
        flip(path, at)
        with pytest.raises(CorruptArtifact, match="sha256 differs"):
            fresh(store).read_table(artifact, "mask")
        assert not path.exists()
        path.write_bytes(good)


def test_queries_never_show_flipped_bits(store: Store) -> None:
    """Page checksums and the footer's hash: a flip is refused, or lies in a page header where it changes nothing."""
    artifact, _ = build(store)
    path = shard_path(store, artifact, 1)
    good, stat = path.read_bytes(), path.stat()
    expected = store.arrow_dataset(artifact, "mask").to_table().to_pydict()
    offsets = range(4, len(good), max(1, len(good) // 150))
    refused = 0
    for at in offsets:
        flip(path, at)
        try:
            assert store.arrow_dataset(artifact, "mask").to_table().to_pydict() == expected, at
        except (CorruptArtifact, OSError, pa.ArrowException):
            refused += 1
        path.write_bytes(good)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert refused > 0.9 * len(offsets)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "replace"])
def test_only_the_damaged_shard_is_rebuilt(store: Store, damage: str) -> None:
    artifact, _ = build(store)
    path = shard_path(store, artifact, 1)
    untouched = shard_path(store, artifact, 2)
    if damage == "flip":
        flip(path, 100)
        assert store.get("mask", SPEC.key) == artifact  # planning believes the stat stamp; the consumer does not
        with pytest.raises(CorruptArtifact, match="only the damaged part is rebuilt"):
            fresh(store).read_shard(artifact, "mask", 1)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "remove":
        path.unlink()
    else:
        pq.write_table(rows(1), path)
    assert store.get("mask", SPEC.key) is None
    assert store.list() == []
    repaired, written = build(fresh(store), salt=0)
    assert written == [1]
    assert repaired == artifact
    assert store.get("mask", SPEC.key) == artifact
    assert store.verify(artifact) == []
    assert shard_path(store, artifact, 2) == untouched
    assert store.read_table(artifact, "mask").num_rows == 120
    if damage != "remove":
        (note,) = quarantined(store)
        assert note.startswith(f"artifacts/mask/{SPEC.key}/mask-00001-")


def test_a_rebuilt_shard_with_other_rows_quarantines_the_artifact(store: Store) -> None:
    artifact, _ = build(store)
    shard_path(store, artifact, 1).unlink()
    with pytest.raises(CorruptArtifact, match="shard 1 of mask was rebuilt with other rows"):
        build(store, salt=1)
    assert not (store.root / "artifacts" / "mask" / SPEC.key).exists()
    assert "not reproduced" in quarantined(store)[0]
    with pytest.raises(CorruptArtifact, match="not committed"):
        store.read_table(artifact, "mask")
    rebuilt, written = build(store, salt=1)
    assert written == [0, 1, 2]
    with pytest.raises(CorruptArtifact, match="rebuilt with other content"):
        store.read_table(artifact, "mask")  # planned with the old content: its reader must plan again
    assert store.read_table(rebuilt, "mask").num_rows == 120


def test_an_unfinished_shard_must_be_reproduced_too(store: Store) -> None:
    with store.building(SPEC) as builder:
        record = builder.write_shard("mask", 0, rows(0))
    flip(store.root / "artifacts" / "mask" / SPEC.key / record.file, 50)
    with store.building(SPEC) as builder:
        assert builder.missing("mask", 1) == [0]
        builder.write_shard("mask", 0, rows(0, salt=5))
        with pytest.raises(CorruptArtifact, match="other rows"):
            builder.commit(tables={"mask": 1})


def test_an_unfinished_shard_that_is_damaged_is_rebuilt(store: Store) -> None:
    with store.building(SPEC) as builder:
        first, second = (builder.write_shard("mask", shard, rows(shard)) for shard in range(2))
    directory = store.root / "artifacts" / "mask" / SPEC.key
    flip(directory / first.file, 50)
    flip(directory / f"{second.file}{SIDECAR}", 50)
    artifact, written = build(store)
    assert written == [0, 1, 2]
    assert len(quarantined(store)) == 3  # a shard; a shard with its sidecar
    assert store.verify(artifact) == []


def test_a_changed_shard_plan_is_not_a_repair(store: Store) -> None:
    artifact, _ = build(store)
    shard_path(store, artifact, 0).unlink()
    with store.building(SPEC) as builder:
        assert builder.repairing
        with pytest.raises(CorruptArtifact, match="had shards"):
            builder.commit(tables={"mask": 2})


def test_a_flipped_bit_in_the_manifest_costs_no_shard(store: Store) -> None:
    artifact, _ = build(store)
    manifest = store.root / "artifacts" / "mask" / SPEC.key / "manifest.json"
    data = manifest.read_bytes()
    manifest.write_bytes(data.replace(b'"rows": 120', b'"rows": 121') if b'"rows": 120' in data else data[:-9])
    assert store.get("mask", SPEC.key) is None
    again, written = build(store)
    assert written == []
    assert again.content == artifact.content
    assert "manifest.json" in quarantined(store)[0]


def test_a_copied_store_is_believed_after_hashing(store: Store) -> None:
    artifact, _ = build(store)
    copy = shutil.copytree(store.root, store.root.with_name("copy"), copy_function=shutil.copyfile)
    assert Store(copy).get("mask", SPEC.key) == artifact
    path = shard_path(Store(copy), artifact, 0)
    flip(path, 60)
    assert Store(copy).get("mask", SPEC.key) is None


def test_verify_trusts_no_memo_and_moves_bad_files(store: Store) -> None:
    artifact, _ = build(store)
    store.read_table(artifact, "mask")
    path = shard_path(store, artifact, 2)
    flip(path, 70)
    (problem,) = store.verify(artifact, move=False)
    assert str(path) in problem
    assert "sha256" in problem
    assert path.exists()
    assert len(store.verify(artifact)) == 1
    assert not path.exists()
    assert build(store)[1] == [2]


def test_readers_ignore_what_the_manifest_does_not_name(store: Store) -> None:
    artifact, _ = build(store)
    store.shard_writer("mask", SPEC.key).write_shard("mask", 3, rows(3))
    store.shard_writer("mask", SPEC.key).write_shard("mask", 1, rows(1, salt=9))
    assert store.read_table(artifact, "mask").num_rows == 120
    assert store.verify(artifact) == []


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Makes reading one file fail, as a disk does that gives its name and size but not its bytes."""

    def fail(bad: Path, number: int = errno.EIO) -> None:
        def refuse(path: Path) -> None:
            if Path(path) == bad:
                raise OSError(number, os.strerror(number), str(path))

        real_hash, real_bytes = digests._hash_file, Path.read_bytes

        def hashing(path: Path) -> str:
            refuse(path)
            return real_hash(path)

        def reading(path: Path) -> bytes:
            refuse(path)
            return real_bytes(path)

        monkeypatch.setattr(digests, "_hash_file", hashing)
        monkeypatch.setattr(Path, "read_bytes", reading)

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EBADMSG])
def test_a_shard_that_the_disk_does_not_give_is_damage(store: Store, failing: Any, number: int) -> None:
    artifact, _ = build(store)
    path = shard_path(store, artifact, 1)
    failing(path, number)
    with pytest.raises(
        CorruptArtifact, match=rf"{path.name}: unreadable .*the disk may be failing.*only the damaged part"
    ):
        fresh(store).read_table(artifact, "mask")
    assert not path.exists() and "unreadable" in quarantined(store)[0]
    assert build(fresh(store))[1] == [1]


def test_a_student_or_manifest_that_the_disk_does_not_give_is_damage(store: Store, failing: Any) -> None:
    artifact = build_student(store)
    weights = store.materialize(artifact) / "model.safetensors"
    manifest = store.root / "artifacts" / "student" / artifact.key / "manifest.json"
    failing(weights)
    assert [problem for problem in store.verify(artifact, move=False) if f"{weights}: unreadable" in problem]
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors: unreadable"):
        store.materialize(artifact)
    assert not weights.exists()
    assert build_student(fresh(store)).content == artifact.content
    failing(manifest)
    assert store.get("student", artifact.key) is None
    assert build_student(fresh(store)).content == artifact.content
    assert any("manifest.json: " in line and "unreadable" in line for line in quarantined(store))


def test_a_file_of_the_users_that_the_disk_does_not_give_is_named(store: Store, tmp_path: Path, failing: Any) -> None:
    folder = model(tmp_path / "mine")
    with store.building(STUDENT) as builder:
        builder.external("model", folder)
        artifact = builder.commit()
    os.utime(folder / "config.json", ns=(0, 0))
    failing(folder / "config.json")
    with pytest.raises(InputError, match=r"config\.json: unreadable"):
        store.materialize(artifact)


def test_other_errors_of_reading_are_no_damage(store: Store, failing: Any) -> None:
    artifact, _ = build(store)
    path = shard_path(store, artifact, 1)
    failing(path, errno.EACCES)
    with pytest.raises(PermissionError):
        fresh(store).read_table(artifact, "mask")
    assert path.exists()
