"""A generation batch that dies loses only its unfinished shards (row 9): finished ones are kept, the others are asked for again
with the same seeds, a bounded number of times, and what comes out is what an undisturbed run makes."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from fault_trials import Trials, both_forms
from places import PLUGINS
from rollout_stage import Stage
from small_models import checkpoint

from storage.artifacts.artifact import Artifact
from storage.errors import OpdError
from tasks.evaluate import EvaluateConfig, evaluate_work
from tasks.rollout import RolloutConfig
from tasks.workers.pool import WorkerDied, WorkerFailed, WorkerPool
from tasks.workers.runtime import RuntimeConfig, SamplerRuntime

OF_ONE = ("abort", "empty", "infinite", "vanish")
"""Faults of one sample; the engine goes on."""
OF_ENGINE = ("raise_",)
OF_WORKER = ("kill", "hang")
KINDS = (*OF_ONE, *OF_ENGINE, *OF_WORKER)
RETRIES = 2
STALL = 3.0


def make_pool(logs: Path, *plugins: str, **sampler: float) -> WorkerPool:
    runtime = RuntimeConfig(
        device="cpu", threads=1, retries=1, stall_timeout=sampler.pop("stall", STALL),
        sampler=SamplerRuntime(retries=RETRIES, **sampler),
    )  # fmt: skip
    return WorkerPool(runtime, logs, plugins, str(PLUGINS))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory):
    with make_pool(tmp_path_factory.mktemp("logs"), "scripted_sampler", "scripted_worker") as pool:
        yield pool


@pytest.fixture(scope="module")
def undisturbed(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    stage = Stage(tmp_path_factory.mktemp("undisturbed"))
    artifact = stage.build(pool)
    assert sorted(stage.noted("asked")) == sorted(sample.seed for shard in stage.shards for sample in shard)
    return artifact


@both_forms(short=9, full=2 * 10 * len(KINDS))
def test_finished_shards_are_kept_and_the_rest_is_asked_again(
    pool: WorkerPool, undisturbed: Artifact, trials: Trials, tmp_path: Path, count: int
) -> None:
    """A trial is a kind of fault at one of the ten samples, once or for ever."""
    names = [f"{kind} {at} {times}" for times in ("once", "ever") for at in range(10) for kind in KINDS]
    short = [*(f"{kind} {3 + at} once" for at, kind in enumerate(KINDS)), "abort 4 ever", "kill 6 ever"]
    random.Random(0).shuffle(names)

    def attempt(name: str) -> None:
        kind, at, times = name.split()
        stage = Stage(tmp_path / name.replace(" ", "-"))
        one_trial(stage, pool, undisturbed, kind, int(at), 1 if times == "once" else 99)

    trials(9, "engine dies, aborts, returns nothing, hangs at item k", short if count == len(short) else names, attempt)


def one_trial(stage: Stage, pool: WorkerPool, expected: Artifact, kind: str, at: int, times: int) -> None:
    """The scripted engine holds all three shards and finishes their requests in order."""
    shard = next(number for number in range(3) if at < sum(map(len, stage.shards[: number + 1])))
    position = at - sum(map(len, stage.shards[:shard]))
    seeds = [[sample.seed for sample in samples] for samples in stage.shards]
    every = [seed for part in seeds for seed in part]
    (stage.store.root / "fault").write_text(json.dumps({"kind": kind, "seed": seeds[shard][position], "times": times}))
    lost = seeds[shard] if kind in OF_ONE else [seed for part in seeds[shard:] for seed in part]
    if times == 1:
        result = stage.build(pool)
        assert Counter(stage.noted("asked")) == Counter([*every, *lost])
        assert stage.said == []
    else:
        tries = 2 if kind in OF_WORKER else 1 + RETRIES
        with pytest.raises(OpdError) as error:
            stage.build(pool)
        text = str(error.value)
        if kind in OF_WORKER:
            assert isinstance(error.value, WorkerDied) and "sampler.log" in text and f"last of {tries} tries" in text
            names = ", ".join(map(str, range(shard, 3)))
            assert f"{names} ({len(lost)} samples) not finished" in text.splitlines()[0]
        else:
            failed = 1 if kind in OF_ONE else len(seeds[shard]) - position
            assert f"{failed} of {len(seeds[shard])} samples of shard {shard} failed at every try" in text
            assert f"{stage.shards[shard][position].sample_id} (seed {seeds[shard][position]})" in text.splitlines()[0]
        assert Counter(stage.noted("asked")) == Counter([*every, *(lost * (tries - 1))])
        (stage.store.root / "fault").unlink()
        result = stage.build(pool)  # as `opd resume` does: finished shards are not asked for again
        assert Counter(stage.noted("asked")) == Counter(lost)
        kept = len(every) - len(lost)
        assert stage.said == ([f"rollout: {kept} of {len(every)} samples are there already"] if kept else [])
    assert result.content == expected.content
    assert result.meta["metrics"] == expected.meta["metrics"]
    assert not list(stage.store.root.rglob("*.batch.json"))


@pytest.mark.promise(9, "an evaluation whose scorer fails or whose worker dies")
def test_an_evaluation_keeps_what_was_sampled_when_its_scorer_fails(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    config = EvaluateConfig(kl_generations=3, max_completion_length=4, shard_prompts=1)
    work = evaluate_work(config, stage.student, stage.student, stage.prompts, seed=5)
    for asked in (4, 0):  # one held-out prompt: a greedy completion and three for the KL; then none
        with stage.store.building(work.outputs["evaluate"]) as builder:
            with pytest.raises(WorkerFailed, match=r"KLJob[\s\S]*scorer\.log"):
                work.build({"evaluate": builder}, stage.context(pool))
            assert builder.missing("evaluations", 2) == [1]
        assert len(stage.noted("asked")) == asked
    assert stage.said[-1] == "evaluate: 3 completions of an earlier attempt are there already"


@pytest.mark.promise(9, "an evaluation whose scorer fails or whose worker dies")
def test_a_worker_that_dies_in_an_evaluation_is_named_with_what_is_missing(pool: WorkerPool, tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    config = EvaluateConfig(num_generations=2, kl_prompts=0, max_completion_length=4)
    work = evaluate_work(config, stage.student, stage.student, stage.prompts, seed=5)
    (stage.store.root / "die-before-shard").write_text("1")
    with stage.store.building(work.outputs["evaluate"]) as builder:
        with pytest.raises(WorkerDied, match=r"killed by signal 9.*shards 0, 1 \(3 samples\) not finished"):
            work.build({"evaluate": builder}, stage.context(pool))
        (stage.store.root / "die-before-shard").unlink()
        work.build({"evaluate": builder}, stage.context(pool))
        assert builder.committed is not None


# --- the real engine -------------------------------------------------------------------------------------------------

REAL = RolloutConfig(num_generations=4, prompts_per_round=6, shard_prompts=3, max_completion_length=24, top_p=0.9)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_vllm_loses_only_unfinished_shards(trials: Trials, tmp_path: Path) -> None:
    """Bit for bit: at this length (24 tokens) a completion's log-probabilities do not depend on what is decoded with it."""
    model = checkpoint(tmp_path / "model", seed=3, hidden_size=128, num_hidden_layers=2)
    with make_pool(tmp_path / "logs", "faulty_vllm", stall=60, kv_cache_gib=0.125) as pool:
        whole = Stage(tmp_path / "whole", model, REAL)
        expected = whole.build(pool)

        def attempt(name: str) -> None:
            kind, at = name.split()
            stage = Stage(tmp_path / name.replace(" ", "-"), model, REAL)
            (stage.store.root / "fault").write_text(json.dumps({"kind": kind, "shard": 1, "at": int(at)}))
            result = stage.build(pool)
            assert (stage.store.root / "fault-met").exists()
            assert result.content == expected.content
            shutil.rmtree(stage.store.root)

        names = [f"{kind} {at}" for at in (1, 6, 11) for kind in ("abort", "raise_", "kill")] + ["hang 6"]
        trials(9, "the same with vLLM (CPU)", names, attempt)
