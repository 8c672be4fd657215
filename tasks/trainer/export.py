"""Export of the student: Hugging Face weights, tokenizer and generation config in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch

from storage.errors import InputError
from tasks.trainer.config import LoraSettings
from tasks.trainer.model import load_model

_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", "")
"""Suffixes of files that are copied: tokenizer, template, generation config, licence. No pickle, no code."""


def export_student(
    target: Path,
    base: Path,
    companions: Path,
    masters: Iterable[tuple[str, torch.Tensor]],
    dtype: str,
    lora: LoraSettings | None,
    trained: Iterable[tuple[str, torch.Tensor, torch.Tensor]] = (),
) -> dict[str, float]:
    """Writes the trained model into the empty folder `target`.

    `base` is the checkpoint that training started from (architecture; with LoRA also the frozen weights), `companions`
    the student whose tokenizer, chat template and generation config are copied. `masters` are (name, float32 tensor);
    they are rounded to `dtype` once; adapters are merged first (lora.py). `trained`, with LoRA: see `lora.trained_weights`.
    Returns metrics, with LoRA: `export_error`, |exported - trained| / |update|, and `update_rounded_away`, the share of the
    update that `dtype` cannot represent. Raises InputError if the student has no tokenizer."""
    model, metrics = load_model(base, dtype), dict[str, float]()
    if lora is not None:
        from tasks.trainer.lora import Norms, add_adapters, merge_adapters  # peft's import takes a second

        add_adapters(model, lora)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in masters:
            parameters[name].data = tensor.to(torch.float32 if lora is not None else parameters[name].dtype)
        if lora is not None:
            metrics["update_rounded_away"], apart = merge_adapters(model), Norms()
            for name, weight, before in trained:
                apart.add(cast(torch.Tensor, model.get_submodule(name).weight), weight, before)
            metrics["export_error"] = apart.ratio
    model.config.use_cache = True
    if hasattr(model.config, "auto_map"):  # names code that is not exported
        del model.config.auto_map
    model.save_pretrained(target, safe_serialization=True)
    copied = [file for file in sorted(companions.iterdir()) if _is_copied(file)]
    if not any(file.name.startswith("tokenizer") for file in copied):
        raise InputError(f"{companions}: the checkpoint has no tokenizer files")
    for file in copied:
        shutil.copyfile(file, target / file.name)
    for file in sorted(companions.glob("additional_chat_templates/*.jinja")):
        (target / file.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.parent.name / file.name)
    return metrics


def _is_copied(file: Path) -> bool:
    ours = file.name == "config.json" or file.name.endswith(".index.json")
    return file.is_file() and file.suffix in _COMPANIONS and not ours
