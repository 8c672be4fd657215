"""Trees of files: checkpoints in the store, and a user's own."""

import os
from pathlib import Path

import pytest
from small_store import STUDENT, build_student, contents, flip, model, quarantined

from storage.errors import CorruptArtifact, InputError, StoreError
from storage.store import Artifact, ArtifactSpec, Store


def test_a_tree_is_materialized_as_it_was_written(store: Store, tmp_path: Path) -> None:
    artifact = build_student(store)
    assert sorted(artifact.content) == ["architecture", "model", "tokenizer", "weights"]
    folder = store.materialize(artifact)
    assert contents(folder) == contents(model(tmp_path / "wanted"))
    assert store.verify(artifact) == []
    with store.building(STUDENT) as builder:
        assert builder.committed == artifact
        assert not builder.needs_tree()
        with pytest.raises(StoreError, match="already committed"):
            builder.directory()


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate"])
def test_a_damaged_tree_is_rebuilt_with_equal_content(store: Store, damage: str) -> None:
    artifact = build_student(store)
    path = store.materialize(artifact) / "model.safetensors"
    if damage == "flip":
        flip(path, path.stat().st_size - 1)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        store.materialize(artifact)
    assert store.get("student", STUDENT.key) is None
    assert build_student(store) == artifact
    assert (store.materialize(artifact) / "model.safetensors").read_bytes().endswith(b"w")
    trees = [path for path in (store.root / "artifacts" / "student" / STUDENT.key).iterdir() if path.is_dir()]
    assert trees == [store.materialize(artifact)]


def test_a_tree_rebuilt_differently_quarantines_the_artifact(store: Store) -> None:
    artifact = build_student(store)
    (store.materialize(artifact) / "model.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match="another content: model, weights"):
        build_student(store, b"x")
    assert build_student(store, b"x").content["tokenizer"] == artifact.content["tokenizer"]


def test_files_that_do_not_belong_to_a_tree_never_reach_an_engine(store: Store) -> None:
    artifact = build_student(store)
    intruder = store.materialize(artifact) / "adapter_model.safetensors"
    intruder.write_bytes(b"?")
    assert store.materialize(artifact) == intruder.parent
    assert not intruder.exists()
    assert "does not belong" in quarantined(store)[0]


def test_links_and_empty_trees_are_refused(store: Store, tmp_path: Path) -> None:
    with store.building(STUDENT) as builder:
        builder.directory("state")
        with pytest.raises(StoreError, match="empty"):
            builder.commit()
    with store.building(STUDENT) as builder:
        folder = model(builder.directory())
        (folder / "link").symlink_to(tmp_path / "anything")
        with pytest.raises(StoreError, match="link"):
            builder.commit()
        with pytest.raises(StoreError, match="twice"):
            builder.directory()


def test_two_trees_keep_their_contents_apart(store: Store) -> None:
    with store.building(STUDENT) as builder:
        model(builder.directory("model"))
        model(builder.directory("state"), b"moments")
        artifact = builder.commit()
    assert artifact.content["weights"] != artifact.content["state:weights"]
    assert store.materialize(artifact, "state") != store.materialize(artifact, "model")


def external(store: Store, folder: Path) -> Artifact:
    with store.building(ArtifactSpec.of("model", 1, {"path": "user"}, {})) as builder:
        builder.external("model", folder)
        return builder.commit()


def test_an_external_tree_stays_where_it_is(store: Store, tmp_path: Path) -> None:
    folder = model(tmp_path / "mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    artifact = external(store, folder)
    assert store.materialize(artifact) == folder
    assert build_student(store).content == artifact.content
    os.utime(folder / "config.json", (1, 1))  # touched, not changed
    assert store.materialize(artifact) == folder


@pytest.mark.parametrize("change", ["edit", "remove", "add"])
def test_a_changed_external_tree_is_the_users_and_named(store: Store, tmp_path: Path, change: str) -> None:
    folder = model(tmp_path / "mine")
    artifact = external(store, folder)
    path = folder / "model.safetensors"
    if change == "edit":
        model(folder, b"x")
    elif change == "remove":
        path.unlink()
    else:
        (folder / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model(-2)?\.safetensors"):
        store.materialize(artifact)
    assert path.exists() == (change != "remove")
    assert quarantined(store) == []
    if change != "add":
        assert store.verify(artifact)
        assert quarantined(store) == []


def test_an_external_tree_must_exist(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        external(store, tmp_path / "nowhere")
