"""What killed processes leave goes at the next start: their temporary files, and what only unfinished artifacts need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from shared_prefect import eventually
from small_store import STUDENT, build_student, contents, model, rows

from storage.artifacts.batches import BatchLog
from storage.artifacts.checkpoints import write_file
from storage.artifacts.shards import INTERMEDIATE
from storage.disk import failpoints
from storage.disk.files import TEMPORARY, remove_leftovers, temporary_name
from storage.disk.locks import build_lock, locked
from storage.store import Builder, Store
from storage.upkeep.gc import evict


def test_what_a_dead_process_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    mine = tmp_path / temporary_name("mine")
    mine.mkdir()
    code = "import storage.disk.files; print(storage.disk.files.temporary_name())"
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / left).write_text("half")
    other = tmp_path / f"{TEMPORARY}00000000-1.1-0123456789ab"
    other.write_text("of another machine")
    assert remove_leftovers(tmp_path, places=("",)) == [tmp_path / left]
    assert mine.exists() and other.exists()
    assert remove_leftovers(tmp_path, places=("",), mine=True) == [mine] and other.exists()


def test_an_id_that_another_process_has_by_now_protects_nothing(tmp_path: Path) -> None:
    machine, _, rest = temporary_name().removeprefix(TEMPORARY).split("-")[:3]
    old = tmp_path / f"{TEMPORARY}{machine}-{os.getpid()}.1-{rest}"
    old.write_text("of a process that had our id")
    unknown = tmp_path / f"{TEMPORARY}{machine}-{os.getpid()}.0-{rest}"
    unknown.write_text("where the kernel told no start")
    assert remove_leftovers(tmp_path, places=("",)) == [old]
    assert unknown.exists()


def test_a_process_that_ended_and_that_nobody_waited_for_protects_nothing(tmp_path: Path) -> None:
    """A zombie has its id and its start still."""
    code = "import storage.disk.files; print(storage.disk.files.temporary_name(), flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = tmp_path / process.stdout.read().strip()  # to its end: the process has closed it
        left.write_text("half")
        eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        assert remove_leftovers(tmp_path, places=("",)) == [left]


def keep_work(builder: Builder) -> None:
    """A checkpoint, a record of a batch and an intermediate shard, as of work under way."""
    kept = builder.checkpoints({"threads": 1})
    folder = kept.begin()
    kept.commit(folder, 1, [write_file(folder / "value", lambda path: path.write_bytes(b"1") and None)], {})
    BatchLog(builder.path, "mask").writing(0)
    builder.intermediate().write_shard("mask", 0, rows(0))


WORK = ["checkpoint", INTERMEDIATE, "mask"]


def work_of(store: Store) -> list[str]:
    folder = store.root / "artifacts" / "student" / STUDENT.key
    names = {path.name.split("-")[0] for path in folder.iterdir()}
    return sorted(names & set(WORK))


@pytest.mark.parametrize("point", ["manifest.after_link", "manifest.after_sync"])
def test_work_of_an_artifact_that_is_committed_goes_at_the_next_start(
    store: Store, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv(failpoints.SPEC, f"{point}=raise:KeyboardInterrupt")
    with store.building(STUDENT) as builder:
        keep_work(builder)
        model(builder.directory())
        failpoints.arm()
        with pytest.raises(KeyboardInterrupt):  # as a SIGKILL: nothing of the commit comes after it
            builder.commit()
    monkeypatch.delenv(failpoints.SPEC)
    failpoints.arm()
    artifact = store.get("student", STUDENT.key)
    assert artifact is not None and work_of(store) == WORK
    with locked(build_lock(store.root, "student", STUDENT.key), print):
        store.remove_leftovers()
    assert work_of(store) == WORK  # somebody builds it again now
    store.remove_leftovers()
    assert work_of(store) == [] and store.verify(artifact) == []


def test_work_of_an_artifact_that_is_to_be_made_again_stays(store: Store) -> None:
    artifact = build_student(store)
    (store.root / "artifacts" / "folder" / "of-mine").mkdir(parents=True)
    for file in ("checkpoint-x", "manifest.json"):
        (store.root / "artifacts" / "folder" / "of-mine" / file).write_text("{}")
    evict(store.root / "artifacts" / "student" / artifact.key)
    with store.building(STUDENT) as builder:
        keep_work(builder)
    before = contents(store.root / "artifacts")
    store.remove_leftovers()
    assert contents(store.root / "artifacts") == before
    assert build_student(store) == artifact and work_of(store) == []
