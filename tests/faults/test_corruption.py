"""No corrupt shard, manifest or checkpoint is trained on or queried (row 2).

Each trial begins with a run that has all but its last training, damages one thing that this needs without touching sizes'
or times' stamps where that is possible, and goes on as users do: the same command until it ends well."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from fault_trials import Trials, both_forms
from scripted_run import NAME, Trial, prepare_root

from flows.experiment import with_plugins
from flows.run.runner import open_run, resume_experiment
from storage.artifacts.artifact import MANIFEST, load_manifest
from storage.artifacts.verify import Verified, verify_store
from storage.errors import CorruptArtifact, OpdError
from storage.query.catalog import Catalog
from storage.runs import RECORDS, Run
from storage.store import Store
from storage.upkeep.gc import Collector

BLOCK = 4096
QUESTIONS = {
    "rollout": "SELECT * FROM rollouts WHERE round = 2 ORDER BY sample_id",
    "mask": "SELECT sample_id, mask_reasons FROM supervision WHERE round = 2 ORDER BY sample_id",
    "teacher_topk": "SELECT sample_id, teacher_topk_ids FROM supervision WHERE round = 2 ORDER BY sample_id",
}


@dataclass
class World:
    """The store before the last training, what is consumed by it, and how it all must end."""

    root: Path
    expected: dict[str, Any]
    targets: dict[str, list[Path]]
    """Kind -> files, relative to the store."""
    answers: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("corruption")
    root = prepare_root(folder / "store")
    in_process.run(root)
    expected = Trial(folder, folder).result()
    rounds = Run.open(root, NAME).state.rounds
    second = {name: key for stage in rounds[2].stages.values() for name, key in stage.artifacts.items()}
    first = {name: key for stage in rounds[1].stages.values() for name, key in stage.artifacts.items()}
    for name in ("student", "trainer_state", "train", "evaluate"):
        shutil.rmtree(root / "artifacts" / name / second[name])
    sharded = [Path("artifacts", name, second[name]) for name in ("rollout", "teacher_topk", "mask")]
    trees = [Path("artifacts", name, first[name]) for name in ("student", "trainer_state")]
    targets = {
        "shard": [p.relative_to(root) for d in sharded for p in sorted((root / d).glob("*.parquet"))],
        "manifest": [d / MANIFEST for d in (*sharded, *trees)],
        "checkpoint": [p.relative_to(root) for d in trees for p in sorted((root / d).rglob("*-*/*"))],
    }
    assert [len(files) for files in targets.values()] == [6, 5, 4]
    world = World(root, expected, targets)
    world.answers = {name: ask(root, sql) for name, sql in QUESTIONS.items()}
    return world


def ask(root: Path, sql: str) -> list[dict[str, Any]]:
    return Catalog(Store(root), Run.open(root, NAME)).query(sql).to_pylist()


# --- damage: the files' stamps stay what they were, as on a failing disk ---------------------------------------------


def rewrite(path: Path, data: bytes) -> None:
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip(files: list[Path], draw: random.Random) -> list[Path]:
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    rewrite(path, bytes(data))
    return [path]


def zero(files: list[Path], draw: random.Random) -> list[Path]:
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    blocks = [b for b in range(0, len(data), BLOCK) if any(data[b : b + BLOCK])]
    start = draw.choice(blocks)
    data[start : start + BLOCK] = bytes(len(data[start : start + BLOCK]))
    rewrite(path, bytes(data))
    return [path]


def truncate(files: list[Path], draw: random.Random) -> list[Path]:
    path = draw.choice(files)
    data = path.read_bytes()
    rewrite(path, data[: draw.randrange(len(data))])
    return [path]


def swap(files: list[Path], draw: random.Random) -> list[Path]:
    while True:
        one, other = draw.sample(files, 2)
        first, second = one.read_bytes(), other.read_bytes()
        if first != second:
            break
    rewrite(one, second)
    rewrite(other, first)
    return [one, other]


DAMAGE: dict[str, Callable[[list[Path], random.Random], list[Path]]] = {
    "one bit flipped": flip,
    "4 KiB zeroed": zero,
    "truncated": truncate,
    "two files swapped": swap,
}


def inodes(root: Path) -> dict[Path, int]:
    return {p.relative_to(root): p.stat().st_ino for p in (root / "artifacts").rglob("*") if p.is_file()}


def artifact_of(path: Path) -> Path:
    return Path(*path.parts[:3])


def pieces(root: Path, kind: str, damaged: list[Path]) -> set[Path]:
    """Files that may be made again: the shard; the tree of a checkpoint's file; for a manifest the trees that only it named
    (shards have sidecars, and stay)."""
    allowed = set(damaged)
    for path in damaged:
        folder = root / artifact_of(path)
        allowed |= {artifact_of(path) / MANIFEST}
        if kind == "shard":
            allowed.add(path.with_name(path.name + ".sidecar.json"))
        else:
            allowed |= {p.relative_to(root) for p in folder.rglob("*-*/*") if p.is_file()}
    return allowed


def warm(root: Path) -> None:
    """An earlier process has used everything and remembers that it was good."""
    store = Store(root)
    for stage in ("student", "trainer_state"):
        for artifact in store.list(stage):
            store.materialize(artifact, "model" if stage == "student" else "state")
            load_manifest(root / "artifacts" / stage / artifact.key)


@pytest.mark.promise(2, "a shard without its footer")
@pytest.mark.parametrize("table", ["rollout", "teacher_topk", "mask"])
def test_a_shard_without_its_footer_is_made_again(world: World, tmp_path: Path, table: str) -> None:
    """Whatever reads it first, a check before the training included, moves it away, so that the next start can go on."""
    root = tmp_path / "store"
    shutil.copytree(world.root, root)
    path = next(path for path in world.targets["shard"] if path.parts[1] == table)
    rewrite(root / path, (root / path).read_bytes()[:-8] + bytes(8))
    with pytest.raises(CorruptArtifact):
        in_process.run(root)
    assert path.as_posix() in notes(root)
    in_process.run(root)
    assert Trial(tmp_path, tmp_path).result() == world.expected


@pytest.mark.parametrize("damage", DAMAGE)
@both_forms(short=6, full=200)
def test_damage_is_noticed_before_use(world: World, trials: Trials, tmp_path: Path, damage: str, count: int) -> None:
    def attempt(name: str) -> None:
        draw = random.Random(f"{damage} {name}")
        kind = ("shard", "manifest", "checkpoint")[int(name) % 3]
        root = tmp_path / name / "store"
        shutil.copytree(world.root, root)
        warm(root)
        files = [root / path for path in world.targets[kind]]
        damaged = [path.relative_to(root) for path in DAMAGE[damage](files, draw)]
        before, spared = inodes(root), pieces(root, kind, damaged)
        if kind != "checkpoint" and draw.random() < 0.5:
            queries_refuse(world, root, kind, damaged)
        errors = []
        for _ in range(1 + 2 * len(damaged)):
            try:
                in_process.run(root)
                break
            except CorruptArtifact as error:
                errors.append(str(error))
        else:
            raise AssertionError(f"still not repaired: {errors}")
        quarantined = notes(root)
        assert any(path.as_posix() in quarantined for path in damaged), (damaged, quarantined, errors)
        for path in damaged:
            assert path.as_posix() in quarantined or inodes(root).get(path) != before[path], path
        after = inodes(root)
        again = {path for path, inode in before.items() if after.get(path) != inode} - spared
        assert not again, f"made again without need: {sorted(map(str, again))}"
        found = Trial(root.parent, root.parent).result()
        assert found == world.expected
        shutil.rmtree(root.parent)

    trials(2, damage, map(str, range(count)), attempt)


@pytest.mark.parametrize("damage", DAMAGE)
@both_forms(short=3, full=60)
def test_damage_to_a_runs_own_files_is_noticed(
    world: World, trials: Trials, tmp_path: Path, damage: str, count: int
) -> None:
    """What says which experiment this is, and which artifacts it needs: nothing is run by it, collected by it or lost."""

    def attempt(name: str) -> None:
        draw = random.Random(f"run {damage} {name}")
        record = RECORDS[int(name) % 3]
        part = record.partition(".")[0]
        root = tmp_path / name / "store"
        shutil.copytree(world.root, root)
        other = open_run(scripted_run.experiment(1).model_copy(update={"seed": 5}), "other", root)
        run, store = Run.open(root, NAME), Store(root)
        whole, path = getattr(run, part), run.directory / record
        damaged = DAMAGE[damage]([path, other.directory / record] if damage == "two files swapped" else [path], draw)
        if record != "experiment.yaml" and damage == "one bit flipped" and whole_still(run, part, whole):
            return shutil.rmtree(root.parent)  # 1e-05 became 1E-05: the same JSON
        found = Verified()
        verify_store(root, found, lambda _: None)
        assert {p.path for p in found.problems if p.artifact.startswith("run ")} == set(damaged)
        if record != "identity.json":  # a collection does not read it
            with pytest.raises(CorruptArtifact, match=record):
                Collector(store).plan()
        if record == "experiment.yaml":
            with pytest.raises(CorruptArtifact, match=f"{record}.*opd run CONFIG --name {NAME}"):
                resume_experiment(NAME, root, [])
        else:
            assert resume_experiment(NAME, root, []) == with_plugins(scripted_run.experiment())
        before = inodes(root)
        in_process.run(root)
        assert path.relative_to(root).as_posix() in notes(root)
        assert {p: inode for p, inode in inodes(root).items() if p in before} == before, "made again without need"
        assert Trial(root.parent, root.parent).result() == world.expected
        if part != "state":
            assert getattr(run, part) == whole
        shutil.rmtree(root.parent)

    trials(2, f"a run's experiment, identity or state: {damage}", map(str, range(count)), attempt)


def whole_still(run: Run, part: str, whole: object) -> bool:
    try:
        return bool(getattr(run, part) == whole)
    except CorruptArtifact:
        return False


def notes(root: Path) -> dict[str, str]:
    """Path -> reason of all that lies in quarantine."""
    found = [json.loads(path.read_text()) for path in (root / "quarantine").glob("*.reason.json")]
    assert len(found) * 2 == len(list((root / "quarantine").iterdir()))
    assert all(note["reason"] for note in found)
    return {note["path"]: note["reason"] for note in found}


def queries_refuse(world: World, root: Path, kind: str, damaged: list[Path]) -> None:
    """A query says that something is damaged; or answers rightly, when what is damaged says nothing (a page's header has
    bits that no reader looks at). Of a damaged manifest nothing is believed."""
    for path in damaged:
        stage = path.parts[1]
        if stage not in QUESTIONS:
            continue
        try:
            answer = ask(root, QUESTIONS[stage])
        except OpdError:
            continue
        assert kind == "shard", f"{path} was queried"
        assert answer == world.answers[stage]
