"""The sampler with a real vLLM engine on a tiny random model: one engine, built once, shared by the tests."""

import json
import logging
import mmap
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from feed import Feed
from msgspec import structs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import tasks.engines.vllm_engine
import tasks.engines.weight_proof
from flows.run.model_checks import CPU_HEAD_SIZES
from storage.artifacts.artifact import ArtifactSpec
from storage.artifacts.batches import unfinished_batches
from storage.artifacts.digests import weights_digest
from storage.artifacts.shards import read_parquet
from storage.errors import InputError
from storage.identity import derive_seed
from storage.schemas import schema_for
from storage.store import Store
from tasks.engines import distributions
from tasks.engines.hf_folder import read_config, stop_token_ids
from tasks.engines.sampler import Sampler
from tasks.engines.vllm_engine import SamplingFailed
from tasks.engines.weight_proof import StaleWeights, compare_weights, judge_probes
from tasks.inputs.tokenizers import load_tokenizer
from tasks.workers.jobs import ArtifactRef, ModelRef, Request, SampleJob, SampleResult, SampleShard, Sampling

VOCABULARY = 264
EOS = 257
SAMPLING = {"temperature": 0.8, "top_p": 0.7, "top_k": 0, "max_completion_length": 16, "stop_token_ids": "eos"}


def make_model(folder: Path, seed: int, tied: bool, heads: int = 4, hidden: int = 64, positions: int = 128) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden // 2, num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads, head_dim=32, max_position_embeddings=positions,
        tie_word_embeddings=tied, eos_token_id=EOS,
        initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|pad|>", "<|eos|>"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    kinds = {"one": (1, False), "two": (2, False), "tied_one": (3, True), "tied_two": (4, True)}
    return {name: make_model(root / name, seed, tied) for name, (seed, tied) in kinds.items()}


@pytest.fixture(scope="module")
def sampler(checkpoints: dict[str, Path]):
    # few tokens per step, so that ordinary test prompts would be cut if the engine cut any
    settings = {"device": "cpu", "threads": 1, "kv_cache_gib": 0.125, "max_num_seqs": 8, "batched_tokens": 128}
    sampler = Sampler(settings)
    ask(sampler, checkpoints["one"], [prompt(0, 100)], [0])  # as long as any: no later test needs a larger engine
    yield sampler
    sampler.close()


def prompt(number: int, length: int = 6) -> list[int]:
    return [derive_seed("test prompt", number, i) % 256 for i in range(length)]


class Samples:
    """A store with prompts, and an unfinished artifact that gets the shards."""

    def __init__(self, root: Path, prompts: list[list[int]]) -> None:
        self.store = Store(root)
        rows = [
            {"prompt_id": f"p{i}", "split": "train", "text": "x", "token_ids": ids} for i, ids in enumerate(prompts)
        ]
        with self.store.building(ArtifactSpec.of("prepare", 1, {"prompts": prompts}, {})) as builder:
            builder.write_shard("prompts", 0, pa.Table.from_pylist(rows, schema=schema_for("prompts")))
            self.prompts = builder.commit(content={"prompts:train": "p"})
        self.longest = max(map(len, prompts))

    def job(self, path: Path, target: ArtifactRef, length: int = 16) -> SampleJob:
        return SampleJob(
            store=str(self.store.root),
            target=target,
            prompts=ArtifactRef.of(self.prompts),
            split="train",
            model=ModelRef(str(path), weights_digest(path), ""),
            dtype="float32",
            longest=self.longest + length,
            log_table="rollouts",
        )


def shard_of(number: int, requests: list[Request], **sampling: object) -> SampleShard:
    return SampleShard(number, Sampling(**SAMPLING | sampling), requests)


