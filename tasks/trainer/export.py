"""Export of the student: Hugging Face weights, tokenizer and generation config in one folder."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from transformers import GenerationConfig, PreTrainedModel

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
    metrics = dict[str, float]()
    model = load_model(base, dtype)  # with its own dropout, which its config keeps
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
    _save(model, model.state_dict(), target, companions)
    return metrics


def rehearse_export(model: PreTrainedModel, companions: Path) -> None:
    """Writes everything of an export but the weights into a temporary folder: what would fail after the last step fails before
    the first. `model` is the loaded base.

    Raises InputError if the student has no tokenizer, or transformers refuses to save its configs."""
    with tempfile.TemporaryDirectory(prefix="opd-export-") as folder:
        _save(copy.copy(model), {}, Path(folder), companions)


def _save(model: PreTrainedModel, weights: dict[str, torch.Tensor], target: Path, companions: Path) -> None:
    model.config = config = copy.deepcopy(model.config)
    config.use_cache = True
    if hasattr(config, "auto_map"):  # names code that is not exported
        del config.auto_map
    model.generation_config = _saveable(model.generation_config)
    try:
        model.save_pretrained(target, state_dict=weights)
    except (ValueError, TypeError) as error:
        raise InputError(f"{companions}: transformers cannot save a student of this checkpoint ({error})") from error
    copied = [file for file in sorted(companions.iterdir()) if _is_copied(file)]
    if not any(file.name.startswith(("tokenizer", "tekken.json", "vocab.json")) for file in copied):
        raise InputError(f"{companions}: the checkpoint has no tokenizer files")
    for file in copied:  # generation_config.json among them, as it is
        shutil.copyfile(file, target / file.name)
    for file in sorted(companions.glob("additional_chat_templates/*.jinja")):
        (target / file.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.parent.name / file.name)


def _saveable(generation: GenerationConfig | None) -> GenerationConfig:
    """A generation config that `save_pretrained` accepts: transformers refuses to write values that it reads without complaint
    (temperature without do_sample, in many older chat models). Then only the special ids stay."""
    if generation is None:
        return GenerationConfig()
    try:
        generation.validate(strict=True)
    except ValueError:
        names = ("eos_token_id", "bos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(generation, name) for name in names})
    return generation


def _is_copied(file: Path) -> bool:
    ours = file.name == "config.json" or file.name.endswith(".index.json")
    return file.is_file() and file.suffix in _COMPANIONS and not ours
