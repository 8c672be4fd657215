"""Student and teacher beside the sampler: what they give in parts is what they give whole, and real rollouts by both samplers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from registries import plugin_path
from rollout_stage import Stage
from small_models import checkpoint

from storage.artifacts.artifact import Artifact
from storage.artifacts.digests import weights_digest
from storage.errors import InputError
from storage.query.catalog import Catalog
from tasks.behaviours import Score
from tasks.behaviours.trust_region import TrustRegionBlending
from tasks.engines.hf_folder import load_causal_lm
from tasks.engines.pair import CachedModel, Pair, Reading, ScoreQueue
from tasks.engines.sampler import OpenShard
from tasks.losses.blending import blend
from tasks.rollout_config import RolloutConfig
from tasks.workers.jobs import ModelRef, Request, SampleShard, Sampling
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig, SamplerRuntime

FAR = {"initializer_range": 0.6}
EPSILON = 0.05


@pytest.fixture(scope="module", autouse=True)
def _own_workers():
    """Whatever plugin an earlier test of this process has put in their place."""
    with plugin_path():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: checkpoint(root / name, seed, **FAR) for seed, name in enumerate(("student", "teacher"))}


def pair_of(models: dict[str, Path], **settings) -> Pair:
    pair = Pair({"device": "cpu", **settings})
    refs = [ModelRef(str(models[name]), weights_digest(models[name]), "") for name in ("student", "teacher")]
    pair.load(*refs, "float32")
    return pair


def whole(path: Path, prompt: list[int], tokens: tuple[int, ...], after: int) -> torch.Tensor:
    with torch.inference_mode():
        logits = load_causal_lm(path, torch.float32).eval()(torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[len(prompt) - 1 + after :].log_softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"score_cache_gib": 1e-6}, {"score_batch_tokens": 8, "score_chunk_tokens": 4}],
    ids=["together", "hardly any cache", "one by one"],
)
def test_parts_give_what_the_whole_gives(models, settings):
    """Three completions of unequal length go on by blocks, of which a random part is rejected."""
    pair = pair_of(models, **settings)
    assert all(model.keeps for _, model in pair._models.values())
    draw = random.Random(1)
    prompts = {(0, at): [draw.randrange(250) for _ in range(3 + 4 * at)] for at in range(3)}
    teacher_prompts = {place: prompt[1:] for place, prompt in prompts.items()}
    texts: dict = {place: [] for place in prompts}
    for _ in range(4):
        asked = {
            place: Reading(
                prompts[place],
                teacher_prompts[place],
                Score((*texts[place], *(draw.randrange(250) for _ in range(draw.randrange(5)))), len(texts[place])),
            )
            for place in prompts
        }
        found = dict(pair.answers(asked, lambda student, teacher: {"student": student, "teacher": teacher}))
        assert list(found) == list(asked)
        for place, reading in asked.items():
            for who, read in (("student", prompts), ("teacher", teacher_prompts)):
                expected = whole(models[who], read[place], reading.score.tokens, reading.score.after)
                torch.testing.assert_close(found[place].values[who], expected, atol=2e-5, rtol=1e-4)
            kept = draw.randrange(len(reading.score.tokens) - reading.score.after + 1)
            texts[place] = [*reading.score.tokens[: reading.score.after + kept], draw.randrange(250)]


def test_a_model_whose_cache_cannot_be_cut_reads_everything_again(models, monkeypatch):
    """A model that sees keys by their place in the cache, as sliding windows do."""
    plain = CachedModel._cache

    def shifted(self, parts, common, past):
        return plain(self, parts, [max(0, keep - 1) for keep in common], past)

    monkeypatch.setattr(CachedModel, "_cache", shifted)
    model = CachedModel(models["student"], "float32", torch.device("cpu"), 2**20)
    assert not model.keeps
    pair = pair_of(models)
    reading = Reading([1, 2, 3], [1, 2, 3], Score((4, 5), 1))
    ((_, scored),) = pair.answers({(0, 0): reading}, lambda student, teacher: {"student": student})
    torch.testing.assert_close(
        scored.values["student"], whole(models["student"], [1, 2, 3], (4, 5), 1), atol=2e-5, rtol=1e-4
    )


def test_weights_that_are_not_the_jobs_are_refused(models):
    wrong = ModelRef(str(models["teacher"]), "0" * 64, "")
    right = ModelRef(str(models["student"]), weights_digest(models["student"]), "")
    with pytest.raises(InputError, match="the weights' digest is"):
        Pair({"device": "cpu"}).load(right, wrong, "float32")


def test_stop_ids_past_the_student_s_rows_and_merged_ones_are_one_category(models, tmp_path):
    """The student has 264 rows, of which it ends with 257; the teacher ends with 258 and 270."""
    other = checkpoint(tmp_path / "teacher", 1, **FAR, vocab_size=280)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 270]}))
    tokenizer = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|system|>"}))
    pair, tokens, epsilon = pair_of({**models, "teacher": other}), (4, 5), 0.3
    prompts = {"a": [1, 2, 3]}
    for stops, unmapped in (([257, 258], []), ([257], []), ([257, 258], [65, 270])):
        queue = ScoreQueue(pair, TrustRegionBlending(epsilon=epsilon), prompts, prompts, unmapped)
        assert queue.teacher_stop_ids == [258]
        sampling = Sampling(1.0, 1.0, 0, 8, stops)
        shard = OpenShard(SampleShard(0, sampling, [Request("a/1/0", "a", 0, 7)]), stops)
        queue.begin()
        queue.add(shard, 0, Score(tokens, 0))
        ((_, _, scored),) = queue.answers()
        both = []
        for path, ends in ((models["student"], [257, 258]), (other, [257, 258, 270])):
            p = whole(path, prompts["a"], tokens, 0).double().exp()
            p[:, 257] = p[:, ends].sum(-1)
            p[:, ends[1:]] = 0
            p[:, [token for token in unmapped if path == other and token not in ends]] = 0
            both.append((p[:, :264] / p[:, :264].sum(-1, keepdim=True)).log())
        torch.testing.assert_close(scored.values["student"].double(), both[0], atol=2e-5, rtol=1e-4)
        expected = blend(*both, epsilon)
        assert bool((expected.beta_N > 0).any())
        torch.testing.assert_close(scored.values["mu"].double().exp(), expected.logprobs_NV.exp(), atol=1e-4, rtol=0)


def test_a_word_of_the_teachers_that_ends_the_student_s_completions_is_no_end_of_the_teacher(models, tmp_path):
    """The teacher ends with 270, which the student lacks; 257, with which the student ends, is another token to it."""
    other = checkpoint(tmp_path / "teacher", 1, **FAR, vocab_size=280)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [270]}))
    tokenizer = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": None}))
    pair, tokens = pair_of({**models, "teacher": other}), (4, 5)
    prompts = {"a": [1, 2, 3]}
    queue = ScoreQueue(pair, TrustRegionBlending(epsilon=1e9), prompts, prompts, [257])
    shard = OpenShard(SampleShard(0, Sampling(1.0, 1.0, 0, 8, [257]), [Request("a/1/0", "a", 0, 7)]), [257])
    queue.begin()
    queue.add(shard, 0, Score(tokens, 0))
    ((_, _, scored),) = queue.answers()
    p = whole(other, prompts["a"], tokens, 0).double().exp()
    p[:, 257] = p[:, 270]
    expected = p[:, :264] / p[:, :264].sum(-1, keepdim=True)
    torch.testing.assert_close(scored.values["mu"].double().exp(), expected, atol=5e-6, rtol=0)


def config(**behaviour) -> RolloutConfig:
    return RolloutConfig(
        num_generations=2, prompts_per_round=5, shard_prompts=2, max_completion_length=12,
        behaviour={"kind": "trb", "epsilon": EPSILON, "block": 4, **behaviour},
    )  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    sampler = SamplerRuntime(kv_cache_gib=0.125, max_num_seqs=8, score_cache_gib=0.5)
    runtime = RuntimeConfig(device="cpu", threads=1, retries=0, sampler=sampler)
    with WorkerPool(runtime, tmp_path_factory.mktemp("logs")) as pool:
        yield pool


@pytest.fixture(scope="module")
def blended(models, pool, tmp_path_factory) -> tuple[Stage, dict[str, Artifact]]:
    stage = Stage(tmp_path_factory.mktemp("blended"), models["student"], config(), models["teacher"])
    return stage, stage.build_all(pool)


def test_no_row_spends_more_than_epsilon(blended):
    stage, made = blended
    assert set(made) == {"rollout", "blending"} and made["rollout"].rows == {"rollouts": 10}
    assert all(artifact.provenance["numerics"]["sampler_score_cache_gib"] == 0.5 for artifact in made.values())
    query = Catalog(stage.store).query
    (row,) = query(
        f"""SELECT count(*) AS n, bool_and(list_max(b.kl) <= {EPSILON}) AS within, max(list_max(b.kl)) AS most,
        bool_and(len(b.kl) = len(r.completion_token_ids) AND len(b.beta) = len(b.kl)) AS aligned,
        bool_and(behaviour = 'blended' AND prefix_length = 0) AS marked, sum(b.accepted)::BIGINT AS accepted,
        sum(len(b.kl))::BIGINT AS tokens, sum(b.drafted)::BIGINT AS drafted
        FROM rollouts r JOIN blending b USING (sample_id)"""
    ).to_pylist()
    assert row["n"] == 10 and row["within"] and row["aligned"] and row["marked"]
    assert row["most"] > 0.9 * EPSILON  # the models are far apart: the budget is used
    assert 0 < row["accepted"] <= min(row["drafted"], row["tokens"])
    metrics = made["blending"].meta["metrics"]
    assert metrics["acceptance"] == row["accepted"] / row["tokens"] > 1 - math.sqrt(EPSILON / 2) - 0.15
    assert metrics["draft_used"] == row["accepted"] / row["drafted"]
    assert metrics["kl_max"] == row["most"] and metrics["draft_tv"] < 1e-3


def test_the_log_probabilities_are_those_of_mu(blended, models):
    """Read by transformers alone, token by token."""
    from tasks.behaviours import Stops

    stage, made = blended
    rollouts = stage.store.read_table(made["rollout"], "rollouts").to_pylist()
    spent = stage.store.read_table(made["blending"], "blending").to_pylist()
    for row, values in list(zip(rollouts, spent, strict=True))[:3]:
        prompt, ids = row["prompt_token_ids"], row["completion_token_ids"]
        both = [whole(models[who], prompt, tuple(ids[:-1]), 0) for who in ("student", "teacher")]
        made_of = TrustRegionBlending(epsilon=EPSILON).digest(*both, Stops((257,), (257,)))
        expected = made_of["mu"].gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["sampling_logprobs"]), expected, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(torch.tensor(values["beta"]), made_of["beta"], atol=2e-3, rtol=1e-3)


def test_a_lost_shard_and_a_replay_come_out_bit_for_bit(blended, models, pool, tmp_path):
    stage, made = blended
    rows = {
        name: stage.store.read_table(made[name], table)
        for name, table in (("rollout", "rollouts"), ("blending", "blending"))
    }
    again = Stage(tmp_path / "again", models["student"], config(), models["teacher"])
    replayed = again.build_all(pool, made)
    assert {name: artifact.content for name, artifact in replayed.items()} == {n: a.content for n, a in made.items()}
    for name, table, shard in (("rollout", "rollouts", 0), ("blending", "blending", 2)):
        stage.store.shard_files(made[name], table)[shard].write_bytes(b"damaged")
        repaired = stage.build_all(pool)
        assert repaired[name].content == made[name].content
        assert stage.store.read_table(repaired[name], table).equals(rows[name])


@pytest.mark.parametrize("sampler", ["lock_step", "draft_and_verify"])
def test_ids_that_the_teacher_reads_otherwise_are_written_where_the_student_writes_alone(
    models, pool, tmp_path, sampler
):
    masked = list(range(0, 256, 40))
    stage = Stage(tmp_path, models["student"], config(sampler=sampler), models["teacher"], masked)
    made = stage.build_all(pool)
    values = stage.store.read_table(made["blending"], "blending").to_pylist()
    assert all((row["drafted"] is None) == (sampler == "lock_step") for row in values)
    assert all((row["accepted_lengths"] is None) == (sampler == "lock_step") for row in values)
    assert 0 < max(max(row["kl"]) for row in values) <= EPSILON
    for row, spent in zip(stage.store.read_table(made["rollout"], "rollouts").to_pylist(), values, strict=True):
        prompt, ids = row["prompt_token_ids"], row["completion_token_ids"]
        student = whole(models["student"], prompt, tuple(ids[:-1]), 0)
        left = 1 - student[:, masked].exp().sum(-1)
        for token, beta, kl, mass in zip(ids, spent["beta"], spent["kl"], left.tolist(), strict=True):
            assert beta == 0 or (token not in masked and kl >= -math.log(mass) - 1e-5)
            assert (beta == 0) == (-math.log(mass) > EPSILON) or abs(math.log(mass) + EPSILON) < 1e-4


def test_without_a_trust_region_rows_are_those_of_plain_sampling(models, pool, tmp_path):
    plain = RolloutConfig(**{**config().model_dump(), "behaviour": "student"})
    first = Stage(tmp_path / "plain", models["student"], plain, models["teacher"]).build_all(pool)
    annealed = config(anneal_steps=3).at(3)
    second = Stage(tmp_path / "annealed", models["student"], annealed, models["teacher"]).build_all(pool)
    assert list(second) == ["rollout"] and second["rollout"].key == first["rollout"].key
    assert second["rollout"].content == first["rollout"].content
