"""Proof of a mixture of experts' weights, on a real vLLM engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tasks.engines.vllm_engine import VllmEngine
from tasks.engines.weight_proof import StaleWeights, judge_weights


def make_experts(folder: Path, inner: int) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, moe_intermediate_size=inner, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
        tie_word_embeddings=False, eos_token_id=257, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def test_parts_of_a_pipeline_prove_a_checkpoint_together(tmp_path):
    """Each reads its own layers; what none has read is unproven."""

    def report(*unread: str) -> dict:
        return {"compared": 2, "elements": 8, "differing": [], "unproven": [], "unread": list(unread)}

    both = [report("layers.1", "extra"), report("layers.0", "extra")]
    assert judge_weights(both, tmp_path, need_all=False)["params_unproven"] == 1
    with pytest.raises(StaleWeights, match="1 of unknown layout"):
        judge_weights(both, tmp_path, need_all=True)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [32, 40])  # 40: the kernel pads it
def test_experts_are_compared_without_probes(tmp_path, inner):
    """What the kernel multiplies with is compared, in its own layout; one changed weight of one expert is found."""
    path = make_experts(tmp_path / "model", inner)
    engine = VllmEngine(
        {"device": "cpu", "threads": 1, "kv_cache_gib": 0.125, "max_num_seqs": 4, "verify_weights": "checksums"}
    )
    try:
        engine._build(path, "float32", 32)
        engine.vocabulary = 264
        engine.prove(path, "float32")
        assert engine.proof["params_unproven"] == 0 and "probe_tokens" not in engine.proof
        elements = sum(tensor.numel() for tensor in load_file(path / "model.safetensors").values())
        assert (
            engine.proof["elements_compared"] >= elements
        )  # the linear layers' packed copies and their padding on top
        tensors = load_file(path / "model.safetensors")
        for name in ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.mlp.experts.3.down_proj.weight"):
            other = tmp_path / name
            other.mkdir()
            (other / "config.json").write_bytes((path / "config.json").read_bytes())
            changed = tensors[name].clone()
            changed[3, 5] += 1e-3
            save_file(tensors | {name: changed}, other / "model.safetensors")
            with pytest.raises(StaleWeights, match=r"layers\.\d\.mlp\.experts"):
                engine.prove(other, "float32")
    finally:
        engine.close()
