"""The order of writes: whatever a power cut leaves, the store shows the old state or the new one (row 18)."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_trials import Trials, both_forms
from power_loss import Recorder, disks_after, recording, restore
from small_store import SPEC, STUDENT, build, build_student, fresh, quarantined, rows

from storage.artifacts.checkpoints import Checkpoints, write_file
from storage.disk.files import remove_leftovers
from storage.runs import Run
from storage.store import Store


@dataclass
class Story:
    """`prepare` makes the old state, `act` the new one, `look` says what a store shows: None, old or new, never else."""

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    look: Callable[[Path], Any]
    again: Callable[[Path], Any]
    """Goes on after the cut, and must end at `new`."""


def nothing(root: Path) -> None:
    Store(root)


def mask(root: Path) -> Any:
    store = Store(root)
    artifact = store.get("mask", SPEC.key)
    if artifact is None:
        return None
    assert store.verify(artifact, move=False) == []
    return artifact.content, store.read_table(artifact, "mask").to_pylist()


def student(root: Path) -> Any:
    store = Store(root)
    artifact = store.get("student", STUDENT.key)
    if artifact is None:
        return None
    folder = store.materialize(artifact)
    return artifact.content, sorted((p.name, p.read_bytes()) for p in folder.rglob("*") if p.is_file())


def state(root: Path) -> Any:
    try:
        run = Run.open(root, "r")
    except Exception:
        assert not (root / "runs" / "r").exists()
        return None
    return run.state.status, run.state.forked_from, run.experiment, run.identity


def create_run(root: Path) -> None:
    Store(root)
    Run.create(root, "r", {"a": 1}, {"a": 1})


def save_state(root: Path) -> None:
    run = Run.open(root, "r")
    with run.lock():
        saved = run.state
        saved.status, saved.forked_from = "finished", "x@1" * 50
        run.save(saved)


def one_shard(root: Path) -> None:
    with Store(root).building(SPEC) as builder:
        builder.write_shard("mask", 0, rows(0))


def damage(root: Path) -> None:
    store = Store(root)
    artifact, _ = build(store)
    path = root / "artifacts" / "mask" / SPEC.key / store.shards(artifact, "mask")[1].file
    path.write_bytes(path.read_bytes()[:-4])


def repair(root: Path) -> None:
    build(fresh(Store(root)))


def kept(root: Path) -> Checkpoints:
    folder = Store(root).root / "artifacts" / "mask" / SPEC.key
    return Checkpoints(root, folder, {"threads": 1})


def save_checkpoint(root: Path, step: int) -> None:
    if (found := kept(root).newest()[0]) is None or found.step < step:
        folder = kept(root).begin()
        files = [write_file(folder / name, lambda path: path.write_bytes(bytes([step]) * 5000)) for name in "ab"]
        kept(root).commit(folder, step, files, {"step": step})


def two_checkpoints(root: Path) -> None:
    one_shard(root)
    save_checkpoint(root, 1)
    save_checkpoint(root, 2)


def checkpoint(root: Path) -> Any:
    found, _ = kept(root).newest()
    return found and (found.step, found.content, [path.read_bytes() for path in found.files])


STORIES = {
    "a table is committed": Story(nothing, lambda root: build(Store(root)), mask, lambda r: build(Store(r))),
    "a table is committed after an earlier attempt": Story(one_shard, repair, mask, repair),
    "a damaged shard is repaired": Story(damage, repair, mask, repair),
    "a tree is committed": Story(
        nothing, lambda root: build_student(Store(root)), student, lambda r: build_student(Store(r))
    ),
    "a checkpoint is saved": Story(
        two_checkpoints, lambda root: save_checkpoint(root, 3), checkpoint, lambda root: save_checkpoint(root, 3)
    ),
    "a run is created": Story(nothing, create_run, state, create_run),
    "a run's state is saved": Story(create_run, save_state, state, save_state),
}


@pytest.mark.parametrize("what", STORIES)
@both_forms(short=30, full=100_000)
def test_every_prefix_shows_the_old_state_or_the_new_one(trials: Trials, tmp_path: Path, what: str, count: int) -> None:
    story, root = STORIES[what], tmp_path / "store"
    story.prepare(root)
    old = story.look(root)
    with recording(root) as recorder:
        story.act(root)
    new = story.look(root)
    assert new is not None and new != old
    cuts = list(possible(recorder, subsets=4 if count < 1000 else 40))
    assert len({call for call, *_ in cuts}) == len(recorder.calls) > 5
    names = [f"{what} {number}" for number in range(len(cuts))]
    last = [name for name, (call, *_) in zip(names, cuts, strict=True) if call == len(recorder.calls) - 1]
    if len(names) > count:
        names = sorted({*random.Random(what).sample(names, count), *last})

    def attempt(name: str) -> None:
        number = int(name.rsplit(" ", 1)[1])
        call, lost, disk = cuts[number]
        there = tmp_path / "disks" / str(number) / "store"
        there.parent.mkdir(parents=True)
        restore(disk, recorder.top, there)
        where = f"after call {call} ({recorder.calls[call]}), {lost}"
        seen = story.look(there)
        assert seen in (old, new), where
        if call == len(recorder.calls) - 1:
            assert seen == new, f"done, and gone: {where}"
        check_quarantine(there)
        story.again(there)
        assert story.look(there) == new, where
        remove_leftovers(there)
        shutil.rmtree(there.parent)

    trials(18, f"power cut while {what}: calls x what is lost", names, attempt)


def possible(recorder: Recorder, subsets: int) -> list[tuple[int, str, Any]]:
    draw = random.Random(0)
    return [(call, *disk) for call in range(len(recorder.calls)) for disk in disks_after(recorder, call, draw, subsets)]


def check_quarantine(root: Path) -> None:
    """What lies there has its reason; a reason may have lost what it was about."""
    names = {path.name for path in (root / "quarantine").iterdir() if not path.name.startswith(".tmp-")}
    for name in names:
        assert name.endswith(".reason.json") or f"{name}.reason.json" in names
    assert all(": " in note for note in quarantined(Store(root)))


@pytest.mark.promise(18, "an fsync left out: the model of the disk sees it")
@pytest.mark.parametrize("forgotten", ["storage.artifacts.shards.fsync_file", "storage.disk.files.fsync_directory"])
def test_the_model_sees_a_missing_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """The recorder proves nothing unless a store that forgets to sync loses what it said was done."""
    root = tmp_path / "store"
    nothing(root)
    monkeypatch.setattr(forgotten, lambda path: None)
    with recording(root) as recorder:
        build(Store(root))
    done = [disk for call, _, disk in possible(recorder, subsets=2) if call == len(recorder.calls) - 1]
    lost = 0
    for number, disk in enumerate(done):
        restore(disk, recorder.top, tmp_path / str(number))
        lost += mask(tmp_path / str(number)) is None
    assert lost > 0
