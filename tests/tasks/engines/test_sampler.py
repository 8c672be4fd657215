"""The sampler with a real vLLM engine on a tiny random model: one engine, built once, shared by the tests."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from storage.artifacts.artifact import ArtifactSpec
from storage.artifacts.digests import weights_digest
from storage.errors import InputError
from storage.identity import derive_seed
from storage.store import Store
from tasks.engines.hf_folder import stop_token_ids
from tasks.engines.sampler import Sampler, SamplingFailed
from tasks.engines.weight_proof import StaleWeights, judge_probes
from tasks.inputs.tokenizers import load_tokenizer

VOCABULARY = 264
EOS = 257
SAMPLING = {"temperature": 0.8, "top_p": 0.7, "top_k": None, "max_completion_length": 16, "stop_token_ids": "eos"}


def make_model(folder: Path, seed: int, tied: bool) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=tied, eos_token_id=EOS,
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


def job(path: Path, prompts: list[list[int]], seeds: list[int], **sampling: object) -> dict:
    return {
        "op": "generate_shard",
        "model": str(path),
        "weights": weights_digest(path),
        "dtype": "float32",
        "sampling": SAMPLING | sampling,
        "prompts": prompts,
        "seeds": seeds,
    }


def ask(sampler: Sampler, path: Path, prompts: list[list[int]], seeds: list[int], **sampling: object) -> list[dict]:
    return sampler.handle(job(path, prompts, seeds, **sampling), lambda done, total: None)["completions"]


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
    result = sampler.handle(job(path, prompts, seeds), lambda done, total: seen.append((done, total)))
    together = result["completions"]
    assert seen[-1] == (18, 18) and [done for done, _ in seen] == sorted(done for done, _ in seen)
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
    engine = sampler.llm
    other = sampler.handle(job(checkpoints["two"], ids, seeds), lambda *_: None)
    assert sampler.llm is engine and other["proof"]["change"] == "reloaded"
    assert other["proof"]["weights"] == weights_digest(checkpoints["two"])
    # per layer q, k, v fused, o, gate and up fused, down; four norms; then the last norm, embedding, and the output
    # head as it is kept and as it is multiplied with
    assert other["proof"]["params_compared"] == 2 * 8 + 4 and other["proof"]["params_unproven"] == 0
    assert 0 < other["proof"]["max_logprob_difference"] < 1e-4
    assert other["completions"] != before
    assert ask(sampler, checkpoints["one"], ids, seeds) == before


def test_an_engine_with_stale_weights_is_caught(sampler, checkpoints):
    ask(sampler, checkpoints["one"], [prompt(0)], [0])
    with pytest.raises(StaleWeights, match="parameters differ"):
        sampler.prove(checkpoints["two"], "float32")

    def nudge(model):
        model.model.layers[1].mlp.down_proj.cpu_linear = (
            lambda x, weight, bias, was=(model.model.layers[1].mlp.down_proj.cpu_linear): (
                was(x, weight, bias) * (1 + 1e-6)
            )
        )

    sampler.llm.apply_model(nudge)  # packed weights: only what the layer computes can tell
    with pytest.raises(StaleWeights, match=r"layers\.1\.mlp\.down_proj\.weight as multiplied with"):
        sampler.prove(checkpoints["one"], "float32")

    ask(sampler, checkpoints["two"], [prompt(0)], [0])
    sampler.llm.apply_model(lambda model: model.model.norm.weight.data.mul_(1.001))
    with pytest.raises(StaleWeights, match=r"model\.norm\.weight"):
        sampler.prove(checkpoints["two"], "float32")
    sampler._weights = None  # what a failed change leaves
    ask(sampler, checkpoints["two"], [prompt(0)], [0])


def test_a_job_after_a_failed_reload_does_not_sample(sampler, checkpoints, monkeypatch):
    ask(sampler, checkpoints["one"], [prompt(0)], [0])
    rpc = sampler.llm.collective_rpc
    deaf = lambda name, **kw: None if name == "reload_weights" else rpc(name, **kw)  # noqa: E731
    monkeypatch.setattr(sampler.llm, "collective_rpc", deaf)
    for _ in range(2):  # the second job must not believe the first one's attempt
        with pytest.raises(StaleWeights):
            ask(sampler, checkpoints["two"], [prompt(0)], [0])


def test_probes_notice_other_weights(checkpoints):
    sequence = (prompt(0), prompt(1, 8))
    own = torch.log_softmax(logits_of(checkpoints["one"], *sequence), -1).gather(1, torch.tensor(sequence[1])[:, None])
    values = own[:, 0].tolist()
    assert judge_probes(checkpoints["one"], [sequence], [values], "float32")["max_logprob_difference"] < 1e-5
    with pytest.raises(StaleWeights, match="log-probabilities"):
        judge_probes(checkpoints["two"], [sequence], [values], "float32")
    with pytest.raises(StaleWeights, match="log-probabilities"):
        judge_probes(checkpoints["one"], [sequence], [[*values[:-1], values[-1] + 2e-4]], "float32")


def test_an_aborted_sample_is_asked_again_then_fails_loudly(sampler, checkpoints, monkeypatch):
    path = checkpoints["one"]
    whole = ask(sampler, path, [prompt(0), prompt(1)], [1, 2])
    steps, calls = sampler._steps, []

    def flaky(prompts, params):
        calls.append([p.seed for p in params])
        for finished in steps(prompts, params):
            for number, output in finished:
                if number == len(prompts) - 1 and len(calls) <= failures:
                    output.finish_reason = "abort"
            yield finished

    monkeypatch.setattr(sampler, "_steps", flaky)
    failures = 2
    assert ask(sampler, path, [prompt(0), prompt(1)], [1, 2]) == whole
    assert calls == [[1, 2], [2], [2]]
    calls.clear()
    failures = 3
    with pytest.raises(SamplingFailed, match=r"1 of 2 samples failed at every try: number 1 \(seed 2\).*abort"):
        ask(sampler, path, [prompt(0), prompt(1)], [1, 2])


def test_what_an_engine_finished_before_it_failed_is_kept(sampler, checkpoints, monkeypatch):
    path = checkpoints["one"]
    prompts, seeds = [prompt(i, 4 + i) for i in range(20)], list(range(20))
    whole = ask(sampler, path, prompts, seeds)
    engine, steps, calls = sampler.llm, sampler._steps, []

    def fails(prompts, params):
        calls.append(len(prompts))
        for finished in steps(prompts, params):
            yield finished
            if finished and sampler.llm is engine:
                raise RuntimeError("the engine core is dead")

    monkeypatch.setattr(sampler, "_steps", fails)
    assert ask(sampler, path, prompts, seeds) == whole  # log-probabilities too: decoded in another company
    assert sampler.llm is not engine and sampler.proof["change"] == "built"
    assert calls[0] == 20 and 0 < calls[-1] < 20
    ask(sampler, path, [prompt(0, 100)], [0])  # the new engine, too, is as long as any test needs


def test_jobs_that_cannot_be_right_are_refused(sampler, checkpoints):
    path = checkpoints["one"]
    with pytest.raises(InputError, match=r"max_completion_length: 1 of 2 prompts.*120 tokens.*128 positions"):
        ask(sampler, path, [prompt(0), prompt(1, 120)], [0, 1])
    with pytest.raises(InputError, match=r"stop_token_ids.*264"):
        ask(sampler, path, [prompt(0)], [0], stop_token_ids=[264])
    with pytest.raises(InputError, match="digest"):
        sampler.handle(job(path, [prompt(0)], [0]) | {"weights": weights_digest(checkpoints["two"])}, lambda *_: None)


def test_a_rollout_shard_is_written_and_redone_bit_for_bit(sampler, checkpoints, tmp_path):
    prompts = [{"prompt_id": f"p{i}", "token_ids": prompt(i)} for i in range(3)]
    samples = [
        {"sample_id": f"p{i}/1/{g}", "prompt": i, "sample_index": g, "seed": 10 * i + g}
        for i in range(3)
        for g in (0, 1)
    ]
    digests, results = [], []
    for name in ("first", "again"):
        store = Store(tmp_path / name)
        with store.building(ArtifactSpec.of("rollout", 1, {}, {})) as builder:
            rollout = job(checkpoints["one"], prompts, []) | {"op": "rollout_shard", "samples": samples, "shard": 0}
            rollout |= {"store": str(store.root), "stage": "rollout", "key": builder.key}
            results.append(sampler.handle(rollout, lambda *_: None))
            artifact = builder.commit(tables={"rollouts": 1})
        digests.append(artifact.content["rollouts"])
        ask(sampler, checkpoints["one"], [prompt(0), prompt(9)], [3, 4])  # other work between the two
    assert digests[0] == digests[1]
    rows = store.read_table(artifact, "rollouts").to_pylist()
    assert [row["sample_id"] for row in rows] == [sample["sample_id"] for sample in samples]
    token_ids = [prompts[sample["prompt"]]["token_ids"] for sample in samples]
    expected = ask(sampler, checkpoints["one"], token_ids, [sample["seed"] for sample in samples])
    assert [row["completion_token_ids"] for row in rows] == [completion["token_ids"] for completion in expected]
    tokenizer = load_tokenizer(checkpoints["one"])
    for row in rows:
        assert row["prompt_token_ids"] == prompt(int(row["prompt_id"][1:]))
        assert row["completion_text"] == tokenizer.decode(row["completion_token_ids"], skip_special_tokens=True)
    assert results[0]["tokens"] == sum(len(row["completion_token_ids"]) for row in rows)
    assert results[0]["clipped"] == sum(row["finish_reason"] == "length" for row in rows)
    assert results[0]["samples"] == 6 and results[0]["stop_token_ids"] == [EOS]


def test_tied_embeddings_get_a_new_engine(sampler, checkpoints):
    ids, seeds = [prompt(2)], [9]
    ask(sampler, checkpoints["tied_one"], ids, seeds)
    result = sampler.handle(job(checkpoints["tied_two"], ids, seeds, temperature=0), lambda *_: None)
    assert result["proof"]["change"] == "built" and result["proof"]["max_logprob_difference"] < 1e-4
    (completion,) = result["completions"]
    logits_TV = logits_of(checkpoints["tied_two"], ids[0], completion["token_ids"])
    assert completion["token_ids"] == logits_TV.argmax(-1).tolist()
    # the reason: reloaded in place, the output head keeps a packed copy of the old embeddings, and the proof says so
    sampler.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints["tied_one"])})
    with pytest.raises(StaleWeights, match=r"lm_head\.weight as multiplied with"):
        sampler.prove(checkpoints["tied_one"], "float32")
    sampler._weights = None


def test_stop_ids_come_from_tokenizer_and_generation_config(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["one"], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))
    assert stop_token_ids(folder, "eos", EOS) == [EOS, 258, 259]
    assert stop_token_ids(folder, [7, 3, 7], EOS) == [3, 7]
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="no end-of-sequence"):
        stop_token_ids(folder, "eos", None)
