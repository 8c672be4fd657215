"""The trainer's state between rounds, free of topology: float32 master weights and AdamW's moments, in full.

It loads into any ZeRO stage and any number of ranks, bit for bit. Layout of the tree: `master.safetensors`,
`exp_avg.safetensors`, `exp_avg_sq.safetensors` (tensors `<kind>/<parameter name>`), `trainer.json`, and with LoRA
`base/`: the frozen weights that the adapters belong to. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from storage.errors import CorruptArtifact, InputError
from tasks.trainer.engine import MOMENTS, Engine

_KINDS = ("master", *MOMENTS)


class TrainerState(BaseModel):
    """`trainer.json`."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    step: int
    """Optimizer steps done so far."""
    round: int
    lr: float
    """Of the last step."""
    lora: dict[str, Any] | None


def read(directory: Path, lora: dict[str, Any] | None) -> TrainerState:
    """The state's description. CorruptArtifact when unreadable, InputError when it belongs to other adapters."""
    try:
        state = TrainerState.model_validate_json((directory / "trainer.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptArtifact(f"{directory}/trainer.json: not a trainer state ({error})") from error
    if state.lora != lora:
        raise InputError(
            f"train.lora: the state of round {state.round} was trained with {json.dumps(state.lora)}, the config says"
            f" {json.dumps(lora)}; adapters cannot change inside a run (fork from round 0 instead)"
        )
    return state


def load_weights(directory: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Fills the parameters (before DeepSpeed takes them) from the master weights, rounded to their dtype.

    CorruptArtifact when names or shapes differ."""
    with _opened(directory, "master", parameters) as tensors:
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors.get_tensor(f"master/{name}"))


def load(directory: Path, engine: Engine, step: int) -> None:
    """Sets master weights, moments and step count of every rank's partition exactly. Collective."""
    engine.make_moments(step)
    for kind in _KINDS:
        with _opened(directory, kind, engine.parameters) as tensors:
            for name, parameter in engine.parameters.items():
                _set(engine, parameter, kind, tensors.get_tensor(f"{kind}/{name}"))
    dist.barrier()


def save(directory: Path, engine: Engine, state: TrainerState, base: Path | None) -> None:
    """Writes the tree; rank 0 writes, all ranks take part. `base` is the folder of the frozen weights, with LoRA."""
    for kind in _KINDS:
        tensors = {f"{kind}/{name}": tensor for name, tensor in full_tensors(engine, kind)}
        if dist.get_rank() == 0:
            save_file(tensors, directory / f"{kind}.safetensors")
        del tensors
    if dist.get_rank() == 0:
        if base is not None:
            (directory / "base").mkdir()
            for file in sorted(base.iterdir()):
                if file.name == "config.json" or ".safetensors" in file.name:
                    shutil.copyfile(file, directory / "base" / file.name)
        (directory / "trainer.json").write_text(state.model_dump_json(indent=2) + "\n")


def full_tensors(engine: Engine, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor on the CPU) of every trained parameter: `master`, `exp_avg` or `exp_avg_sq`.

    Collective; only rank 0 gets the tensors, other ranks get nothing."""
    for name, parameter in engine.parameters.items():
        tensor = _get(engine, parameter, kind)
        if dist.get_rank() == 0:
            yield name, tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _set(engine: Engine, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    value = value.to(engine.device)
    if engine.stage == 0:
        target = parameter.data if kind == "master" else engine.adamw.state[parameter][kind]
        target.copy_(value)
    elif kind == "master":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _get(engine: Engine, parameter: nn.Parameter, kind: str) -> torch.Tensor:
    if engine.stage == 0:
        return parameter.data if kind == "master" else engine.adamw.state[parameter][kind]
    if kind == "master":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def _opened(directory: Path, kind: str, parameters: dict[str, nn.Parameter]) -> Any:
    path = directory / f"{kind}.safetensors"
    try:
        tensors = safe_open(path, "pt")
    except Exception as error:  # the Rust reader raises its own type
        raise CorruptArtifact(f"{path}: not readable ({error})") from error
    odd = sorted(set(tensors.keys()) ^ {f"{kind}/{name}" for name in parameters})
    if odd:
        raise CorruptArtifact(
            f"{path}: its tensors are not the model's parameters ({len(odd)} differ, first {odd[0]!r})"
        )
    return tensors
