"""Reads a checkpoint's configs: vocabulary, positions, stop tokens, fields that change logits. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.errors import InputError

SAFE_LOADING: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
"""Arguments of every `from_pretrained` that reads weights: no network, no code of the checkpoint, no pickle."""
_LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}
"""Config fields that change logits after the output head, with the values at which they do nothing."""


def changed_logits(config: Any) -> str | None:
    """The field of a transformers config, with its value, that makes logits more than head times hidden state; None without
    one."""
    for name, neutral in _LOGIT_CHANGES.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            return f"{name}: {value}"
    return None


def vocabulary_rows(path: Path) -> int:
    """Rows of a checkpoint's vocabulary, from its config alone. Read by transformers, which fills in the architecture's default
    where the field is missing. InputError when the config cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: transformers cannot read its config ({error})") from error
    return int(config.get_text_config().vocab_size)


def check_length(config: dict[str, Any], path: Path, longest: int) -> None:
    """Raises InputError when the model's positions do not suffice for `longest`, a prompt with its completion (tokens)."""
    limit = longest_sequence(config, path)
    if longest > limit:
        raise InputError(
            f"max_completion_length: the longest prompt with its completion has {longest} tokens, more than the {limit}"
            f" positions of {path}; lower it, or let prepare filter long prompts (prompts.max_prompt_length)"
        )


def stop_token_ids(path: Path, policy: str | Sequence[int], tokenizer_eos: int | None) -> list[int]:
    """The ids that end a completion. "eos": the tokenizer's end of sequence and those of generation_config.json (where
    there is none: of config.json). Raises InputError when there is none at all."""
    if policy != "eos":
        return sorted({int(token) for token in policy})
    source = path / "generation_config.json"
    declared = (json.loads(source.read_text()) if source.is_file() else read_config(path)).get("eos_token_id")
    ids = {int(token) for token in (declared if isinstance(declared, list) else [declared]) if token is not None}
    ids |= {tokenizer_eos} if tokenizer_eos is not None else set()
    if not ids:
        raise InputError(f"stop_token_ids: {path} names no end-of-sequence token; give the ids explicitly")
    return sorted(ids)


def read_config(path: Path) -> dict[str, Any]:
    """config.json, the text part of a multimodal one unfolded. Raises InputError when it cannot be read."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable config.json ({error})") from error
    return {**config, **config.get("text_config", {})}


def longest_sequence(config: dict[str, Any], path: Path) -> int:
    """Positions of the model. InputError when the config does not give them."""
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int) or limit < 1:
        raise InputError(f"{path / 'config.json'}: max_position_embeddings is {limit!r}; a positive integer is needed")
    return limit
