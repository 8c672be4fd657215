"""Collection: what is removed, what never is, and what a kill during it leaves."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from places import CHECKOUT
from small_store import SPEC, build, build_student, contents, flip, fresh, quarantined, rows, shard_path

from storage.artifacts.artifact import ArtifactSpec, load_manifest
from storage.disk.files import quarantine
from storage.disk.locks import locked
from storage.errors import ConfigError, CorruptArtifact, Evicted, RunBusy
from storage.runs import RoundState, Run, RunState, StageState
from storage.store import Artifact, Store
from storage.upkeep.gc import Collector, evict, repeatable, unrepeatable_note
from storage.upkeep.retention import Retention, droppable


def keeping(**fields: int) -> Retention:
    return Retention(**fields)


def run_of(store: Store, name: str, rounds: dict[int, list[tuple[str, str]]], retain: dict | None = None) -> Run:
    """A finished run whose rounds used these artifacts."""
    run = Run.create(store.root, name, {"policy": {"retain": retain or {}}}, {"name": name})
    state = run.state
    state.status = "finished"
    state.rounds = [
        RoundState(
            round=number,
            student_sha256="ab" * 32,
            stages={f"s{i}": StageState(state="done", artifacts={s: k}) for i, (s, k) in enumerate(names)},
        )
        for number, names in rounds.items()
    ]
    with run.lock():
        run.save(state)
    return run


def masks(store: Store, count: int) -> list[Artifact]:
    return [build(store, ArtifactSpec.of("mask", 1, {"n": n}, {}), salt=n)[0] for n in range(count)]


def name(artifact: Artifact) -> tuple[str, str]:
    return artifact.stage, artifact.key


def collect(store: Store, retain: Retention | None = None, **options: float) -> list[tuple[str, str]]:
    """Plans and applies; what went, as (kind, last part of its path)."""
    collector = Collector(store, (lambda run: retain) if retain else lambda run: Retention(), **options)
    return [(item.kind, item.path.name) for item in collector.apply(collector.plan())]


def test_retention_counts_back_from_the_last_finished_round() -> None:
    def stage(number: int) -> StageState:
        return StageState(state="done", artifacts={"rollout": f"r{number}", "mask": f"m{min(number, 3)}", "train": "t"})

    rounds = [RoundState(round=n, student_sha256="ab", stages={"all": stage(n)}) for n in range(5)]
    rounds.append(RoundState(round=5, stages={"all": stage(5)}))  # under way when it was stopped
    state = RunState(name="n", rounds=rounds)
    assert droppable(state, Retention()) == set()
    assert droppable(state, keeping(rollouts=1)) == {("rollout", "r1"), ("rollout", "r2"), ("rollout", "r3")}
    assert droppable(state, keeping(rollouts=0)) == {("rollout", f"r{n}") for n in (1, 2, 3, 4)}
    assert droppable(state, keeping(signals=1)) == {("mask", "m1"), ("mask", "m2")}  # round 4 uses that of round 3 too
    rounds[2].stages["all"].state = "running"
    assert ("rollout", "r2") not in droppable(state, keeping(rollouts=1))


@pytest.mark.parametrize("field", [{"students": 0}, {"trainer_state": 0}, {"rollouts": -1}, {"students": True and "x"}])
def test_what_the_next_round_reads_cannot_be_let_go(field: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        Retention.of({"policy": {"retain": field}}, "run n")
    with pytest.raises(ConfigError, match=next(iter(field))):
        Retention().with_changes(field)


def test_an_evicted_artifact_counts_as_done_is_not_read_and_comes_back_equal(store: Store) -> None:
    artifact = build(store)[0]
    before = contents(store.root / "artifacts" / "mask" / artifact.key)
    run_of(store, "one", {1: [name(artifact)], 2: []})
    assert collect(store, keeping(signals=1)) == [("evicted", artifact.key)]
    assert set(contents(store.root / "artifacts" / "mask" / artifact.key)) == {"manifest.json"}
    again = fresh(store)
    assert again.get("mask", SPEC.key) == artifact and again.list() == [artifact]
    assert again.evicted(artifact) is not None
    for read in (lambda: again.read_table(artifact, "mask"), lambda: again.read_shard(artifact, "mask", 0)):
        with pytest.raises(Evicted, match=r"opd restore one --round 1"):
            read()
    assert again.verify(artifact) == []
    assert collect(store, keeping(signals=1)) == []
    rebuilt, written = build(again)
    assert (rebuilt, written) == (artifact, [0, 1, 2])
    assert again.evicted(artifact) is None
    assert again.read_table(artifact, "mask").num_rows == 120
    assert again.verify(artifact) == []
    assert len(contents(store.root / "artifacts" / "mask" / artifact.key)) == len(before)


def test_an_evicted_tree_comes_back_equal_and_says_so_until_then(store: Store) -> None:
    artifact = build_student(store)
    run_of(store, "one", {1: [name(artifact)], 2: []})
    assert collect(store, keeping(students=1)) == [("evicted", artifact.key)]
    with pytest.raises(Evicted):
        store.materialize(artifact)
    assert build_student(store) == artifact
    assert (store.materialize(artifact) / "model.safetensors").is_file()


def test_what_is_not_reproduced_after_eviction_is_quarantined_and_says_why(store: Store) -> None:
    artifact = build(store)[0]
    evict(store.root / "artifacts" / "mask" / artifact.key)
    with pytest.raises(CorruptArtifact, match=r"after `opd gc` had evicted.*rebuilt with other rows.*run again"):
        build(store, salt=1)
    assert "not reproduced" in quarantined(store)[0]
    assert store.get("mask", SPEC.key) is None


def test_a_query_over_evicted_files_fails_only_where_it_needs_them(store: Store) -> None:
    artifact = build(store)[0]
    evict(store.root / "artifacts" / "mask" / artifact.key)
    dataset = store.arrow_dataset(artifact, "mask")
    with pytest.raises(FileNotFoundError, match="evicted"):
        dataset.to_table()
    with pytest.raises(FileNotFoundError):
        dataset.count_rows()


def test_unused_and_unfinished_artifacts_go_and_those_of_any_run_stay(store: Store) -> None:
    used, unused, resumable = masks(store, 3)
    shutil.rmtree(store.root / "artifacts" / "mask" / resumable.key)
    for spec in (ArtifactSpec.of("mask", 1, {"n": 2}, {}), ArtifactSpec.of("mask", 1, {"n": 9}, {})):
        with store.building(spec) as builder:
            builder.write_shard("mask", 0, rows(0))
    assert resumable.key == ArtifactSpec.of("mask", 1, {"n": 2}, {}).key
    run = run_of(store, "one", {1: [name(used)]})
    state = run.state
    state.rounds[0].stages["next"] = StageState(state="failed", artifacts=dict([name(resumable)]))
    with run.lock():
        run.save(state)
    before = contents(store.root / "artifacts")
    plan = Collector(store).plan()
    orphan = ArtifactSpec.of("mask", 1, {"n": 9}, {}).key
    assert sorted((i.kind, i.path.name) for i in plan.items) == [("unfinished", orphan), ("unused", unused.key)]
    assert plan.bytes() > 0 and contents(store.root / "artifacts") == before  # looking changes nothing
    assert sorted(collect(store)) == [("unfinished", orphan), ("unused", unused.key)]
    assert sorted(p.name for p in (store.root / "artifacts" / "mask").iterdir()) == sorted([used.key, resumable.key])
    shutil.rmtree(run.directory)
    assert sorted(collect(store)) == sorted([("unused", used.key), ("unfinished", resumable.key)])
    assert list((store.root / "artifacts" / "mask").iterdir()) == []


def test_a_run_that_cannot_be_read_stops_the_collection(store: Store) -> None:
    masks(store, 1)
    run = run_of(store, "one", {1: []})
    state = (run.directory / "state.json").read_bytes()
    for damage in (lambda: (run.directory / "state.json").write_text("{"), (run.directory / "state.json").unlink):
        damage()
        with pytest.raises(CorruptArtifact, match=r"runs/one"):
            Collector(store).plan()
        assert len(store.list()) == 1
        (run.directory / "state.json").write_bytes(state)
    flip(run.directory / "state.json", state.index(b"one") + 2)
    with pytest.raises(CorruptArtifact, match=r"state\.json: its checksum.*opd resume one"):
        Collector(store).plan()
    (run.directory / "state.json").write_bytes(state)
    (run.directory / "experiment.yaml").write_text("- no mapping")
    with pytest.raises(CorruptArtifact, match=r"experiment\.yaml"):
        Collector(store).plan()


def test_what_another_run_still_needs_is_not_evicted(store: Store) -> None:
    first, second = masks(store, 2)
    run_of(store, "strict", {1: [name(first), name(second)], 2: []})
    run_of(store, "keeper", {1: [name(first)]})
    retain = {"strict": keeping(signals=1), "keeper": Retention()}
    plan = Collector(store, lambda run: retain[run.name]).plan()
    assert [(item.kind, item.path.name) for item in plan.items] == [("evicted", second.key)]


def _hold(kind: str, root: str, artifact: tuple[str, str], ready: multiprocessing.synchronize.Event) -> None:
    store = Store(root)
    if kind == "run":
        with Run.open(root, "one").lock():
            ready.set()
            time.sleep(60)
    found = store.get(*artifact)
    assert found is not None
    if kind == "reader":
        with store.using([found]):
            ready.set()
            time.sleep(60)
    with store.building(ArtifactSpec(stage=found.stage, version=1, identity=found.identity, inputs=found.inputs)):
        ready.set()
        time.sleep(60)


@contextmanager
def held(kind: str, store: Store, artifact: Artifact) -> Iterator[multiprocessing.process.BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(kind, str(store.root), name(artifact), ready), daemon=True)
    process.start()
    try:
        assert ready.wait(30)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("kind", ["run", "reader", "builder"])
def test_what_is_in_use_stays_until_its_holder_is_gone(store: Store, kind: str) -> None:
    used, unused = masks(store, 2)
    run_of(store, "one", {1: [name(used)], 2: []})
    with held(kind, store, used) as process:
        collector = Collector(store, lambda run: keeping(signals=1))
        plan = collector.plan()
        if kind == "run":
            assert list(plan.busy) == ["one"] and str(process.pid) in plan.busy["one"]
            assert ("mask", used.key) not in {item.artifact for item in plan.items}
        removed = collector.apply(plan)
        assert [item.path.name for item in removed] == [unused.key]
        assert store.verify(used) == [] and store.evicted(used) is None
        assert store.read_table(used, "mask").num_rows == 120
    assert collect(store, keeping(signals=1)) == [("evicted", used.key)]


def test_what_came_into_use_after_the_plan_stays(store: Store) -> None:
    """A run that finds an artifact between plan and removal names it in its state: looked at again under the lock."""
    unused, old = masks(store, 2)
    run_of(store, "one", {1: [name(old)], 2: []})
    collector = Collector(store, lambda run: keeping(signals=1))
    plan = collector.plan()
    assert {item.kind for item in plan.items} == {"unused", "evicted"}
    run_of(store, "late", {1: [name(unused), name(old)]})
    collector._retention = lambda run: Retention() if run.name == "late" else keeping(signals=1)
    assert collector.apply(plan) == []
    assert store.verify(unused) == store.verify(old) == [] and store.evicted(old) is None


def test_two_collections_do_not_run_at_once(store: Store) -> None:
    build(store)
    collector = Collector(store)
    script = (
        "import sys, time\nfrom storage.disk.locks import locked\nfrom pathlib import Path\n"
        "with locked(Path(sys.argv[1]), print):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    lock = store.root / "locks" / "gc.lock"
    child = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, cwd=CHECKOUT)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        with pytest.raises(RunBusy, match=f"pid {child.pid}"):
            collector.apply(collector.plan())
    finally:
        child.kill()
        child.wait()
    assert len(collector.apply(collector.plan())) == 1


def test_left_overs_go_and_what_the_manifest_names_stays(store: Store) -> None:
    artifact = build(store)[0]
    student = build_student(store)
    run_of(store, "one", {1: [name(artifact), name(student)]})
    store.shard_writer("mask", SPEC.key).write_shard("mask", 1, rows(1))  # a retried batch, written twice
    (store.root / "artifacts" / "student" / student.key / ".tmp-model-1").mkdir()
    assert sorted(collect(store)) == sorted([("left over", artifact.key), ("left over", student.key)])
    assert store.verify(artifact) == store.verify(student) == []
    assert len(list((store.root / "artifacts" / "mask" / artifact.key).iterdir())) == 2 * 3 + 1
    assert collect(store) == []


def test_old_temporary_files_go_and_young_or_held_ones_stay(store: Store) -> None:
    old, young, held_one = (store.root / f".tmp-{what}" for what in ("old", "young", "held"))
    for folder in (old, young, held_one):
        folder.mkdir()
        (folder / "file").write_text("x")
    (store.root / "memo" / ".tmp-1").write_text("x")
    past = time.time() - 7200
    for folder in (old, held_one):
        os.utime(folder / "file", (past, past))
    os.utime(store.root / "memo" / ".tmp-1", (past, past))
    with locked(held_one / "held.lock", print):
        os.utime(held_one / "held.lock", (past, past))
        assert sorted(collect(store)) == [("temporary", ".tmp-1"), ("temporary", ".tmp-old")]
    assert young.exists() and held_one.exists() and not old.exists()


def test_quarantine_goes_by_age_with_its_reasons(store: Store) -> None:
    artifact = build(store)[0]
    run_of(store, "one", {1: [name(artifact)]})
    moved = quarantine(store.root, shard_path(store, artifact, 0), "a test")
    assert moved is not None
    assert collect(store) == []
    assert [kind for kind, _ in collect(store, quarantine_days=0)] == ["quarantine", "quarantine"]
    assert list((store.root / "quarantine").iterdir()) == []


@pytest.mark.parametrize("change", [0, 1, 5, 17])
def test_a_collection_killed_at_any_moment_leaves_a_valid_store(store: Store, change: int) -> None:
    assert killed_at(store, change) == -signal.SIGKILL


@pytest.mark.slow
def test_a_collection_killed_before_each_of_its_changes(tmp_path: Path) -> None:
    codes = []
    while 0 not in codes:
        codes.append(killed_at(Store(tmp_path / str(len(codes))), len(codes)))
    assert len(codes) > 20


def killed_at(store: Store, change: int) -> int:
    """Collects, killed before its n-th change of the file system: everything kept is whole, everything else evicted or
    gone, and the next collection and rebuild finish what was begun. Returns the exit code of the killed one."""
    kept, *others = masks(store, 3)
    old, unused = others
    student = build_student(store)
    run_of(store, "one", {1: [name(old), name(student)], 2: [name(kept)]})
    script = f"""
