"""The planning half of rollouts: which prompts, which seeds, which key; shards are resumed, not repeated."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import PLUGINS
from pydantic import ValidationError
from registries import plugin_path
from rollout_stage import CONFIG, Stage

from storage.artifacts.artifact import Artifact, load_manifest
from storage.errors import ConfigError, InputError, OpdError
from tasks.behaviours import behaviour_of
from tasks.plugins import load_plugins
from tasks.rollout import RolloutConfig, plan_samples, prompts_for_round, rollout_work
from tasks.workers.pool import WorkerDied, WorkerPool
from tasks.workers.runtime import RuntimeConfig, SamplerRuntime


@given(st.sets(st.text(min_size=1, max_size=5), min_size=1, max_size=12), st.integers(0, 99), st.integers(1, 7))
def test_every_epoch_takes_every_prompt_once(ids, seed, per_round):
    rounds = [prompts_for_round(sorted(ids), seed, r, per_round) for r in range(1, 2 * len(ids) + 1)]
    assert all(len(chosen) == per_round for chosen in rounds)
    taken = [prompt for chosen in rounds for prompt in chosen]
    whole = len(taken) // len(ids)
    for epoch in range(whole):
        assert Counter(taken[epoch * len(ids) : (epoch + 1) * len(ids)]) == Counter(ids)
    assert rounds[0] == prompts_for_round(sorted(ids, reverse=True), seed, 1, per_round)


def test_the_order_is_the_seeds_and_the_epochs():
    ids = [f"p{i}" for i in range(40)]
    first, second = (prompts_for_round(ids, 1, r, 40) for r in (1, 2))
    assert first != second and first != prompts_for_round(ids, 2, 1, 40) and first != ids
    assert first == [*prompts_for_round(ids, 1, 1, 20), *prompts_for_round(ids, 1, 2, 20)]
    with pytest.raises(InputError, match="no prompt"):
        prompts_for_round([], 1, 1, 4)


def test_samples_are_unique_even_where_a_round_holds_a_prompt_twice():
    shards = plan_samples(["a", "b", "a"], CONFIG, seed=3, round=2)
    samples = [sample for shard in shards for sample in shard]
    assert [s.sample_id for s in samples] == ["a/2/0", "a/2/1", "b/2/0", "b/2/1", "a/2/2", "a/2/3"]
    assert len({s.seed for s in samples}) == 6 and [len(shard) for shard in shards] == [4, 2]
    other = plan_samples(["b"], CONFIG, seed=3, round=2)[0]
    assert [s.seed for s in other] == [s.seed for s in samples[2:4]]  # whatever the company
    assert {s.seed for s in plan_samples(["b"], CONFIG, 3, 3)[0]}.isdisjoint(s.seed for s in other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0), ("top_p", 1.01), ("temperature", 0), ("temperature", 3), ("top_k", -1), ("num_generations", 0),
        ("max_completion_length", 0), ("stop_token_ids", []), ("stop_token_ids", [-1]), ("stop_token_ids", "EOS"),
        ("dtype", "int8"), ("prompts_per_round", 0), ("shard_prompts", 0), ("top_n", 3),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        RolloutConfig.model_validate({field: value})


def artifact(stage: str, **content: str) -> Artifact:
    return Artifact(
        stage=stage, key="0" * 16, content=content, rows={}, identity={}, inputs={}, created="2026-01-01", seconds=0
    )


def test_the_key_follows_what_changes_the_completions():
    student = artifact("student", weights="w", architecture="a", tokenizer="t", model="m")
    prompts = artifact("prepare", **{"prompts:train": "p", "prompts:eval": "e"})

    def key(config=CONFIG, student=student, prompts=prompts, seed=1, round=1) -> str:
        return rollout_work(config, student, prompts, seed, round).outputs["rollout"].key

    assert key() == key(
        student=artifact("model", weights="w", architecture="a", tokenizer="t", model="other file split"),
        prompts=artifact("prepare", **{"prompts:train": "p", "prompts:eval": "other"}),
    )
    others = [key(CONFIG.model_copy(update={"top_p": 0.8})), key(seed=2), key(round=2)]
    others += [key(student=artifact("student", weights="x", architecture="a", tokenizer="t"))]
    others += [key(student=artifact("student", weights="w", architecture="b", tokenizer="t"))]
    others += [key(prompts=artifact("prepare", **{"prompts:train": "q"}))]
    assert len({key(), *others}) == 7
    equal = RolloutConfig(**CONFIG.model_dump() | {"stop_token_ids": [5, 3, 5]})
    assert key(equal) == key(RolloutConfig(**CONFIG.model_dump() | {"stop_token_ids": [3, 5]}))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """One sequence at a time, so that the engine gets a shard when the one before is finished."""
    runtime = RuntimeConfig(device="cpu", threads=1, retries=0, sampler=SamplerRuntime(max_num_seqs=1))
    logs = tmp_path_factory.mktemp("logs")
    with WorkerPool(runtime, logs, ("scripted_sampler",), str(PLUGINS)) as pool:
        yield pool


def test_an_interrupted_round_goes_on_where_it_broke(tmp_path, pool):
    whole = Stage(tmp_path / "whole")
    expected = whole.build(pool)
    assert sorted(whole.done()) == [0, 1, 2]

    broken = Stage(tmp_path / "broken")
    (broken.store.root / "die-before-shard").write_text("2")
    with pytest.raises(WorkerDied):
        broken.build(pool)
    assert broken.store.get("rollout", broken.spec.key) is None and broken.done() == [0, 1]
    (broken.store.root / "die-before-shard").unlink()
    result = broken.build(pool)
    assert broken.done() == [2]
    assert result.content == expected.content and result.meta["metrics"] == expected.meta["metrics"]
    assert broken.progress[0] == (8, 10, "samples") and broken.progress[-1] == (10, 10, "samples")

    rows = broken.store.read_table(result, "rollouts").to_pylist()
    chosen = prompts_for_round([f"p{i}" for i in range(7)], 5, 2, 5)
    planned = [sample for shard in plan_samples(chosen, CONFIG, 5, 2) for sample in shard]
    assert [row["sample_id"] for row in rows] == [sample.sample_id for sample in planned]
    assert [row["seed"] for row in rows] == [sample.seed for sample in planned]
    assert all(row["prompt_token_ids"] == [int(row["prompt_id"][1:]), int(row["prompt_id"][1:]) + 1] for row in rows)
    lengths = [len(row["completion_token_ids"]) for row in rows]
    assert [len(row["sampling_logprobs"]) for row in rows] == lengths
    clipped = sum(row["finish_reason"] == "length" for row in rows)
    assert 0 < clipped < 10
    tokens = sum(lengths)
    prompts = {row["prompt_id"]: 0.0 for row in rows}
    for row, length in zip(rows, lengths, strict=True):
        prompts[row["prompt_id"]] += (length - tokens / 10) / 10
    error = math.sqrt(len(prompts) / (len(prompts) - 1) * sum(by * by for by in prompts.values()))
    metrics = result.meta["metrics"]
    assert (metrics["mean_length"], metrics["clipped_ratio"], metrics["tokens"]) == (tokens / 10, clipped / 10, tokens)
    assert metrics["mean_length_se"] == pytest.approx(error, rel=1e-12) and error > 0
    assert (metrics["mean_length_n"], metrics["mean_length_prompts"]) == (10, len(prompts)) == (10, 4)
    assert result.meta["stop_token_ids"] == [7]
    assert result.meta["weight_proofs"] == [{"weights": broken.student.content["weights"]}]


def damage(stage: Stage, artifact: Artifact, shard: int) -> None:
    folder = stage.store.root / "artifacts" / "rollout" / stage.spec.key
    path = folder / stage.store.shards(artifact, "rollouts")[shard].file
    path.write_bytes(path.read_bytes()[:-9])


def test_a_damaged_shard_is_sampled_again_in_its_batch_and_alone_written(tmp_path, pool):
    """Its batch had all three shards; the engine stops as soon as the damaged one is complete."""
    stage = Stage(tmp_path)
    before = stage.build(pool)
    assert before.provenance["batches"] == [{"queue": [[0, 0], [1, 4], [2, 8]], "shards": [0, 1, 2]}]
    stage.done()
    files = {record.file for record in stage.store.shards(before, "rollouts")}
    damage(stage, before, 1)
    after = stage.build(pool)
    assert stage.done() == [0, 1]
    assert after.content == before.content and after.meta == before.meta and after.provenance == before.provenance
    assert len({record.file for record in stage.store.shards(after, "rollouts")} & files) == 2


def test_a_shard_of_an_earlier_version_is_sampled_again_alone(tmp_path, pool):
    """Artifacts made before batches were recorded had one shard per batch."""
    stage = Stage(tmp_path)
    before = stage.build(pool)
    path = stage.store.root / "artifacts" / "rollout" / stage.spec.key / "manifest.json"
    manifest = load_manifest(path.parent)
    old = {name: value for name, value in before.provenance.items() if name != "batches"}
    artifact = manifest.artifact.model_copy(update={"provenance": old})
    path.write_bytes(manifest.model_copy(update={"artifact": artifact}).dump())
    stage.done()
    damage(stage, before, 1)
    assert stage.build(pool).content == before.content
    assert stage.done() == [1]


def test_shards_of_two_attempts_are_two_batches(tmp_path, pool):
    stage = Stage(tmp_path)
    (stage.store.root / "die-before-shard").write_text("1")
    with pytest.raises(WorkerDied):
        stage.build(pool)
    (stage.store.root / "die-before-shard").unlink()
    artifact = stage.build(pool)
    first, second = artifact.provenance["batches"]
    assert (first, second) == (
        {"queue": [[0, 0]], "shards": [0]},
        {"queue": [[1, 0], [2, 4]], "shards": [1, 2]},
    )


def test_several_samplers_share_the_shards(tmp_path, pool):
    stage = Stage(tmp_path)
    runtime = RuntimeConfig(device="cpu", threads=1, sampler=SamplerRuntime(workers=2, max_num_seqs=1))
    with WorkerPool(runtime, tmp_path / "logs", ("scripted_sampler",), str(PLUGINS)) as two:
        shared = stage.build(two)
    assert sorted(stage.done()) == [0, 1, 2]
    assert shared.content == Stage(tmp_path / "one").build(pool).content
    assert sorted(shard for batch in shared.provenance["batches"] for shard in batch["shards"]) == [0, 1, 2]


def test_shards_made_with_other_settings_are_kept_and_the_manifest_says_which(tmp_path, pool):
    """As after an engine ran out of memory: the next start has a smaller `max_num_seqs`."""
    stage = Stage(tmp_path)
    (stage.store.root / "die-before-shard").write_text("2")
    with pytest.raises(WorkerDied):
        stage.build(pool)
    (stage.store.root / "die-before-shard").unlink()
    stage.done()
    smaller = RuntimeConfig(device="cpu", threads=1, retries=0, sampler=SamplerRuntime(max_num_seqs=8))
    with WorkerPool(smaller, tmp_path / "logs", ("scripted_sampler",), str(PLUGINS)) as other:
        artifact = stage.build(other)
    assert stage.done() == [2]
    assert any("2 of 3 shards were made with other settings (sampler_max_num_seqs 1, 8)" in line for line in stage.said)
    assert "numerics" not in artifact.provenance
    first, second = artifact.provenance["numerics_by_shard"]
    assert (first["shards"], second["shards"]) == ([0, 1], [2])
    assert (first["numerics"], second["numerics"]) == (pool.runtime.numerics("sampler"), smaller.numerics("sampler"))
    assert not list((stage.store.root / "artifacts" / "rollout" / stage.spec.key).glob("*made-at*"))


def tabled(root, wrong: str = "") -> Stage:
    return Stage(root, config=CONFIG.model_copy(update={"behaviour": behaviour_of({"kind": "tabled", "wrong": wrong})}))


@pytest.fixture(scope="module")
def tabled_pool(tmp_path_factory):
    runtime = RuntimeConfig(device="cpu", threads=1, retries=0, sampler=SamplerRuntime(max_num_seqs=1))
    with plugin_path():
        load_plugins(["tabled"])
        logs = tmp_path_factory.mktemp("tabled")
        with WorkerPool(runtime, logs, ("scripted_sampler", "tabled"), str(PLUGINS)) as pool:
            yield pool


def test_a_behaviours_table_is_made_and_mended_with_the_rollouts(tmp_path, tabled_pool):
    whole = tabled(tmp_path / "whole")
    made = whole.build_all(tabled_pool)
    assert list(made) == ["rollout", "surprise"] and made["surprise"].rows == {"surprise": 10}
    assert load_manifest(whole.store.root / "artifacts" / "surprise" / made["surprise"].key).retention == "rollouts"
    assert made["surprise"].provenance["batches"] == made["rollout"].provenance["batches"]
    rows = whole.store.read_table(made["rollout"], "rollouts").to_pylist()
    cells = whole.store.read_table(made["surprise"], "surprise").to_pylist()
    assert [c["sample_id"] for c in cells] == [r["sample_id"] for r in rows]
    assert [c["nats"] for c in cells] == [[-p for p in r["sampling_logprobs"]] for r in rows]
    assert made["surprise"].meta["metrics"] == {"surprise_max": max(max(c["nats"]) for c in cells)}

    broken = tabled(tmp_path / "broken")
    (broken.store.root / "die-before-shard").write_text("2")
    with pytest.raises(WorkerDied):
        broken.build_all(tabled_pool)
    broken.done()
    (broken.store.root / "die-before-shard").unlink()
    # a shard of the table alone is lost before anything is committed
    folder = broken.store.root / "artifacts" / "surprise" / broken.work.outputs["surprise"].key
    next(folder.glob("surprise-00001-*.parquet")).unlink()
    resumed = broken.build_all(tabled_pool)
    assert {name: artifact.content for name, artifact in resumed.items()} == {n: a.content for n, a in made.items()}
    assert sorted(set(broken.done())) == [0, 1, 2]  # shard 1 in the batch that it was in

    # both are damaged in different shards: each gets back what it lost
    broken.store.shard_files(resumed["rollout"], "rollouts")[0].write_bytes(b"x")
    broken.store.shard_files(resumed["surprise"], "surprise")[2].write_bytes(b"x")
    mended = broken.build_all(tabled_pool)
    assert {name: artifact.content for name, artifact in mended.items()} == {n: a.content for n, a in made.items()}

    # the whole table is gone: it is made again from the batches that the rollouts recorded
    shutil.rmtree(folder)
    again = broken.build_all(tabled_pool)
    assert again["surprise"].content == made["surprise"].content
    assert again["surprise"].provenance["batches"] == again["rollout"].provenance["batches"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing", "has nats; its table has nats, draws"),
        ("short", r"values\['nats'\] must be \d finite numbers"),
        ("nan", r"values\['nats'\] must be \d finite numbers"),
    ],
)
def test_cells_that_do_not_fit_the_table_are_refused(tmp_path, tabled_pool, wrong, message):
    with pytest.raises(OpdError, match=f"'tabled'.*tabled.py.*{message}"):
        tabled(tmp_path, wrong).build_all(tabled_pool)


def test_what_a_behaviour_reads_enters_the_key_and_nothing_else_does():
    student, other = (artifact("model", weights=w, architecture="a", tokenizer="t") for w in "st")
    prompts = artifact("prepare", **{"prompts:train": "p"})
    blended = RolloutConfig(behaviour={"kind": "trb", "epsilon": 0.01})

    def work(config, teacher):
        return rollout_work(config, student, prompts, 1, 1, teacher=teacher)

    with pytest.raises(ConfigError, match=r"rollout\.behaviour: 'trb' reads the teacher"):
        work(blended, None)
    keys = [{name: spec.key for name, spec in work(blended, teacher).outputs.items()} for teacher in (student, other)]
    assert all(keys[0][name] != keys[1][name] for name in ("rollout", "blending"))
    plain = RolloutConfig()
    assert work(plain, other).outputs == work(plain, None).outputs and list(work(plain, other).outputs) == ["rollout"]


def test_masked_ids_enter_the_key_of_what_reads_the_teacher():
    model = artifact("model", weights="s", architecture="a", tokenizer="t")
    draft = artifact("draft", drafts="d")
    plain = artifact("prepare", **{"prompts:train": "p", "audit": "equal"})
    masking = plain.model_copy(
        update={"content": plain.content | {"audit": "masks"}, "meta": {"audit": {"masked_ids": [7]}}}
    )
    clean = plain.model_copy(update={"content": masking.content, "meta": {"audit": {"masked_ids": []}}})

    def keys(behaviour, prompts):
        work = rollout_work(RolloutConfig(behaviour=behaviour), model, prompts, 1, 1, teacher=model, drafts=draft)
        return {name: spec.key for name, spec in work.outputs.items()}

    blended = {"kind": "trb", "epsilon": 0.01}
    for behaviour in (blended, {"kind": "teacher_prefix", "cap": 3}):
        assert not set(keys(behaviour, plain).values()) & set(keys(behaviour, masking).values())
        assert keys(behaviour, plain) == keys(behaviour, clean)
    step = RolloutConfig(behaviour=blended | {"anneal_steps": 5}).at(5).behaviour  # epsilon is 0
    for behaviour in ("student", step):
        assert keys(behaviour, plain) == keys(behaviour, masking) == keys("student", clean)
