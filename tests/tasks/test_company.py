"""Shards whose log-probabilities depend on what was decoded with them: a damaged one is sampled again in its recorded batch and
comes out equal, whatever happened to that batch (rows 9 and 13)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import PLUGINS
from registries import plugin_path
from rollout_stage import CONFIG, Stage

from storage.artifacts.artifact import Artifact, load_manifest
from storage.errors import OpdError
from tasks.plugins import load_plugins
from tasks.rollout import RolloutConfig
from tasks.workers.metrics import silent
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig, SamplerRuntime


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory):
    runtime = RuntimeConfig(device="cpu", threads=1, sampler=SamplerRuntime(retries=1))
    with WorkerPool(runtime, tmp_path_factory.mktemp("logs"), ("scripted_company",), str(PLUGINS)) as pool:
        yield pool


def damage(stage: Stage, artifact: Artifact, shard: int) -> None:
    path = (
        stage.store.root / "artifacts/rollout" / stage.spec.key / stage.store.shards(artifact, "rollouts")[shard].file
    )
    path.write_bytes(path.read_bytes()[:-9])


def with_batches(stage: Stage, artifact: Artifact, entries: list[dict[str, object]]) -> Artifact:
    """The artifact, its manifest rewritten as one of these batches."""
    path = stage.store.root / "artifacts/rollout" / stage.spec.key / "manifest.json"
    manifest = load_manifest(path.parent)
    assert manifest is not None
    changed = artifact.model_copy(update={"provenance": artifact.provenance | {"batches": entries}})
    path.write_bytes(manifest.model_copy(update={"artifact": changed}).dump())
    return changed


def make_again(stage: Stage, pool: WorkerPool, artifact: Artifact) -> None:
    """Damages each shard in turn and builds again. A rebuilt shard with other rows would be refused."""
    for shard in range(3):
        damage(stage, artifact, shard)
        assert stage.build(pool).content == artifact.content


@pytest.mark.promise(13, "a disturbed batch: each damaged shard is sampled again as it was")
@pytest.mark.parametrize("kind", ["abort", "raise_"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_shard_that_was_sampled_twice(pool: WorkerPool, tmp_path: Path, kind: str, at: int) -> None:
    stage = Stage(tmp_path)
    seed = stage.shards[at][1].seed
    (stage.store.root / "fault").write_text(json.dumps({"kind": kind, "seed": seed, "times": 1}))
    make_again(stage, pool, stage.build(pool))


@pytest.mark.promise(9, "a worker dies between a written shard and its report")
def test_a_worker_that_dies_before_it_reports_a_written_shard(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (stage.store.root / "die-before-report").write_text("1")
    artifact = stage.build(pool)
    asked = stage.done()
    assert stage.progress[-1][:2] == (10, 10)
    assert asked == [0, 1, 2, 2]
    make_again(stage, pool, artifact)


@pytest.mark.promise(13, "a disturbed batch: each damaged shard is sampled again as it was")
def test_a_shard_beside_the_damaged_one_may_fail(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    artifact = stage.build(pool)
    fault = {"kind": "abort", "seed": stage.shards[0][1].seed, "times": 99}
    (stage.store.root / "fault").write_text(json.dumps(fault))
    damage(stage, artifact, 1)
    assert stage.build(pool).content == artifact.content


@pytest.mark.parametrize("kind", ["abort", "raise_"])
@pytest.mark.parametrize("beside", [0, 2])
@pytest.mark.parametrize("slots", [2, 256])
def test_a_repeated_batch_is_tried_again(tmp_path: Path, kind: str, beside: int, slots: int) -> None:
    """Shard 2 is lost. The sample that fails is its own, or one of a shard that is sampled beside it; with few slots its own
    requests are added while others are under way, and an engine that fails has not got them yet."""
    stage = Stage(tmp_path)
    runtime = RuntimeConfig(device="cpu", threads=1, sampler=SamplerRuntime(retries=1, max_num_seqs=slots))
    with WorkerPool(runtime, tmp_path / "logs", ("scripted_company",), str(PLUGINS)) as pool:
        artifact = stage.build(pool)
        damage(stage, artifact, 2)
        fault = {"kind": kind, "seed": stage.shards[beside][1].seed, "times": 1}
        (stage.store.root / "fault").write_text(json.dumps(fault))
        assert stage.build(pool).content == artifact.content
        assert (stage.store.root / "fault-met").exists()
        damage(stage, artifact, 2)
        (stage.store.root / "fault-met").unlink()
        (stage.store.root / "fault").write_text(json.dumps(fault | {"times": 2}))
        if beside == 2 or kind == "raise_":
            with pytest.raises(OpdError, match=f"samples of shard ({beside}|2) failed at every try"):
                stage.build(pool)
        (stage.store.root / "fault").unlink()
        assert stage.build(pool).content == artifact.content


def test_different_batches_are_repeated_by_different_workers(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    runtime = RuntimeConfig(device="cpu", threads=1, sampler=SamplerRuntime(workers=2, retries=1))
    artifact = stage.build(pool)
    queue = artifact.provenance["batches"][0]["queue"]
    artifact = with_batches(stage, artifact, [{"queue": queue, "shards": [2]}, {"queue": queue, "shards": [0, 1]}])
    for shard in range(3):
        damage(stage, artifact, shard)
    stage.done()
    with WorkerPool(runtime, tmp_path / "again", ("scripted_company",), str(PLUGINS)) as two:
        assert stage.build(two).content == artifact.content
    assert sorted(stage.done()) == [0, 0, 1, 1, 2, 2]
    assert len(list((tmp_path / "again").glob("sampler*.log"))) == 2


def test_a_worker_that_dies_when_all_of_its_batch_is_written_needs_no_retry(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    runtime = RuntimeConfig(device="cpu", threads=1, retries=0)
    with WorkerPool(runtime, tmp_path / "logs", ("scripted_company",), str(PLUGINS)) as pool:
        (stage.store.root / "die-before-report").write_text("2")
        artifact = stage.build(pool)
        assert stage.progress[-1][:2] == (10, 10)
        damage(stage, artifact, 1)
        (stage.store.root / "die-before-report").write_text("1")
        assert stage.build(pool).content == artifact.content
        assert not (stage.store.root / "die-before-report").exists()
    make_whole = artifact.meta["stop_token_ids"]
    assert make_whole is None or make_whole == [7]


def test_repeated_batches_count_only_what_they_write(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    artifact = stage.build(pool)
    damage(stage, artifact, 0)
    damage(stage, artifact, 2)
    queue = [[0, 0], [1, 0], [2, 0]]
    entries = [
        {"queue": queue, "shards": [2]},
        {"queue": queue, "shards": [0, 1]},
    ]  # as of two batches that shared shards
    with_batches(stage, artifact, entries)
    stage.build(pool)
    counted = [done for done, _, _ in stage.progress]
    assert counted == sorted(counted) and {4, 6, 7, 10} <= set(counted)


def test_a_sampler_that_got_no_shard_does_not_say_what_ended_completions(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    runtime = RuntimeConfig(device="cpu", threads=1, sampler=SamplerRuntime(workers=2))
    with WorkerPool(runtime, tmp_path / "logs", ("scripted_company",), str(PLUGINS)) as two:
        share = two.share

        def beside_an_idle_one(role, job, *rest, **more):
            results, answers = share(role, job, *rest, **more)
            return results, [two._do(role, 1, job, silent, None), *answers]

        two.share = beside_an_idle_one  # type: ignore[method-assign]
        assert stage.build(two).meta["stop_token_ids"] == [7]


@pytest.mark.promise(13, "a disturbed batch: each damaged shard is sampled again as it was")
def test_an_engine_with_room_for_all_shards_leaves_other_workers_their_share(tmp_path: Path) -> None:
    """Ten samples and two workers: each takes shards until it has five samples, and again when it has fewer."""
    stage = Stage(tmp_path)
    runtime = RuntimeConfig(device="cpu", threads=1, sampler=SamplerRuntime(workers=2))
    with WorkerPool(runtime, tmp_path / "logs", ("scripted_company",), str(PLUGINS)) as two:
        artifact = stage.build(two)
        make_again(stage, two, artifact)
    for batch in artifact.provenance["batches"]:
        at_once = [shard for shard, step in batch["queue"] if step == 0]
        assert len(at_once) <= 2


@pytest.fixture
def behaviours():
    with plugin_path():
        load_plugins(["faulty_behaviour"])
        yield WorkerPool(
            RuntimeConfig(device="cpu", threads=1), Path(), ("scripted_sampler", "faulty_behaviour"), str(PLUGINS)
        )


def test_a_behaviours_own_fault_names_it_and_is_not_tried_again(behaviours: WorkerPool, tmp_path: Path) -> None:
    import faulty_behaviour

    raised = {"raise": "ZeroDivisionError: a bug", "raise_late": "IndexError"}
    behaviours.logs = tmp_path / "logs"
    with behaviours:
        for way in faulty_behaviour.WAYS:
            how = {"kind": "faulty", "way": way}
            stage = Stage(tmp_path / way, config=RolloutConfig.model_validate(CONFIG.model_dump() | {"behaviour": how}))
            with pytest.raises(OpdError) as error:
                stage.build(behaviours)
            assert type(error.value) is OpdError and "engine" not in str(error.value).partition("failed")[0]
            place = f"'faulty' ({faulty_behaviour.__file__}{', line ' if way in raised else ')'}"
            assert str(error.value).startswith(f"rollout.behaviour: {place}")
            assert raised.get(way, "") in str(error.value)
            begun = stage.done()
            assert len(begun) == len(set(begun))


def test_a_behaviour_may_ask_for_nothing(behaviours: WorkerPool, tmp_path: Path) -> None:
    behaviours.logs = tmp_path / "logs"
    stage = Stage(tmp_path, config=RolloutConfig.model_validate(CONFIG.model_dump() | {"behaviour": "silent"}))
    with behaviours:
        artifact = stage.build(behaviours)
    table = stage.store.read_table(artifact, "rollouts")
    assert table["completion_token_ids"].to_pylist() == [[5, 7]] * 10 and stage.noted("asked") == []
