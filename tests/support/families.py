"""Tiny checkpoints with random weights, one for each architecture of docs/models.md, and variants that a test asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.1,
    "eos_token_id": 257, "pad_token_id": 256, "bos_token_id": None,
}  # fmt: skip
_GPT = {
    "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": 264, "eos_token_id": 257, "bos_token_id": 257,
}  # fmt: skip
_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"tie_word_embeddings": False, "norm_topk_prob": True, **_EXPERTS},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 32, **_WINDOWS},
    "gpt_oss": {
        "tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "intermediate_size": 64,
    },
    "phi": {"partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 1.0},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": _GPT,
    "cohere": {},
    "starcoder2": {},
    "stablelm": {},
    "glm4": {},
    "exaone4": _WINDOWS,
    "seed_oss": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 2},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
}  # fmt: skip
"""model_type -> its config fields; those that other fields do not replace are common to all."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2 without final_logit_softcapping": ("gemma2", {"final_logit_softcapping": None}),
    "granite with logits_scaling: 8": ("granite", {"logits_scaling": 8.0}),
    "qwen3 with heads of 16": ("qwen3", {"head_dim": 16}),
}
"""Rows of the table in docs/models.md beside the architectures."""
_OWN_NAMES = {
    "gpt2": set(),
    "bloom": {"hidden_size", "vocab_size", "eos_token_id", "pad_token_id"},
    "gpt_neo": {"hidden_size", "vocab_size", "max_position_embeddings", "eos_token_id"},
    "gpt_neox": set(_COMMON) - {"num_key_value_heads", "head_dim"},
    "opt": set(_COMMON) - {"num_key_value_heads", "head_dim", "intermediate_size"},
}
"""Architectures whose configs name some of the common fields otherwise: those that they take."""


def family(folder: Path, kind: str, seed: int = 0, **fields: Any) -> Path:
    """A checkpoint of the architecture `kind` with the project's byte tokenizer; `fields` replace those of its config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    from tasks.inputs.tokenizers import build_byte_tokenizer

    logging.disable_progress_bar()
    common = {name: value for name, value in _COMMON.items() if name in _OWN_NAMES.get(kind, _COMMON)}
    config = CONFIG_MAPPING[kind](**{**common, **FAMILIES[kind], **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


def rewrite(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; a value of `...` removes one."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    content |= fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def config(student: Path, teacher: Path, file: Path, **sections: Any) -> dict[str, Any]:
    """A small experiment with these checkpoints, as YAML would give it. `file`: of `prompt_files`."""
    data: dict[str, Any] = {
        "student": {"source": {"kind": "checkpoint", "path": str(student)}},
        "teacher": {"source": {"kind": "checkpoint", "path": str(teacher)}},
        "prompts": {
            "train": {"kind": "file", "path": str(file)},
            "eval": {"kind": "file", "path": str(file.with_name("eval.jsonl"))},
            "max_prompt_length": 250,
        },
        "rollout": {"prompts_per_round": 4, "num_generations": 2, "max_completion_length": 12},
        "objective": {
            "estimator": "direct",
            "divergence": {"kind": "reverse_kl"},
            "support": {"kind": "teacher_topk", "k": 4, "outside": "bucket"},
        },
        "train": {"samples_per_step": 4, "lr": 1e-3},
        "evaluate": {"max_completion_length": 12},
        "runtime": {"device": "cpu", "threads": 2, "sampler": {"max_num_seqs": 32, "kv_cache_gib": 0.2}},
        "policy": {"rounds": 1},
    }
    for name, values in sections.items():
        data[name] = {**data[name], **values}
    return data


def prompt_files(folder: Path, *texts: str) -> Path:
    """train.jsonl with these prompts (default: four), beside eval.jsonl with one."""
    texts = texts or tuple(f"Add {i} and {i}." for i in range(4))
    (folder / "eval.jsonl").write_text(json.dumps({"prompt": "held out", "answer": "1"}) + "\n")
    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": text, "answer": "2"}) + "\n" for text in texts))
    return train