def make(
    sampler: Sampler, path: Path, prompts: list[list[int]], seeds: list[int], report=None, **sampling: object
) -> tuple[list[dict], SampleResult]:
    """Rows of one shard with a sample per prompt, and the job's result."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(Path(folder), prompts)
        requests = [Request(f"p{i}/1/0", f"p{i}", 0, seed) for i, seed in enumerate(seeds)]
        with samples.store.building(ArtifactSpec.of("rollout", 1, {}, {})) as builder:
            length = int(sampling.get("max_completion_length", 16))
            job = samples.job(path, ArtifactRef("rollout", builder.key), length)
            result = sampler.handle(job, Feed([shard_of(0, requests, **sampling)], report))
            artifact = builder.commit(tables={"rollouts": 1})
        return samples.store.read_table(artifact, "rollouts").to_pylist(), result


def ask(sampler: Sampler, path: Path, prompts: list[list[int]], seeds: list[int], **sampling: object) -> list[dict]:
    return [
        {
            "token_ids": row["completion_token_ids"],
            "text": row["completion_text"],
            "finish_reason": row["finish_reason"],
            "logprobs": row["sampling_logprobs"],
        }
        for row in make(sampler, path, prompts, seeds, **sampling)[0]
    ]


def truncated_logprobs(logits_TV: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Nucleus distribution as defined by Holtzman et al. (2020): the smallest set whose mass reaches top_p."""
    probs_TV = torch.softmax(logits_TV.double() / temperature, dim=-1)
    ordered_TV, ids_TV = probs_TV.sort(dim=-1, descending=True)
    before_TV = ordered_TV.cumsum(-1) - ordered_TV
    kept_TV = torch.where(before_TV < top_p, ordered_TV, 0.0)
    kept_TV = kept_TV / kept_TV.sum(-1, keepdim=True)
    return torch.zeros_like(probs_TV).scatter(-1, ids_TV, kept_TV).log()


def logits_of(path: Path, prompt_ids: list[int], completion: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([prompt_ids + completion])).logits[0, len(prompt_ids) - 1 : -1]


def test_a_completion_depends_on_its_seed_alone(sampler, checkpoints):
    path = checkpoints["one"]
    prompts = [prompt(i, 4 + 5 * i) for i in range(6)] * 3
    seeds = list(range(100, 118))
    seen: list[tuple[int, int]] = []
    make(sampler, path, prompts, seeds, lambda done, total: seen.append((done, total)))
    together = ask(sampler, path, prompts, seeds)
    assert seen[-1] == (18, 0) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    order = list(reversed(range(18)))
    backwards = ask(sampler, path, [prompts[i] for i in order], [seeds[i] for i in order])
    alone = [ask(sampler, path, [prompts[i]], [seeds[i]])[0] for i in (0, 7, 17)]
    assert [c["token_ids"] for c in together] == [c["token_ids"] for c in reversed(backwards)]
    assert [c["token_ids"] for c in alone] == [together[i]["token_ids"] for i in (0, 7, 17)]
    assert len({tuple(c["token_ids"]) for c in together}) > 6  # other seeds give other completions
    again = ask(sampler, path, prompts, seeds)
    assert again == together  # the same job gives the same bits, log-probabilities included


def test_sampling_logprobs_are_of_the_truncated_distribution(sampler, checkpoints):
    path = checkpoints["one"]
    prompts = [prompt(i) for i in range(8)]
    for completion, ids in zip(ask(sampler, path, prompts, list(range(8))), prompts, strict=True):
        tokens = completion["token_ids"]
        expected_TV = truncated_logprobs(logits_of(path, ids, tokens), 0.8, 0.7)
        expected = expected_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(completion["logprobs"]) == len(tokens)
        torch.testing.assert_close(torch.tensor(completion["logprobs"]).double(), expected, atol=1e-4, rtol=0)
        assert completion["finish_reason"] == ("stop" if tokens[-1] == EOS else "length")
        assert EOS not in tokens[:-1]


def test_min_p_is_recorded_as_it_was_sampled(sampler, checkpoints):
    path, prompts = checkpoints["one"], [prompt(i) for i in range(8)]
    how = {"temperature": 0.9, "top_p": 0.8, "top_k": 0, "min_p": 0.1}
    cut = 0
    for completion, ids in zip(ask(sampler, path, prompts, list(range(8)), **how), prompts, strict=True):
        logits_TV = logits_of(path, ids, completion["token_ids"]).double() / 0.9
        probs_TV = logits_TV.softmax(-1)
        kept_TV = logits_TV.masked_fill(probs_TV < 0.1 * probs_TV.amax(-1, keepdim=True), -torch.inf)
        cut += int((truncated_logprobs(kept_TV, 1.0, 0.8) != truncated_logprobs(logits_TV, 1.0, 0.8)).any())
        chosen_N = torch.tensor(completion["token_ids"])
        expected = truncated_logprobs(kept_TV, 1.0, 0.8).gather(1, chosen_N[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion["logprobs"]).double(), expected, atol=1e-4, rtol=0)
        logprobs_NV = logits_of(path, ids, completion["token_ids"]).log_softmax(-1)
        scored, outside = distributions.sampling_logprobs(logprobs_NV, chosen_N, **how)  # the scorer means the same
        torch.testing.assert_close(scored.double(), expected, atol=1e-4, rtol=0)
        assert not outside.any()
    assert cut, "min_p cut nothing off that top_p left"


