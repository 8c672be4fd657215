"""Verification of a run: everything is hashed, damage is quarantined, and only that is rebuilt."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from small_store import STUDENT, build, build_student, flip, fresh, model, quarantined, rows, shard_path

from storage.artifacts.artifact import ArtifactSpec, artifact_directory, load_manifest
from storage.artifacts.digests import file_sha256
from storage.artifacts.verify import Verified, move_damaged, verify_run, verify_store
from storage.disk.files import replace_atomically
from storage.errors import InputError
from storage.runs import RoundState, Run, StageState
from storage.store import Artifact, Store
from storage.upkeep.gc import evict


@pytest.fixture
def run(store: Store) -> Run:
    """A run that names a mask and a student. The mask was made from a table that no round names."""
    source = build(store, ArtifactSpec.of("mask", 1, {"n": 7}, {}), salt=3)[0]
    mask = build(store, ArtifactSpec.of("mask", 1, {}, {"rollouts": source.content["mask"]}))[0]
    student = build_student(store)
    made = Run.create(store.root, "one", {"seed": 0}, {"seed": 0})
    state = made.state
    stages = {"supervise": {"mask": mask.key}, "train": {"student": student.key}}
    state.rounds = [
        RoundState(
            round=1,
            student_sha256=student.content["weights"],
            stages={label: StageState(state="done", artifacts=keys) for label, keys in stages.items()},
        )
    ]
    with made.lock():
        made.save(state)
    return made


def verified(store: Store, run: Run) -> Verified:
    found = Verified()
    verify_run(store.root, run, found, lambda name: None)
    return found


def mask_of(store: Store, run: Run) -> Artifact:
    found = store.get("mask", run.state.rounds[0].stages["supervise"].artifacts["mask"])
    assert found is not None
    return found


def test_everything_and_what_it_was_made_from_is_read_once(store: Store, run: Run) -> None:
    found = verified(store, run)
    assert found.problems == []
    assert found.artifacts == 3  # the source too, which no round names
    files = [path for name in ("mask", "student") for path in (store.root / "artifacts" / name).rglob("*")]
    sizes = [path.stat().st_size for path in files if path.is_file() and "sidecar" not in path.name]
    assert (found.files, found.bytes) == (len(sizes), sum(sizes))
    shutil.rmtree(store.root / "artifacts" / "mask" / mask_of(store, run).key)
    assert [problem.reason for problem in verified(store, run).problems] == ["missing, but a run used this artifact"]


def test_no_memo_is_trusted(store: Store, run: Run) -> None:
    """A flip that keeps size and time stamps deceives a memo."""
    student = store.get("student", STUDENT.key)
    assert student is not None
    path = store.materialize(student) / "model.safetensors"
    for file in path.parent.rglob("*"):
        os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**10))  # old enough to be remembered
    remembered = file_sha256(path, store.root / "memo")
    flip(path, path.stat().st_size - 1)
    assert file_sha256(path, store.root / "memo") == remembered
    found = verified(store, run)
    assert [(p.path, p.reason) for p in found.problems] == [(path, "sha256 differs from the recorded one")]
    assert move_damaged(store.root, found.problems) == 1
    assert build_student(fresh(store)) == student


@pytest.mark.parametrize("damage", ["flip", "zero", "truncate", "swap", "rows", "remove"])
def test_a_damaged_shard_is_named_moved_and_alone_rebuilt(store: Store, run: Run, damage: str) -> None:
    artifact = mask_of(store, run)
    path, other = shard_path(store, artifact, 1), shard_path(store, artifact, 2)
    data = path.read_bytes()
    if damage == "flip":
        flip(path, len(data) // 2)
    elif damage == "zero":
        path.write_bytes(bytes(100) + data[100:])
    elif damage == "truncate":
        path.write_bytes(data[:-7])
    elif damage == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif damage == "rows":  # a file that its record fits, with rows that the record denies
        directory = artifact_directory(store.root, "mask", artifact.key)
        manifest = load_manifest(directory)
        assert manifest is not None
        lying = [r.model_copy(update={"row_digest": "0" * 64}) if r.shard == 1 else r for r in manifest.shards]
        replace_atomically(directory / "manifest.json", manifest.model_copy(update={"shards": tuple(lying)}).dump())
    else:
        path.unlink()
    found = verified(fresh(store), run)
    paths = {problem.path for problem in found.problems}
    assert path in paths and (other in paths) == (damage == "swap")
    move_damaged(store.root, found.problems)
    assert not path.exists()
    assert len(quarantined(store)) == len(found.problems) - (damage == "remove")
    if damage != "rows":
        spec = ArtifactSpec(stage="mask", version=1, identity=artifact.identity, inputs=artifact.inputs)
        assert build(fresh(store), spec)[1] == ([1, 2] if damage == "swap" else [1])
        assert verified(fresh(store), run).problems == []


def test_a_damaged_manifest_and_a_strangers_file_are_found(store: Store, run: Run) -> None:
    student = artifact_directory(store.root, "student", STUDENT.key)
    (tree,) = [path for path in student.iterdir() if path.is_dir()]
    (tree / "adapter_model.safetensors").write_text("?")
    manifest = artifact_directory(store.root, "mask", mask_of(store, run).key) / "manifest.json"
    flip(manifest, 400)
    found = verified(store, run)
    assert {p.path for p in found.problems} >= {manifest, tree / "adapter_model.safetensors"}
    move_damaged(store.root, found.problems)
    assert not manifest.exists() and not (tree / "adapter_model.safetensors").exists()
    (tree / "link").symlink_to("/")
    assert "link" in verified(store, run).problems[-1].reason


def test_a_users_own_folder_is_reported_and_never_touched(store: Store, tmp_path: Path) -> None:
    folder = model(tmp_path / "mine")
    with store.building(STUDENT) as builder:
        builder.external("model", folder)
        builder.commit()
    (folder / "config.json").write_text("{}")
    found = Verified()
    verify_store(store.root, found, lambda name: None)
    assert [(p.path, p.ours) for p in found.problems] == [(folder / "config.json", False)]
    assert move_damaged(store.root, found.problems) == 0
    assert (folder / "config.json").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.model", "README.md"])
def test_what_resume_would_refuse_of_a_users_folder_is_said(store: Store, tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "mine")
    with store.building(STUDENT) as builder:
        builder.external("model", folder)
        artifact = builder.commit()
    (folder / name).write_text("{}")
    found = Verified()
    verify_store(store.root, found, lambda name: None)
    if name == "README.md":  # no engine reads it
        assert found.problems == [] and store.materialize(artifact) == folder
        return
    assert [(p.path, p.ours) for p in found.problems] == [(folder / name, False)]
    with pytest.raises(InputError, match=name):
        store.materialize(artifact)


def test_the_runs_own_files_and_its_student_are_looked_at(store: Store, run: Run) -> None:
    state = run.state
    state.rounds[0].student_sha256 = "0" * 64
    with run.lock():
        run.save(state)
    assert "names a student" in verified(store, run).problems[0].reason
    (run.directory / "identity.json").write_text("{")
    (run.directory / "state.json").write_text("{")
    flip(run.directory / "experiment.yaml", 3)
    problems = verified(store, run).problems
    assert {p.path.name for p in problems} == {"experiment.yaml", "identity.json", "state.json"}
    assert all("opd r" in p.reason for p in problems)  # each says what to do
    (run.directory / "state.json").unlink()
    found = Verified()
    verify_store(store.root, found, lambda name: None)
    assert [p.reason for p in found.problems if p.path.name == "state.json" and "missing" in p.reason]


def test_what_is_evicted_is_no_damage(store: Store, run: Run) -> None:
    evict(artifact_directory(store.root, "student", STUDENT.key))
    found = verified(store, run)
    assert (found.problems, found.evicted, found.artifacts) == ([], 1, 3)


def test_a_shard_that_no_manifest_names_is_no_damage(store: Store, run: Run) -> None:
    store.shard_writer("mask", mask_of(store, run).key).write_shard("mask", 1, rows(1, salt=5))
    found = Verified()
    verify_store(store.root, found, lambda name: None)
    assert (found.problems, found.artifacts) == ([], 3)
