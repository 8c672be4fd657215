"""Names, links and records that lead elsewhere: nothing outside the store is written, and nothing foreign is read as ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from canary import PICKLES, Canary, poison
from small_models import checkpoint
from typer.testing import CliRunner

from flows.cli.app import make_app
from storage.artifacts.artifact import MANIFEST, ArtifactSpec
from storage.disk.files import seal, unseal
from storage.errors import CorruptArtifact, InputError, OpdError, StoreError
from storage.runs import Run
from storage.store import Artifact, Store

pytestmark = pytest.mark.promise(15, "names, links and manifests that lead out of the store")

NAMES = (
    "../evil", "../../evil", "..", ".", "", "/", "/tmp/evil", "a/b", "a/../../evil", "evil/", ".evil", "-evil", "a\x00b",
    "a\nb", "~", "~/evil", "a\\b", "evil\u202e", "\uff0e\uff0e/evil", "x" * 65, "$(touch evil)", "a b", "%2e%2e/evil",
    "con:evil", "*",
)  # fmt: skip


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_name_is_one_plain_name(name, tmp_path):
    root = tmp_path / "deep" / "store"
    Store(root)
    before = listing(tmp_path)
    with pytest.raises(InputError):
        Run.create(root, name, {}, {})
    with pytest.raises(InputError):
        Run.open(root, name)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
@pytest.mark.parametrize("command", ["status", "logs", "stop", "resume", "export", "query"])
def test_commands_take_no_path_for_a_name(command, name, example_store, tmp_path):
    outside = tmp_path / "evil"
    shutil.copytree(example_store / "runs" / "demo", outside)
    before = listing(tmp_path)
    more = {"export": [str(tmp_path / "target")], "query": ["SELECT 1"]}.get(command, [])
    result = CliRunner().invoke(make_app(), [command, name, *more, "--root", str(example_store)])
    assert isinstance(result.exception, InputError) and "run name" in str(result.exception)
    assert listing(tmp_path) == before


def test_a_run_that_is_a_link_is_refused(example_store, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(example_store / "runs" / "demo", outside)
    (example_store / "runs" / "demo").symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    with pytest.raises(InputError, match="symbolic link"):
        Run.open(example_store, "demo")
    with pytest.raises(InputError, match="symbolic link"):
        Run.create(example_store, "demo", {}, {"seed": 0})
    assert [run.name for run in Run.list(example_store)] == ["other"]
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before


@pytest.fixture
def student(tmp_path) -> tuple[Store, Artifact]:
    store = Store(tmp_path / "store")
    with store.building(ArtifactSpec.of("student", 1, {"n": 1}, {})) as builder:
        checkpoint(tmp_path / "made")
        shutil.copytree(tmp_path / "made", builder.directory("model"), dirs_exist_ok=True)
        return store, builder.commit()


def tree(store: Store) -> Path:
    (folder,) = (store.root / "artifacts" / "student").glob("*/model-*")
    return folder


def test_a_tree_with_a_link_is_not_committed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    store = Store(tmp_path / "store")
    with store.building(ArtifactSpec.of("student", 1, {}, {})) as builder:
        folder = builder.directory("model")
        (folder / "config.json").symlink_to(secret)
        with pytest.raises(StoreError, match="a link"):
            builder.commit()
    assert store.list() == []


@pytest.mark.parametrize("kind", ["file", "same content", "added", "folder", "added folder", "dangling"])
def test_a_committed_tree_with_a_link_is_not_read(kind, student, tmp_path):
    store, artifact = student
    folder, elsewhere = tree(store), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "f").write_text("{}")
    if kind == "same content":
        shutil.move(folder / "config.json", elsewhere / "config.json")
        (folder / "config.json").symlink_to(elsewhere / "config.json")
    elif kind in ("file", "dangling"):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(elsewhere / ("f" if kind == "file" else "none"))
    elif kind == "folder":
        shutil.move(folder, elsewhere / "model")
        folder.symlink_to(elsewhere / "model")
    else:
        (folder / "more").symlink_to(elsewhere if kind == "added folder" else elsewhere / "f")
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    with pytest.raises((StoreError, CorruptArtifact)):
        store.materialize(artifact)
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def reseal(store: Store, **change: object) -> None:
    """A manifest that somebody else wrote: its checksum is right, what it says is not."""
    (path,) = (store.root / "artifacts" / "student").glob(f"*/{MANIFEST}")
    content = unseal(path)
    record = content["trees"]["model"]
    if "directory" in change:
        record["directory"] = change["directory"]
    if "path" in change:
        record["files"][0]["path"] = change["path"]
    path.write_bytes(seal(content))


@pytest.mark.parametrize("field", ["directory", "path"])
@pytest.mark.parametrize("value", ["../../../../evil", "/tmp/evil", "model/../../..", "..", "", "a/../../../evil"])
def test_a_manifest_cannot_lead_out_of_the_store(field, value, student, tmp_path):
    store, artifact = student
    reseal(store, **{field: value})
    before = listing(tmp_path)
    assert store.get("student", artifact.key) is None
    with pytest.raises(CorruptArtifact, match=r"outside the artifact|manifest"):
        store.materialize(artifact)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling_x.py", "adapter_config.json", "special_tokens_map.json"]
)
def test_what_was_added_to_a_student_is_taken_away_before_it_is_read(name, student, tmp_path):
    store, artifact = student
    canary = Canary(tmp_path / "canary")
    folder = tree(store)
    poison(folder, canary, (name,), auto_map=False)
    assert store.materialize(artifact) == folder
    assert not (folder / name).exists()
    assert any(path.name.endswith(name) for path in (store.root / "quarantine").iterdir())
    assert canary.alive


def test_a_tampered_student_is_never_opened(student, tmp_path):
    """Same size, same time stamp: the hash notices it before any library reads the file."""
    store, artifact = student
    canary = Canary(tmp_path / "canary")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        path = tree(store) / name
        good, stat = path.read_bytes(), path.stat()
        bad = canary.pickled + good[len(canary.pickled) :]
        path.write_bytes(bad[: len(good)])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for memo in (store.root / "memo").iterdir():
            memo.unlink()
        with pytest.raises(CorruptArtifact, match=name):
            Store(store.root).materialize(artifact)
        path.write_bytes(good)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert canary.alive


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_only_recorded_files_are_exported(name, example_store, tmp_path):
    student_folder = next((example_store / "artifacts" / "student").glob("*/model-*"))
    for pickled in PICKLES:
        (student_folder / pickled).write_bytes(b"x")
    (student_folder / name).rename(tmp_path / name)
    (student_folder / name).symlink_to(tmp_path / name)
    target = tmp_path / "target"
    for number in range(3):
        arguments = ["export", "demo", str(target), "--round", str(number), "--root", str(example_store)]
        result = CliRunner().invoke(make_app(), arguments)
        if result.exception is not None:
            assert isinstance(result.exception, OpdError), result.exception
        else:
            there = {path.name for path in target.iterdir()}
            assert there == {
                "README.md",
                "model.safetensors",
                "config.json",
                "tokenizer.json",
            }  # the card is written anew
            assert not any(path.is_symlink() for path in target.iterdir())
            shutil.rmtree(target)


def test_the_state_of_a_run_names_no_path(example_store):
    run = Run.open(example_store, "demo")
    state = unseal(run.directory / "state.json")
    for stage, key in (("../../evil", "0" * 16), ("student", "../../../evil"), ("student", "/tmp/evil")):
        with pytest.raises(StoreError):
            Store(example_store).get(stage, key)
        state["rounds"][1]["stages"]["train"]["artifacts"] = {stage: key}
        (run.directory / "state.json").write_bytes(seal(state))
        result = CliRunner().invoke(
            make_app(), ["query", "demo", "SELECT count(*) FROM rounds", "--root", str(example_store)]
        )
        assert result.exception is None or isinstance(result.exception, OpdError)
    with pytest.raises(InputError):
        run.log_path("../../evil")