def test_top_k_bounds_what_is_sampled(sampler, checkpoints):
    path, ids = checkpoints["one"], prompt(0)
    completions = ask(sampler, path, [ids] * 40, list(range(40)), top_p=1.0, top_k=3, temperature=2.0)
    first = {completion["token_ids"][0] for completion in completions}
    top3 = set(logits_of(path, ids, [0])[0].topk(3).indices.tolist())
    assert first <= top3 and len(first) > 1


def test_greedy_takes_the_likeliest_token_and_stops_at_explicit_ids(sampler, checkpoints):
    path, ids = checkpoints["one"], prompt(3)
    (free,) = ask(sampler, path, [ids], [0], temperature=0)
    logits_TV = logits_of(path, ids, free["token_ids"])
    assert free["token_ids"] == logits_TV.argmax(-1).tolist()
    own = torch.log_softmax(logits_TV, -1).max(-1).values
    torch.testing.assert_close(torch.tensor(free["logprobs"]), own, atol=1e-4, rtol=0)
    stop = free["token_ids"][2]
    (stopped,) = ask(sampler, path, [ids], [0], temperature=0, stop_token_ids=[stop])
    end = free["token_ids"].index(stop) + 1
    assert stopped["token_ids"] == free["token_ids"][:end] and stopped["finish_reason"] == "stop"


def test_merged_stop_ids_all_end_a_completion_and_its_text_ends_with_the_first(sampler, checkpoints):
    path, ids = checkpoints["one"], prompt(3)
    (free,) = ask(sampler, path, [ids], [0], temperature=0)
    stop = free["token_ids"][2]
    end = free["token_ids"].index(stop) + 1
    how = {"temperature": 0, "stop_token_ids": [EOS, stop, 999], "merged": True}  # 999: only the teacher has it
    (stopped,) = ask(sampler, path, [ids], [0], **how)
    assert stopped["token_ids"] == free["token_ids"][:end] and stopped["finish_reason"] == "stop"
    text = load_tokenizer(path).decode([*free["token_ids"][: end - 1], EOS], skip_special_tokens=True)
    assert stopped["text"] == text != load_tokenizer(path).decode(free["token_ids"][:end], skip_special_tokens=True)


def test_long_prompts_are_never_cut_into_pieces(sampler, checkpoints):
    prompts = [prompt(i, 100) for i in range(8)]  # 128 tokens fit one engine step
    completions = ask(sampler, checkpoints["one"], prompts, list(range(8)))
    path = checkpoints["one"]
    tokens = completions[5]["token_ids"]
    expected_TV = truncated_logprobs(logits_of(path, prompts[5], tokens), 0.8, 0.7)
    expected = expected_TV.gather(1, torch.tensor(tokens)[:, None])
    torch.testing.assert_close(torch.tensor(completions[5]["logprobs"]).double(), expected[:, 0], atol=1e-4, rtol=0)


def test_a_weight_change_is_proven(sampler, checkpoints):
    ids, seeds = [prompt(1)], [5]
    before = ask(sampler, checkpoints["one"], ids, seeds)
    engine = sampler.engine.llm
    rows, other = make(sampler, checkpoints["two"], ids, seeds)
    assert sampler.engine.llm is engine and other.proof["change"] == "reloaded"
    assert other.proof["weights"] == weights_digest(checkpoints["two"])
    # per layer q, k, v fused, o, gate and up fused, down; four norms; then the last norm, embedding, and the output
    # head as it is kept and as it is multiplied with
    assert other.proof["params_compared"] == 2 * 8 + 4 and other.proof["params_unproven"] == 0
    assert 0 < other.proof["max_logprob_difference"] < 1e-4
    assert rows[0]["completion_token_ids"] != before[0]["token_ids"]
    assert ask(sampler, checkpoints["one"], ids, seeds) == before


