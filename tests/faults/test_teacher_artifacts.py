"""Damage to, and loss of, drafts, the table of a blend, averaged teachers, rewards and contexts (row 2): `opd verify` names the
file, the next start makes it again with the same digest, a collection keeps what a run uses and removes the rest, and the round
replays (row 13)."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from fault_trials import Trials, both_forms
from registries import plugin_path
from scripted_run import NAME, Trial, experiment, prepare_root

from flows.run.replay import replay_round
from storage.artifacts.artifact import MANIFEST
from storage.artifacts.verify import Verified, move_damaged, verify_run
from storage.errors import CorruptArtifact
from storage.runs import Run
from storage.store import Store
from storage.upkeep.gc import Collector
from storage.upkeep.retention import Retention, used

STAGES = {"drafts": ("draft",), "blended": ("blending", "teacher_ema"), "judged": ("judge",), "contexts": ("context",)}
"""Variant of the scripted run -> the artifacts that it has beside those of a plain one."""
WORDS = {
    "draft": "drafts",
    "blending": "the table of a blend",
    "judge": "rewards",
    "context": "contexts of samples",
    "teacher_ema": "an averaged teacher",
    "trainer_state": "a state with an average",
}
KINDS = [(variant, stage) for variant, stages in STAGES.items() for stage in stages] + [("blended", "trainer_state")]


@dataclass
class World:
    root: Path
    result: dict[str, Any]

    def files(self, stage: str) -> list[Path]:
        """Manifests, shards and files of trees, relative to the store."""
        found = [p.relative_to(self.root) for p in (self.root / "artifacts" / stage).rglob("*") if p.is_file()]
        return sorted(path for path in found if path.name == MANIFEST or path.suffix in (".parquet", ".safetensors"))


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Variant -> a finished run."""
    found = {}
    for variant in STAGES:
        folder = tmp_path_factory.mktemp(variant)
        root = prepare_root(folder / "store", experiment(variant=variant))
        in_process.run(root, variant=variant)
        found[variant] = World(root, Trial(folder, folder).result())
    return found


