"""Evicted artifacts count as done and are rebuilt when a stage must read them: the real maker, stages of plain rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from flows.run.executor import Maker, Planner
from flows.run.progress import SilentReporter
from storage.artifacts.artifact import artifact_directory
from storage.errors import CorruptArtifact
from storage.runs import Run, StageState
from storage.store import Artifact, ArtifactSpec, Builder, Store
from storage.upkeep.gc import Collector, evict
from storage.upkeep.retention import Retention
from tasks.stage import Context, Work
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

DRIFT = {"now": 0}


def stage(*outputs: str) -> Callable[..., Work]:
    """A stage whose rows are computed from all rows of its inputs, which it therefore must read."""

    def make(number: int, *inputs: Artifact) -> Work:
        contents = {f"{i}": artifact.content["mask"] for i, artifact in enumerate(inputs)}
        specs = {name: ArtifactSpec.of(name, 1, {"number": number}, contents) for name in outputs}

        def build(builders: dict[str, Builder], context: Context) -> None:
            read = [context.store.read_table(artifact, "mask")["mask_reasons"].to_pylist() for artifact in inputs]
            total = (sum(sum(map(sum, rows)) for rows in read) + number + DRIFT["now"]) % 1000
            for name, builder in builders.items():
                rows = pa.table({"sample_id": ["a", "b"], "mask_reasons": [[total % 7, len(name)], [total]]})
                for shard in builder.missing("mask", 1):
                    builder.write_shard("mask", shard, rows)
                builder.commit()

        return Work(outputs[0], specs, build)

    return make


def walk(do: Any, rounds: int) -> Artifact:
    """The shape of the main path: rollout reads the student; train reads rollouts, student and state."""
    with do.round(0):
        student = state = do("prepare", stage("prepare"), 0)["prepare"]
    for number in range(1, rounds + 1):
        with do.round(number) as round:
            rollout = do("rollout", stage("rollout"), number, student)["rollout"]
            trained = do("train", stage("student", "trainer_state"), number, student, state, rollout)
            student, state = trained["student"], trained["trainer_state"]
            if isinstance(do, Maker):
                round.ends_with(SimpleNamespace(content={"weights": student.content["mask"]}))
    return student


class Watcher(SilentReporter):
    """Remembers what was made, in order."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def stage(self, round: int, label: str, state: StageState, metrics: Any = None) -> None:
        if state.state == "done":
            self.made.append(f"{label} {round}")


class World:
    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.run = Run.create(root, "one", {}, {})

    def go(self, rounds: int, restore: int | None = None) -> tuple[Artifact, list[str]]:
        """The last student, and the stages that were made."""
        runtime, watcher = RuntimeConfig(device="cpu"), Watcher()
        with WorkerPool(runtime, self.store.root / "logs") as workers, self.run.lock():

            def context(progress: Any) -> Context:
                return Context(self.store, runtime, workers, progress, lambda line: None)

            maker = Maker(self.store, self.run, self.run.state, context, watcher, restore=restore)
            student = walk(maker, rounds)
            assert maker.built == len(watcher.made)
        return student, watcher.made

    def collect(self, **keep: int) -> int:
        collector = Collector(self.store, lambda run: Retention(**keep))
        return len(collector.apply(collector.plan()))

    def evicted(self) -> set[str]:
        return {f"{a.stage} {a.identity['number']}" for a in self.store.list() if self.store.evicted(a)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    DRIFT["now"] = 0
    made = World(tmp_path / "store")
    made.go(3)
    return made


def test_a_run_goes_on_without_what_it_need_not_read(world: World, tmp_path: Path) -> None:
    assert world.collect(rollouts=1, trainer_state=1, students=1) == 6
    assert world.go(3)[1] == []
    student, made = world.go(4)
    assert made == ["rollout 4", "train 4"]
    assert world.evicted() == {f"{name} {n}" for name in ("rollout", "student", "trainer_state") for n in (1, 2)}
    assert student == world.store.get(student.stage, student.key)
    assert student.content == World(tmp_path / "undisturbed").go(4)[0].content


def test_what_must_be_read_is_made_again_with_all_that_it_is_made_from(world: World) -> None:
    undisturbed = world.go(3)[0]
    world.collect(rollouts=0, trainer_state=1, students=1)
    (lost,) = [a for a in world.store.list("student") if a.key == undisturbed.key]
    next(artifact_directory(world.store.root, "student", lost.key).glob("*.parquet")).unlink()
    plan = Planner(world.store)
    walk(plan, 3)
    assert {f"{line.stage} {line.round}": line.state for line in plan.lines} == {
        "prepare 0": "cached", "rollout 1": "restore", "train 1": "restore", "rollout 2": "restore",
        "train 2": "restore", "rollout 3": "restore", "train 3": "run",
    }  # fmt: skip
    student, made = world.go(3)
    assert made == ["rollout 1", "train 1", "rollout 2", "train 2", "rollout 3", "train 3"]
    assert student == undisturbed
    assert world.evicted() == set()
    assert all(world.store.verify(artifact) == [] for artifact in world.store.list())


def test_a_round_is_restored_on_demand(world: World) -> None:
    world.collect(rollouts=0, trainer_state=1, students=1)
    assert world.go(3, restore=1)[1] == ["rollout 1", "train 1"]
    assert world.evicted() == {"rollout 2", "rollout 3", "student 2", "trainer_state 2"}
    assert world.go(3, restore=1)[1] == []


def test_what_does_not_come_out_equal_is_quarantined_and_what_follows_made_anew(world: World) -> None:
    before = world.go(3)[0]
    evict(artifact_directory(world.store.root, *name_of(world, "rollout", 2)))
    DRIFT["now"] = 1  # another machine, another library
    with pytest.raises(CorruptArtifact, match=r"after `opd gc` had evicted.*quarantine"):
        world.go(3, restore=2)
    assert world.run.state.rounds[2].stages["train"].state == "done"  # nothing is forgotten
    student, made = world.go(3)
    assert made == ["rollout 2", "train 2", "rollout 3", "train 3"]
    assert student.content != before.content


def name_of(world: World, stage: str, number: int) -> tuple[str, str]:
    (found,) = [a for a in world.store.list(stage) if a.identity["number"] == number]
    return found.stage, found.key


def test_inputs_are_held_while_a_stage_reads_them(world: World) -> None:
    """A collection at the worst moment, in the middle of a stage, leaves the stage its inputs."""
    seen = []
    plain = stage("rollout")

    def spying(number: int, *inputs: Artifact) -> Work:
        work = plain(number, *inputs)

        def build(builders: dict[str, Builder], context: Context) -> None:
            collector = Collector(world.store, lambda run: Retention())
            collector._needs = lambda: type(needs)()  # as if no run named anything
            seen.append({item.path.name for item in collector.apply(collector.plan())})
            work.build(builders, context)

        return Work(work.stage, work.outputs, build)

    needs = Collector(world.store)._needs()
    runtime = RuntimeConfig(device="cpu")
    (student,) = [a for a in world.store.list("student") if a.identity["number"] == 3]
    with WorkerPool(runtime, world.store.root / "logs") as workers:
        state = Run.create(world.store.root, "two", {}, {"n": 2}).state
        make_context = lambda progress: Context(world.store, runtime, workers, progress, lambda line: None)  # noqa: E731
        maker = Maker(world.store, Run.open(world.store.root, "two"), state, make_context, SilentReporter())
        with maker.round(9):
            made = maker("rollout", spying, 9, student)["rollout"]
    assert len(seen[0]) > 5 and student.key not in seen[0]
    assert world.store.verify(student) == world.store.verify(made) == []