def test_an_engine_with_stale_weights_is_caught(sampler, checkpoints):
    ask(sampler, checkpoints["one"], [prompt(0)], [0])
    with pytest.raises(StaleWeights, match="parameters differ"):
        sampler.engine.prove(checkpoints["two"], "float32")

    def nudge(model):
        model.model.layers[1].mlp.down_proj.cpu_linear = (
            lambda x, weight, bias, was=(model.model.layers[1].mlp.down_proj.cpu_linear): (
                was(x, weight, bias) * (1 + 1e-6)
            )
        )

    sampler.engine.llm.apply_model(nudge)  # packed weights: only what the layer computes can tell
    with pytest.raises(StaleWeights, match=r"layers\.1\.mlp\.down_proj\.weight as multiplied with"):
        sampler.engine.prove(checkpoints["one"], "float32")

    ask(sampler, checkpoints["two"], [prompt(0)], [0])
    sampler.engine.llm.apply_model(lambda model: model.model.norm.weight.data.mul_(1.001))
    with pytest.raises(StaleWeights, match=r"model\.norm\.weight"):
        sampler.engine.prove(checkpoints["two"], "float32")
    sampler.engine._weights = None  # what a failed change leaves
    ask(sampler, checkpoints["two"], [prompt(0)], [0])


@pytest.mark.parametrize("reload", ["does nothing", "raises"])
def test_an_engine_that_a_reload_left_stale_is_built_anew(sampler, checkpoints, monkeypatch, reload):
    fresh = ask(sampler, checkpoints["two"], [prompt(0)], [0])
    ask(sampler, checkpoints["one"], [prompt(0)], [0])
    before, rpc = sampler.engine.llm, sampler.engine.llm.collective_rpc

    def deaf(name, **kw):
        if name != "opd_reload_weights":
            return rpc(name, **kw)
        if reload == "raises":
            raise RuntimeError("this layer cannot be reloaded")

    monkeypatch.setattr(sampler.engine.llm, "collective_rpc", deaf)
    rows, result = make(sampler, checkpoints["two"], [prompt(0)], [0])
    assert sampler.engine.llm is not before and result.proof["change"] == "built"
    assert rows[0]["completion_token_ids"] == fresh[0]["token_ids"]
    assert rows[0]["sampling_logprobs"] == fresh[0]["logprobs"]
    sampler.engine._reloads = True


def test_a_job_after_a_failed_load_does_not_sample(sampler, checkpoints, monkeypatch):
    """An engine that is stale although it was built anew is refused, and the next job does not believe in it."""
    fresh = ask(sampler, checkpoints["two"], [prompt(0)], [0])
    build = sampler.engine._build
    monkeypatch.setattr(sampler.engine, "_build", lambda path, *rest: build(checkpoints["one"], *rest))
    sampler.close()
    with pytest.raises(StaleWeights):
        ask(sampler, checkpoints["two"], [prompt(0)], [0])
    rows, result = make(sampler, checkpoints["two"], [prompt(0)], [0])
    assert result.proof["change"] == "reloaded" and rows[0]["completion_token_ids"] == fresh[0]["token_ids"]


@pytest.mark.parametrize("kind", ["", "tied_"])
def test_a_reload_warns_of_weights_and_not_of_tables(sampler, checkpoints, kind):
    """vLLM says of every layer that got no weights that it failed to load them; rotary tables are computed, no file has any,
    and a tied head has none of its own."""
    ask(sampler, checkpoints[f"{kind}one"], [prompt(0)], [0])
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        _, result = make(sampler, checkpoints[f"{kind}two"], [prompt(0)], [0])
        logger.warning("%s: Failed to load weights", "RoutedExperts")
    finally:
        logger.removeHandler(handler)
    assert result.proof["change"] == "reloaded" and said == ["RoutedExperts: Failed to load weights"]


