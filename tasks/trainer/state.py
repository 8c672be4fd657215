"""The trainer's state between rounds, independent of ranks and ZeRO stage: float32 master weights and AdamW's moments.

It loads into any ZeRO stage and any number of ranks, bit for bit. Layout of the tree: `master.safetensors`,
`exp_avg.safetensors`, `exp_avg_sq.safetensors` (tensors `<kind>/<parameter name>`), `trainer.json`, with a teacher of kind ema
`ema.safetensors`, with an objective that remembers earlier steps `memory.safetensors`, and with LoRA `base/`: the frozen weights
that the adapters belong to. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
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
from safetensors.torch import load_file, save_file
from torch import nn

from storage.disk.files import link
from storage.errors import CorruptArtifact, InputError
from tasks.trainer.engine import MOMENTS, Engine

EMA = "ema"
MEMORY = "memory.safetensors"


def kinds(averaged: bool) -> tuple[str, ...]:
    """Names of the state's tensors per parameter; `averaged`: the trainer keeps an average for a teacher."""
    return ("master", *MOMENTS, *((EMA,) if averaged else ()))


class TrainerState(BaseModel):
    """`trainer.json`."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    step: int
    """Optimizer steps done so far."""
    round: int
    lr: float
    """Learning rate of the last step."""
    lora: dict[str, Any] | None


def read(directory: Path, lora: dict[str, Any] | None) -> TrainerState:
    """The state's `trainer.json`. CorruptArtifact if unreadable, InputError if it belongs to other adapters."""
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


def save_memory(directory: Path, memory: Mapping[str, np.ndarray]) -> None:
    """Writes what the objective remembers of earlier steps; nothing where that is nothing."""
    if memory:
        save_file({name: torch.from_numpy(values) for name, values in memory.items()}, directory / MEMORY)


def read_memory(directory: Path) -> dict[str, np.ndarray]:
    """What `save_memory` wrote; empty where there is none. CorruptArtifact if the file cannot be read."""
    path = directory / MEMORY
    if not path.exists():
        return {}
    try:
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
    except Exception as error:  # the Rust reader raises its own type
        raise CorruptArtifact(f"{path}: not readable ({error})") from error


class Tensors:
    """The tensors of several safetensors files by name, read on access.

    CorruptArtifact if a file cannot be read, or if the tensors do not match the parameters."""

    def __init__(
        self, files: Sequence[Path], parameters: dict[str, nn.Parameter], kinds: Sequence[str] = kinds(False)
    ) -> None:
        self._of: dict[str, Any] = {}
        for path in files:
            try:
                opened = safe_open(path, "pt")
            except Exception as error:  # the Rust reader raises its own type
                raise CorruptArtifact(f"{path}: not readable ({error})") from error
            self._of |= dict.fromkeys(opened.keys(), opened)
        odd = sorted(set(self._of) ^ {f"{kind}/{name}" for kind in kinds for name in parameters})
        if odd:
            raise CorruptArtifact(
                f"{files[0].parent}: its tensors are not the model's parameters ({len(odd)} differ, first {odd[0]!r})"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._of[name].get_tensor(name)


def files(directory: Path, averaged: bool) -> list[Path]:
    """The safetensors files of a trainer state."""
    return [directory / f"{kind}.safetensors" for kind in kinds(averaged)]


def load_weights(tensors: Tensors, parameters: dict[str, nn.Parameter]) -> None:
    """Fills the parameters (before DeepSpeed takes them) from the master weights, rounded to their dtype. Collective where they
    are in pieces already."""
    for name, parameter in parameters.items():
        with whole(parameter):
            if not hasattr(parameter, "ds_id") or dist.get_rank() == 0:
                parameter.data.copy_(tensors[f"master/{name}"])


def whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """In the block a parameter that ZeRO-3 holds in pieces is whole; what rank 0 changes is kept."""
    in_pieces = hasattr(parameter, "ds_id")
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if in_pieces else nullcontext()


def load(tensors: Tensors, engine: Engine, step: int) -> None:
    """Sets master weights, moments, step count and average of every rank's partition exactly. Collective."""
    engine.make_moments(step)
    for kind in kinds(engine.ema is not None):
        with _readable(engine, kind) as held:
            for name, parameter in engine.parameters.items():
                _set(engine, parameter, held, tensors[f"{kind}/{name}"])
    dist.barrier()


def save(directory: Path, engine: Engine, state: TrainerState, base: Path | None, store: Path) -> None:
    """Writes the tree. Collective; rank 0 writes. `base` is the folder of the frozen weights, with LoRA: its files are hard links
    where they are in the `store`, whose files never change, and copies of a user's own."""
    for kind in kinds(engine.ema is not None):
        tensors = {f"{kind}/{name}": tensor for name, tensor in full_tensors(engine, kind)}
        if dist.get_rank() == 0:
            save_file(tensors, directory / f"{kind}.safetensors")
        del tensors
    if dist.get_rank() == 0:
        if base is not None:
            (directory / "base").mkdir(exist_ok=True)  # an earlier attempt may have made it
            ours = base.resolve().is_relative_to(store.resolve())
            for file in sorted(base.iterdir()):
                if file.name == "config.json" or ".safetensors" in file.name:
                    (link if ours else shutil.copyfile)(file, directory / "base" / file.name)
        (directory / "trainer.json").write_text(state.model_dump_json(indent=2) + "\n")


def share(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's share of the state, `<kind>/<name>` -> float32 tensor on the CPU: every `world`-th parameter, in full.
    Collective; the shares of all ranks together are what `load` reads."""
    world, rank = dist.get_world_size(), dist.get_rank()
    return {
        f"{kind}/{name}": tensor
        for kind in kinds(engine.ema is not None)
        for name, tensor in _gathered(engine, kind, lambda number: number % world == rank)
    }


def full_tensors(engine: Engine, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor on the CPU) of every trained parameter: `master`, `exp_avg`, `exp_avg_sq` or `ema`.

    Collective; only rank 0 gets the tensors, other ranks get nothing."""
    return _gathered(engine, kind, lambda number: dist.get_rank() == 0)


def _gathered(engine: Engine, kind: str, keeps: Callable[[int], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    with _readable(engine, kind) as held:
        for number, (name, parameter) in enumerate(engine.parameters.items()):
            tensor = _get(engine, parameter, held)
            if keeps(number):
                yield name, tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


@contextmanager
def _readable(engine: Engine, kind: str) -> Iterator[str]:
    """In the block tensors of this kind are where the name that it yields says: the average takes the masters' place."""
    if kind != EMA:
        yield kind
        return
    assert engine.ema is not None
    with engine.ema.in_masters():
        yield "master"


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
