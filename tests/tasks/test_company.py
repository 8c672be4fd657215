"""Shards whose log-probabilities depend on what was decoded with them: each comes out equal again, whatever happened before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import PLUGINS
from rollout_stage import Stage

from storage.artifacts.artifact import Artifact
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


def make_again(stage: Stage, pool: WorkerPool, artifact: Artifact) -> None:
    """Damages each shard in turn: the rebuild is refused unless its rows are equal."""
    for shard in range(3):
        damage(stage, artifact, shard)
        assert stage.build(pool).content == artifact.content


@pytest.mark.parametrize("kind", ["abort", "raise_"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_shard_that_was_sampled_twice(pool: WorkerPool, tmp_path: Path, kind: str, at: int) -> None:
    stage = Stage(tmp_path)
    seed = stage.shards[at][1].seed
    (stage.store.root / "fault").write_text(json.dumps({"kind": kind, "seed": seed, "times": 1}))
    make_again(stage, pool, stage.build(pool))


def test_a_worker_that_dies_before_it_reports_a_written_shard(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (stage.store.root / "die-before-report").write_text("1")
    artifact = stage.build(pool)
    asked = stage.done()
    assert stage.progress[-1][:2] == (10, 10)
    assert asked == [0, 1, 2, 2]
    make_again(stage, pool, artifact)


def test_a_shard_beside_the_damaged_one_may_fail(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    artifact = stage.build(pool)
    fault = {"kind": "abort", "seed": stage.shards[0][1].seed, "times": 99}
    (stage.store.root / "fault").write_text(json.dumps(fault))
    damage(stage, artifact, 1)
    assert stage.build(pool).content == artifact.content
