"""Checkpoints of unfinished work: what counts, what is kept, what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage.artifacts.checkpoints import CHECKPOINT, KEPT, RECORD, Checkpoints, write_file
from storage.disk.files import TEMPORARY
from storage.errors import StoreError
from storage.store import ArtifactSpec, Store

SPEC = ArtifactSpec.of("mask", 1, {"a": 1}, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Store(tmp_path / "store").building(SPEC) as builder:
        return builder.path


def kept(folder: Path, **settings: Any) -> Checkpoints:
    return Checkpoints(folder.parents[2], folder, settings or {"threads": 1})


def save(folder: Path, step: int, **settings: Any) -> None:
    checkpoints = kept(folder, **settings)
    place = checkpoints.begin()
    files = [write_file(place / name, lambda path: path.write_text(f"{path.name} {step}")) for name in ("a", "b")]
    checkpoints.commit(place, step, files, {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name[: len(CHECKPOINT) + 8] for path in folder.iterdir())


def test_the_newest_counts_and_the_last_are_kept(folder: Path) -> None:
    assert kept(folder).newest() == (None, [])
    for step in (1, 5, 12):
        save(folder, step)
    found, said = kept(folder).newest()
    assert found is not None and said == []
    assert (found.step, found.content) == (12, {"step": 12})
    assert [path.read_text() for path in found.files] == ["a 12", "b 12"]
    assert names(folder) == [f"{CHECKPOINT}{step:08d}" for step in (5, 12)] and KEPT == 2


def test_equal_settings_are_those_that_compare_equal(folder: Path) -> None:
    """A default 1 is read back from a saved config as 1.0."""
    save(folder, 3, cache=1, sizes=[1, 2], file=None)
    found, _ = kept(folder, cache=1.0, sizes=[1, 2], file=None).newest()
    assert found is not None and found.step == 3


def test_other_settings_stay_and_are_named(folder: Path) -> None:
    save(folder, 9, threads=2, ranks=1)
    for step in (1, 2, 3):
        save(folder, step, threads=4, ranks=1)
    assert names(folder) == [f"{CHECKPOINT}{step:08d}" for step in (2, 3, 9)]
    found, said = kept(folder, threads=4, ranks=1).newest()
    assert found is not None and found.step == 3 and said == []
    found, said = kept(folder, threads=8, ranks=1).newest()
    assert found is None
    assert said == [
        "the checkpoint of step 9 was made with other settings (threads 2, now 8) and is not used;"
        " with the old settings the run continues from it"
    ]


def test_one_of_another_artifact_is_not_ours(folder: Path, tmp_path: Path) -> None:
    save(folder, 4)
    (ours,) = folder.iterdir()
    with Store(tmp_path / "store").building(ArtifactSpec.of("mask", 1, {"a": 2}, {})) as builder:
        ours.rename(builder.path / ours.name)
        found, said = kept(builder.path).newest()
    assert found is None and "the record of another checkpoint" in said[0]
    assert list(builder.path.iterdir()) == []


def test_a_renamed_one_is_not_believed(folder: Path) -> None:
    save(folder, 4)
    (path,) = folder.iterdir()
    path.rename(path.with_name(path.name.replace("00000004", "00000009")))
    assert kept(folder).newest()[0] is None
    assert list(folder.iterdir()) == []


def test_files_that_the_record_does_not_name_are_not_read(folder: Path) -> None:
    save(folder, 4)
    (path,) = folder.iterdir()
    (path / "c").write_text("more")
    found, _ = kept(folder).newest()
    assert found is not None and [file.name for file in found.files] == ["a", "b"]


def test_an_unfinished_one_does_not_count(folder: Path) -> None:
    checkpoints = kept(folder)
    place = checkpoints.begin()
    write_file(place / "a", lambda path: path.write_text("a"))
    assert place.name.startswith(TEMPORARY) and checkpoints.newest() == (None, [])
    assert not (place / RECORD).exists()


def test_they_go_with_the_commit_and_outlive_a_builder(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with store.building(SPEC) as builder:
        save(builder.path, 2)
    with store.building(SPEC) as builder:
        found, _ = builder.checkpoints({"threads": 1}).newest()
        assert found is not None and found.step == 2
        (builder.directory() / "file").write_text("done")
        builder.commit()
        assert not list(builder.path.glob(f"{CHECKPOINT}*"))
    with pytest.raises(StoreError), store.building(SPEC) as builder:
        builder.directory()
