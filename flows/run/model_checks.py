"""Whether the engines can load, run and save the models."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flows.run.checked import Finding, Found, Known, Model
from storage.errors import CorruptArtifact, InputError
from tasks.engines.hf_folder import (
    changed_logits,
    check_weights,
    dropout_fields,
    quantized,
    text_config,
)
from tasks.trainer.config import LoraSettings, OptimizerSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM's attention on CPU (`CPUAttentionBackend.get_supported_head_sizes`)."""
_SHOWN = 8
_NAMED = 3


def architecture(known: Known) -> Found:
    """Whether scorer and trainer can compute with the models."""
    if method := quantized(known.student.config):
        yield Finding(
            f"student: {known.student.path / 'config.json'} has a quantization_config ({method}); quantized weights cannot be"
            " trained, take the checkpoint that they were made from",
            refused=True,
        )
    for model in known.models:
        if changed := changed_logits(model.config):
            yield Finding(
                f"{model.side}: {changed} in {model.path / 'config.json'} changes the logits after the output head; scoring and"
                " training in chunks do not compute that, take another model",
                refused=True,
            )
        try:
            head, whole = model.skeleton.get_output_embeddings(), model.skeleton  # type: ignore[operator]
        except InputError as error:
            yield Finding(f"{model.side}: {error}", refused=True)
            continue
        if type(head).__name__ != "Linear" or whole.base_model is whole:
            yield Finding(
                f"{model.side}: {type(whole).__name__} in {model.path} has no linear output head over a backbone; take a causal"
                " language model",
                refused=True,
            )


def weights(known: Known) -> Found:
    """Whether the files hold the tensors that config.json describes, of names and shapes; their values are not read."""
    for model in known.models:
        try:
            model.skeleton  # noqa: B018 (raises what `architecture` reports)
        except InputError:
            continue
        try:
            unused = check_weights(model.path)
        except (InputError, CorruptArtifact) as error:
            yield Finding(f"{model.side}: {error}", refused=True)
            continue
        if unused:
            more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
            yield Finding(
                f"{model.side}: tensors of {model.path} that its architecture does not use, and that no student will have:"
                f" {', '.join(unused[:_NAMED])}{more}"
            )


def engine(known: Known) -> Found:
    """Whether vLLM has the student's architecture, or can run transformers' own class of it. Reads the names in vLLM's registry
    without importing it, which takes a quarter of a minute."""
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        return  # `installed` reports it
    registry = Path(package.origin).with_name("model_executor") / "models" / "registry.py"
    for model in known.in_vllm:
        try:
            whole = model.skeleton
        except InputError as error:
            if model not in known.models:  # else `architecture` reports it
                yield Finding(f"{model.side}: {error}", refused=True)
            continue
        name = type(whole).__name__
        if has_vision(model.config) and importlib.util.find_spec("torchvision") is None:
            yield Finding(
                f"{model.side}: {name} ({model.path}) reads images too, and vLLM imports torchvision for it, which is not"
                " installed; take the text model of this family, or install torchvision",
                refused=True,
            )
        if registry.is_file():
            models, _, former = registry.read_text().partition("\n_PREVIOUSLY_SUPPORTED_MODELS")
            runs = f'"{name}"' in models or whole.is_backend_compatible()  # type: ignore[operator]
            if not runs or f'"{name}"' in former.partition("}")[0]:
                yield Finding(f"{model.side}: vLLM has no {name} ({model.path}); take another model", refused=True)
        if known.experiment.runtime.device == "cpu" and getattr(whole, "_is_stateful", False):
            yield Finding(
                f"{model.side}: {name} ({model.path}) keeps a recurrent state, which vLLM on CPU cannot run with prompts in one"
                " piece; take a model with attention only, or a GPU",
                refused=True,
            )


def has_vision(config: PretrainedConfig) -> bool:
    """Whether a model has a part that reads images."""
    return getattr(config, "vision_config", None) is not None


def head_size(known: Known) -> Found:
    """vLLM's attention on CPU has kernels for some head sizes only."""
    if known.experiment.runtime.device != "cpu":
        return
    for model in known.in_vllm:
        config = text_config(model.config)
        width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        size = getattr(config, "head_dim", None)
        if size is None and isinstance(width, int) and isinstance(heads, int):
            size = width // heads
        latent = getattr(config, "kv_lora_rank", None)  # attention of another kind, with other kernels
        if not latent and isinstance(size, int) and size not in CPU_HEAD_SIZES:
            yield Finding(
                f"{model.side}: heads of {size} in {model.path / 'config.json'}, but vLLM on CPU has attention for"
                f" {', '.join(map(str, CPU_HEAD_SIZES))} only; take another model, or a GPU",
                refused=True,
            )


def dropout(known: Known) -> Found:
    """Dropout of the checkpoint's config is off in training unless a field turns it on."""
    e = known.experiment
    trained: dict[str, tuple[Model, OptimizerSettings]] = {"train.dropout": (known.student, e.train)}
    trained |= {
        f"{model.side}.warmup.dropout": (model, model.warmup)
        for model in (known.student, *known.teachers)
        if model.warmup is not None
    }
    for name, (model, settings) in trained.items():
        if fields := dropout_fields(model.config):
            shown = ", ".join(f"{field}: {value:g}" for field, value in fields.items())
            acts = "acts in training" if settings.dropout else f"is off in training ({name}: true turns it on)"
            yield Finding(f"{model.side}: {shown} of config.json {acts}")


def adapters(known: Known) -> Found:
    """Which layers LoRA trains."""
    e = known.experiment
    warmed = [(f"{model.side}.warmup", model, model.warmup) for model in (known.student, *known.teachers)]
    for name, model, settings in (("train", known.student, e.train), *warmed):
        if settings is not None and settings.lora is not None:
            try:
                yield from _adapters(f"{name}.lora.target_modules", model, settings.lora)
            except InputError:
                return  # `architecture` reports it


def _adapters(name: str, model: Model, lora: LoraSettings) -> Found:
    there = model.linear_layers
    trained = sorted(set(lora.target_modules) & there)
    missing = sorted(set(lora.target_modules) - there)
    available = ", ".join(sorted(there)[: 2 * _SHOWN])
    if not trained:
        yield Finding(
            f"{name}: no layer of {model.path} has one of these names; its layers are {available}", refused=True
        )
    elif missing:
        yield Finding(
            f"{name}: only {', '.join(trained)} train; no layer of {model.path} is named {', '.join(missing)} (its layers are"
            f" {available})"
        )


def export(known: Known) -> Found:
    """Whether transformers can save the config that it read: every round's student has it."""
    with tempfile.TemporaryDirectory(prefix="opd-check-") as folder:
        try:
            known.student.config.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            path = known.student.path / "config.json"
            yield Finding(f"student: transformers reads {path}, but cannot save it ({error})", refused=True)