def test_no_process_is_started_to_examine_the_model_on_a_cpu(checkpoints, tmp_path, monkeypatch):
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    def started(_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(registry._LazyRegisteredModel, "_get_cache_dir", staticmethod(lambda: tmp_path))
    monkeypatch.setattr(registry, "_run_in_subprocess", started)
    monkeypatch.setattr(ModelRegistry, "models", ModelRegistry.models.copy())
    ModelRegistry.register_model("Qwen3ForCausalLM", "vllm.model_executor.models.qwen3:Qwen3ForCausalLM")
    with pytest.raises(AssertionError, match="a process was started"):
        ModelRegistry.models["Qwen3ForCausalLM"].inspect_model_cls()
    tasks.engines.vllm_engine.import_model(read_config(checkpoints["one"]))
    assert ModelRegistry.models["Qwen3ForCausalLM"].inspect_model_cls().is_text_generation_model


def test_head_sizes_that_the_preflight_knows_are_vllms(sampler):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_weights_in_another_order_are_the_checkpoints_and_others_are_not(sampler, checkpoints):
    """A layout that is not known here (transposed, interleaved) is left to the probes; other values are stale in any order."""
    ask(sampler, checkpoints["one"], [prompt(0)], [0])

    def report(change) -> dict:
        """What is found while the embedding is changed."""

        def compare(model):
            weight = model.model.embed_tokens.weight
            before = weight.data.clone()
            weight.data.copy_(change(before))
            try:
                return compare_weights(model, checkpoints["one"])
            finally:
                weight.data.copy_(before)

        return sampler.engine.llm.apply_model(compare)[0]

    found = [report(change) for change in (lambda w: w, lambda w: w.flip(1), lambda w: w * 1.001)]
    embedding = "model.embed_tokens.weight"
    assert [entry["unproven"] for entry in found] == [[], [embedding], []]
    assert [len(entry["differing"]) for entry in found] == [0, 0, 1]


def test_probes_notice_other_weights(checkpoints):
    sequence = (prompt(0), prompt(1, 8))
    own = torch.log_softmax(logits_of(checkpoints["one"], *sequence), -1).gather(1, torch.tensor(sequence[1])[:, None])
    values = own[:, 0].tolist()
    assert judge_probes(checkpoints["one"], [sequence], [values], "float32")["max_logprob_difference"] < 1e-5
    with pytest.raises(StaleWeights, match="log-probabilities"):
        judge_probes(checkpoints["two"], [sequence], [values], "float32")
    with pytest.raises(StaleWeights, match="log-probabilities"):
        judge_probes(checkpoints["one"], [sequence], [[*values[:-1], values[-1] + 2e-4]], "float32")


def test_a_shard_with_an_aborted_sample_is_asked_again_then_fails_loudly(sampler, checkpoints, monkeypatch):
    path = checkpoints["one"]
    whole = ask(sampler, path, [prompt(0), prompt(1)], [1, 2])
    step, enqueue, calls = sampler._step, sampler._enqueue, []

    def flaky(waiting):
        answers = step(waiting)
        for _, position, output in answers:
            if position == 1 and len(calls) <= failures:
                output.finish_reason = "abort"
        return answers

    def counted(shard, *rest):
        calls.append(shard.item.shard)
        return enqueue(shard, *rest)

    monkeypatch.setattr(sampler, "_step", flaky)
    monkeypatch.setattr(sampler, "_enqueue", counted)
    failures = 2
    assert ask(sampler, path, [prompt(0), prompt(1)], [1, 2]) == whole
    assert calls == [0, 0, 0]
    calls.clear()
    failures = 3
    with pytest.raises(
        SamplingFailed, match=r"1 of 2 samples of shard 0 failed at every try: p1/1/0 \(seed 2\).*abort"
    ):
        ask(sampler, path, [prompt(0), prompt(1)], [1, 2])


def test_an_engine_that_fails_is_built_anew_and_asked_for_its_unfinished_shards(sampler, checkpoints, monkeypatch):
    path = checkpoints["one"]
    prompts, seeds = [prompt(i, 4 + i) for i in range(20)], list(range(20))
    whole = ask(sampler, path, prompts, seeds)
    engine, step = sampler.engine.llm, sampler._step

    def fails(waiting):
        if sampler.engine.llm is engine and len(waiting) < 12:
            raise RuntimeError("the engine core is dead")
        return step(waiting)

    monkeypatch.setattr(sampler, "_step", fails)
    assert ask(sampler, path, prompts, seeds) == whole
    assert sampler.engine.llm is not engine and sampler.engine.proof["change"] == "built"
    ask(sampler, path, [prompt(0, 100)], [0])  # the new engine, too, is as long as any test needs


def test_jobs_that_cannot_be_right_are_refused(sampler, checkpoints, tmp_path):
    path = checkpoints["one"]
    with pytest.raises(InputError, match=r"max_completion_length: the longest .* 136 tokens.*128 positions"):
        ask(sampler, path, [prompt(0), prompt(1, 120)], [0, 1])
    with pytest.raises(InputError, match=r"stop_token_ids.*264"):
        ask(sampler, path, [prompt(0)], [0], stop_token_ids=[264])
    job = Samples(tmp_path, [prompt(0)]).job(path, ArtifactRef("rollout", "0" * 16))
    other = ModelRef(str(path), weights_digest(checkpoints["two"]), "")
    with pytest.raises(InputError, match="digest"):
        sampler.handle(structs.replace(job, model=other), Feed([shard_of(0, [Request("p0/1/0", "p0", 0, 0)])]))


def rollouts(
    sampler: Sampler, path: Path, root: Path, prompts: list[list[int]], sizes: list[int], write: list[int] | None = None,
    **sampling: object,
) -> tuple[dict[int, dict], list[list[int]]]:  # fmt: skip
    """Rows by shard of a job over shards of these sizes, and its batch. With `write` the recorded batch is repeated."""
    samples = Samples(root, prompts)
    numbers = iter(range(sum(sizes)))
    shards = [
        shard_of(shard, [Request(f"p{n}/1/0", f"p{n}", 0, n) for _, n in zip(range(size), numbers)], **sampling)  # noqa: B905
        for shard, size in enumerate(sizes)
    ]
    with samples.store.building(ArtifactSpec.of("rollout", 1, {}, {})) as builder:
        target = ArtifactRef("rollout", builder.key)
        job = samples.job(path, target, int(sampling["max_completion_length"]))
        if write is not None:
            (recorded,) = json.loads((root / "batch").read_text())
            job = structs.replace(job, batch=[step for _, step in recorded], write=write)
            shards = [shards[number] for number, _ in recorded]
        feed = Feed(shards)
        sampler.handle(job, feed)
        made = {done.shard: builder.path for done in feed.results}
        rows = {
            shard: read_parquet(next(folder.glob(f"rollouts-{shard:05d}-*.parquet"))).to_pylist()
            for shard, folder in made.items()
        }
        queues = [[list(entry) for entry in b.queue] for b in unfinished_batches(builder.path, "rollouts") if b]
    (root / "batch").write_text(json.dumps(queues))
    return rows, queues


def test_shards_are_written_as_they_fill_and_the_engine_stays_full(sampler, checkpoints, tmp_path):
    """Eight sequences at once: the fourth shard of three samples enters as soon as a place is free."""
    prompts = [prompt(i) for i in range(15)]
    rows, ((first, *later),) = rollouts(
        sampler, checkpoints["one"], tmp_path, prompts, [3] * 5, max_completion_length=16
    )
    assert sorted(rows) == [0, 1, 2, 3, 4]
    steps = [step for _, step in (first, *later)]
    assert steps[:3] == [0, 0, 0] and 0 < steps[3] <= steps[4]
    alone = ask(sampler, checkpoints["one"], prompts, list(range(15)))
    assert [row["completion_token_ids"] for shard in range(5) for row in rows[shard]] == [c["token_ids"] for c in alone]
    tokenizer = load_tokenizer(checkpoints["one"])
    for row in rows[4]:
        assert row["prompt_token_ids"] == prompt(int(row["prompt_id"][1:]))
        assert row["completion_text"] == tokenizer.decode(row["completion_token_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("tokens", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_lost_shard_comes_out_bit_for_bit_in_its_batch(tmp_path, tokens):
    """Three heads, two threads: what is decoded together can decide the last bits of log-probabilities, never the tokens."""
    path = make_model(tmp_path / "model", 5, False, heads=3, hidden=96, positions=1024)
    sampler = Sampler({"device": "cpu", "threads": 2, "kv_cache_gib": 0.5, "max_num_seqs": 8})
    how = {"max_completion_length": tokens, "top_p": 1.0, "stop_token_ids": [263]}
    prompts = [prompt(i, 5 + i) for i in range(10)]
    try:
        whole, queues = rollouts(sampler, path, tmp_path / "whole", prompts, [1] * 10, **how)
        assert max(len(row["completion_token_ids"]) for row in whole[2]) > tokens // 2 and len(queues) == 1
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "batch").write_text(json.dumps(queues))
        again, _ = rollouts(sampler, path, tmp_path / "again", prompts, [1] * 10, write=[2], **how)
        assert again == {2: whole[2]}
        (tmp_path / "alone").mkdir()
        (tmp_path / "alone" / "batch").write_text(json.dumps([[[2, 0]]]))
        alone, _ = rollouts(sampler, path, tmp_path / "alone", prompts, [1] * 10, write=[2], **how)
        assert [r["completion_token_ids"] for r in alone[2]] == [r["completion_token_ids"] for r in whole[2]]
        pairs = zip(alone[2], whole[2], strict=True)
        gaps = [np.abs(np.subtract(a["sampling_logprobs"], b["sampling_logprobs"])).max() for a, b in pairs]
        assert max(gaps) < 1e-4
    finally:
        sampler.close()


def test_a_head_tied_to_the_embeddings_is_reloaded_with_them(sampler, checkpoints):
    ids, seeds = [prompt(2)], [9]
    ask(sampler, checkpoints["tied_one"], ids, seeds)
    (row,), result = make(sampler, checkpoints["tied_two"], ids, seeds, temperature=0)
    assert result.proof["change"] == "reloaded" and result.proof["max_logprob_difference"] < 1e-4
    logits_TV = logits_of(checkpoints["tied_two"], ids[0], row["completion_token_ids"])
    assert row["completion_token_ids"] == logits_TV.argmax(-1).tolist()
    # vLLM alone leaves the head a packed copy of the old embeddings, and the proof says so
    sampler.engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints["tied_one"])})
    with pytest.raises(StaleWeights, match=r"lm_head\.weight as multiplied with"):
        sampler.engine.prove(checkpoints["tied_one"], "float32")
    sampler.engine._weights = None