def change_a_byte(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {"one bit flipped": change_a_byte, "missing": remove}


def problems(root: Path) -> list[Path]:
    """What `opd verify` of the run finds, and moves to quarantine."""
    found = Verified()
    verify_run(root, Run.open(root, NAME), found, lambda _: None)
    move_damaged(root, found.problems)
    return [problem.path.relative_to(root) for problem in found.problems]


def go_on(root: Path, variant: str) -> None:
    """`opd resume` until it ends well: each attempt may find one damaged file, which it names."""
    for _ in range(3):
        try:
            in_process.run(root, variant=variant)
            return
        except CorruptArtifact:
            continue
    raise AssertionError("still not repaired")


@pytest.mark.parametrize(("variant", "stage"), KINDS)
@both_forms(short=2, full=40)
def test_what_is_damaged_or_lost_is_named_and_made_again(
    worlds: dict[str, World], trials: Trials, tmp_path: Path, variant: str, stage: str, count: int
) -> None:
    world = worlds[variant]
    files = world.files(stage)
    assert {path.suffix for path in files} == {
        ".json",
        ".parquet" if stage in ("draft", "blending", "judge", "context") else ".safetensors",
    }

    def attempt(name: str) -> None:
        draw = random.Random(f"{stage} {name}")
        root = tmp_path / name / "store"
        shutil.copytree(world.root, root)
        path = draw.choice(files)
        DAMAGE[list(DAMAGE)[int(name) % 2]](root / path, draw)
        spared = {p: p.stat().st_ino for p in (root / "artifacts").rglob("*") if p.is_file()}
        assert problems(root) == [path]
        go_on(root, variant)
        assert Trial(root.parent, root.parent).result() == world.result
        assert problems(root) == []
        folder = root.joinpath(*path.parts[:3])
        again = {p for p, inode in spared.items() if not p.exists() or p.stat().st_ino != inode}
        assert all(folder in p.parents for p in again), f"made again without need: {again}"
        shutil.rmtree(root.parent)

    trials(2, f"one bit flipped in, or a file missing of: {WORDS[stage]}", map(str, range(count)), attempt)


@pytest.mark.parametrize("variant", STAGES)
@pytest.mark.promise(
    2, "collection keeps drafts, blends, averages, rewards and contexts that a run uses, and removes the others"
)
def test_collection_keeps_what_a_run_uses(worlds: dict[str, World], tmp_path: Path, variant: str) -> None:
    world, root = worlds[variant], tmp_path / "store"
    shutil.copytree(world.root, root)
    other = experiment(1, variant).model_copy(update={"seed": 5})
    in_process.go(root, other, "other")
    store = Store(root)
    needed, more = (used(Run.open(root, name).state) for name in (NAME, "other"))
    assert set(STAGES[variant]) <= {stage for stage, _ in needed} and set(STAGES[variant]) <= {
        s for s, _ in more - needed
    }
    assert Collector(store).plan().items == []
    shutil.rmtree(root / "runs" / "other")
    plan = Collector(store).plan()
    assert {item.artifact for item in plan.items} == more - needed and {item.kind for item in plan.items} == {"unused"}
    Collector(store).apply(plan)
    assert {(artifact.stage, artifact.key) for artifact in store.list()} == {
        tuple(name.split("/")) for name in world.result["contents"]
    }
    assert problems(root) == [] and in_process.go(root, experiment(variant=variant), NAME) == []


@pytest.mark.parametrize("variant", ["judged", "contexts"])
@pytest.mark.promise(
    2, "contexts of past rounds are evicted as their signals are, rewards never, and nothing that another run keeps"
)
def test_contexts_of_past_rounds_are_evicted_as_their_signals_are(
    worlds: dict[str, World], tmp_path: Path, variant: str
) -> None:
    world, root, e = worlds[variant], tmp_path / "store", experiment(variant=variant)
    shutil.copytree(world.root, root)
    store, past = Store(root), Retention(signals=1)
    stages = Run.open(root, NAME).state.rounds[1].stages
    signals = {name for label in ("context", "supervise") if label in stages for name in stages[label].artifacts}
    assert ("context" in signals) == (variant == "contexts") and "judge" in stages
    in_process.go(root, e, "keeps")
    shared = Collector(store, retention=lambda run: past if run.name == NAME else Retention())
    assert shared.plan().items == []
    shutil.rmtree(root / "runs" / "keeps")
    collector = Collector(store, retention=lambda _: past)
    collector.apply(collector.plan())
    assert in_process.gone(root, NAME) == {name: [1] for name in signals}
    assert in_process.go(root, e, NAME) == [] and in_process.gone(root, NAME)  # an evicted artifact counts as done
    in_process.go(root, e, NAME, restore=1)
    assert in_process.gone(root, NAME) == {}
    assert Trial(root.parent, root.parent).result() == world.result and problems(root) == []


@pytest.mark.parametrize("variant", STAGES)
@pytest.mark.promise(
    13, "a round with drafts, a blend, an averaged teacher, rewards or contexts, after one of its files was made again"
)
def test_such_a_round_replays(
    worlds: dict[str, World], tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted engines in worker processes; `tests/e2e` has the same with the real ones."""
    root = tmp_path / "store"
    shutil.copytree(worlds[variant].root, root)
    lost = [[path for path in worlds[variant].files(stage) if path.name != MANIFEST][-1] for stage in STAGES[variant]]
    for path in lost:
        (root / path).unlink()
    assert sorted(problems(root)) == sorted(lost)
    go_on(root, variant)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    scripted_run.find_engines()
    more = {"judged": ("judge",), "contexts": ("judge", "context")}.get(variant, ())
    stages = ("rollout", *more, "supervise", "train")
    results = replay_round(Run.open(root, NAME), root, 2, stages, [], False, lambda _: None)
    made = {result.artifact.split("/")[0] for result in results}
    assert made >= {"rollout", "mask", "student", "trainer_state", *STAGES[variant]} - {"draft"}
    assert all(result.as_json()["identical"] for result in results), results