import os, signal, sys, itertools, shutil
from storage.disk import files
from storage.upkeep import gc
from storage.upkeep.gc import Collector
from storage.upkeep.retention import Retention
from storage.store import Store
count = itertools.count()
def counted(function):
    def call(*args, **kwargs):
        if ".use" not in str(args[0]) and ".lock" not in str(args[0]) and next(count) == {change}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
store = Store(sys.argv[1])
for name in ("unlink", "rename", "replace", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
collector = Collector(store, lambda run: Retention(signals=1, students=1))
plan = collector.plan()
collector.apply(plan)
"""
    ended = subprocess.run([sys.executable, "-c", script, str(store.root)], cwd=CHECKOUT, timeout=60)
    again = fresh(store)
    assert again.verify(kept) == [] and again.evicted(kept) is None
    for artifact in (old, student):
        manifest = load_manifest(again.root / "artifacts" / artifact.stage / artifact.key)
        assert manifest is not None and manifest.artifact == artifact
        assert again.verify(artifact) == []  # whole, or marked: never half there and unmarked
    listed = again.get(*name(unused))
    assert listed is None or again.verify(listed) == []
    for path in again.root.rglob(".tmp-*"):
        os.utime(path, (0, 0))
        for below in path.rglob("*"):
            os.utime(below, (0, 0))
    collect(again, keeping(signals=1, students=1))
    assert not list(again.root.rglob(".tmp-*"))
    assert again.get(*name(unused)) is None and again.evicted(old) is not None
    assert build(again, ArtifactSpec.of("mask", 1, {"n": 1}, {}), salt=1)[0] == old
    assert build_student(again) == student
    assert again.verify(old) == again.verify(student) == []
    assert isinstance(again.read_table(old, "mask"), pa.Table)
    return ended.returncode


GPU = {"device": "cuda", "sampler_max_num_seqs": 8, "sampler_in_process": False, "sampler_batch_invariant": False}


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({"numerics": GPU}, False),
        ({"numerics": GPU | {"sampler_in_process": True}}, True),
        ({"numerics": GPU | {"sampler_batch_invariant": True}}, True),
        ({"numerics": {"device": "cuda", "sampler_max_num_seqs": 8}}, False),  # a record of before these fields
        ({"numerics": {"device": "cpu", "sampler_max_num_seqs": 8}}, True),
        ({"numerics": {"device": "cuda", "scorer_batch_tokens": 8}}, True),  # nothing was sampled
        ({"numerics_by_shard": [{"shards": [0], "numerics": None}, {"shards": [1], "numerics": GPU}]}, False),
        ({}, True),
    ],
)
def test_rollouts_of_a_gpu_are_repeatable_with_either_setting(provenance: dict, expected: bool) -> None:
    assert repeatable(provenance) == expected


def test_a_plan_names_rollouts_that_could_not_be_restored(store: Store) -> None:
    spec = ArtifactSpec.of("rollout", 1, {"n": 1}, {})
    with store.building(spec) as builder:
        builder.write_shard("mask", 0, rows(0))
        artifact = builder.commit(tables={"mask": 1}, provenance={"numerics": GPU})
    run_of(store, "one", {1: [name(artifact)], 2: []})
    for keep, expected in ((0, {name(artifact)}), (5, set())):
        plan = Collector(store, lambda run, keep=keep: Retention(rollouts=keep)).plan()
        assert plan.unrepeatable == expected
    assert unrepeatable_note({name(artifact)}) is not None and unrepeatable_note({("mask", "a")}) is None