@pytest.mark.parametrize("kind", ["one", "tied_one"])
@pytest.mark.parametrize("reloads", [True, False])
def test_a_sampler_that_rested_gives_the_same_completions(sampler, checkpoints, kind, reloads):
    """An engine whose weights can be replaced stays, without packed weights and with an empty cache; another one is freed."""
    ids, seeds = [prompt(number, 20) for number in range(3)], [1, 2, 3]
    before, _ = make(sampler, checkpoints[kind], ids, seeds)
    engine, sampler.engine._reloads = sampler.engine.llm, reloads
    sampler.rest()
    assert sampler.engine.llm is (engine if reloads else None)
    if reloads:
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        assert {getattr(module, "cpu_linear", None) for module in runner.get_model().modules()} == {None}
        # whole pages are given back: what shares the first and the last one with other data stays
        bytes_of = [torch.empty(0, dtype=torch.uint8).set_(layer.untyped_storage()) for layer in runner.kv_caches]
        assert bytes_of and not any(each[mmap.PAGESIZE : -mmap.PAGESIZE].any() for each in bytes_of)
    sampler.engine._reloads = True
    after, result = make(sampler, checkpoints[kind], ids, seeds)
    assert after == before and result.proof["change"] == ("reloaded" if reloads else "built")


def test_stop_ids_come_from_tokenizer_and_generation_config(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["one"], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))
    assert stop_token_ids(folder, "eos", EOS) == [EOS, 258, 259]
    assert stop_token_ids(folder, [7, 3, 7], EOS) == [3, 7]
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="no end-of-sequence"):
        stop_token_ids(folder, "eos", None)


def test_only_the_first_sampler_loads_a_reference_where_everything_was_compared(sampler, checkpoints, monkeypatch):
    """The reference is the whole student in float32 on the host: eight samplers must not each hold one."""
    loads = []
    real = tasks.engines.weight_proof.reference_logprobs
    monkeypatch.setattr(
        tasks.engines.weight_proof, "reference_logprobs", lambda *given: loads.append(given) or real(*given)
    )
    ask(sampler, checkpoints["one"], [prompt(0)], [0])
    for number, expected in ((0, 1), (1, 0), (7, 0)):
        monkeypatch.setitem(sampler.engine.settings, "number", number)
        loads.clear()
        sampler.engine.prove(checkpoints["one"], "float32")
        assert len(loads) == expected and sampler.engine.proof["params_unproven"] == 0
        assert ("probe_tokens" in sampler.engine.proof) == bool(expected)
    # what cannot be compared is probed by every sampler
    judged = tasks.engines.vllm_engine.judge_weights
    monkeypatch.setattr(
        tasks.engines.vllm_engine,
        "judge_weights",
        lambda *given, **named: judged(*given, **named) | {"params_unproven": 1},
    )
    sampler.engine.prove(checkpoints["one"], "float32")
    assert len(loads) == 1
