"""DeepSpeed: start, configuration, and one optimizer step over a given number of micro-batches.

The loss is already normalised over the global batch. DeepSpeed averages gradients over ranks, so the loss is multiplied by
the world size; DeepSpeed's scaling by accumulation steps is off, and accumulation boundaries are set explicitly."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import set_log_level_from_string
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from storage.artifacts.digests import weight_files
from tasks.inputs.teachers import EmaStudent
from tasks.trainer.config import OptimizerSettings
from tasks.trainer.data import Forward
from tasks.trainer.deepspeed_file import deepspeed_config
from tasks.trainer.ema import Ema
from tasks.trainer.launch import MEETING
from tasks.trainer.model import TrainModule, load_model
from tasks.workers.guarded import SOCKET

MOMENTS = ("exp_avg", "exp_avg_sq")


def start() -> torch.device:
    """Joins this process to the other ranks (once per process) and returns its device.

    Ranks of one machine meet through a file in the folder of the supervisor's socket: no port is opened beyond gloo's or NCCL's
    own on the loopback device. Ranks of a cluster meet at a store that rank 0 opens on its node."""
    cuda = get_accelerator().device_name() == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    set_log_level_from_string("warning")
    transformers.utils.logging.disable_progress_bar()
    if not dist.is_initialized():
        _import_muon()
        # compiled with g++ at the first start and used by inference alone
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        world = int(os.environ["WORLD_SIZE"])
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(
            backend,
            store=_meeting(world),
            rank=int(os.environ["RANK"]),
            world_size=world,
            timeout=default_pg_timeout,
            device_id=device if cuda and world > 1 else None,  # as DeepSpeed would choose
        )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # torch replaces the module by an object with this property
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def _meeting(world: int) -> Any:
    if world > 1 and (place := os.environ.get(MEETING)):
        host, _, port = place.rpartition(":")
        return dist.TCPStore(host, int(port), world, is_master=os.environ["RANK"] == "0", timeout=default_pg_timeout)  # type: ignore[attr-defined]
    # a store, not a file:// URL: the folder's name may have characters that a URL ends at
    return dist.FileStore(str(Path(os.environ[SOCKET]).parent / "ranks"), world)  # type: ignore[attr-defined]


def _import_muon() -> None:
    """DeepSpeed imports this optimizer to compare types. Its decorators would load torch's compiler, 2 s at every start."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def load_for(config_path: str | None, settings: OptimizerSettings, path: Path) -> PreTrainedModel:
    """The checkpoint in `path` (`load_model`), at ZeRO stage 3 in pieces: every parameter is partitioned over the ranks as it is
    made, and filled by rank 0 from the checkpoint's memory map, so that no rank ever holds the whole model. Then collective."""
    config = deepspeed_config(config_path, settings, 1)
    if config["zero_optimization"]["stage"] != 3:
        return load_model(path, settings.dtype, settings.dropout)
    held = HfDeepSpeedConfig(config)  # transformers keeps a weak reference and asks whether it lives
    try:
        model = load_model(path, settings.dtype, settings.dropout)
    finally:
        unset_hf_deepspeed_config()
        del held
    _restore_buffers(model, path)
    return model


def _restore_buffers(model: PreTrainedModel, path: Path) -> None:
    """Gives a model that was loaded in pieces the buffers of a whole one: DeepSpeed makes every tensor in the model's dtype, also
    the frequencies of rotary positions, which are float32 in any model (bfloat16 ones are wrong from some hundred tokens on)."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        whole = type(model)._from_config(model.config, dtype=model.dtype)
    stored = {name: file for file in weight_files(path) for name in _names(file)}
    places = dict(model.named_modules())
    for name, buffer in whole.named_buffers():
        if name in stored:
            with safe_open(stored[name], framework="pt") as tensors:
                buffer = tensors.get_tensor(name).to(buffer.dtype)
        parent, _, own = name.rpartition(".")
        module = places[parent]
        module.register_buffer(
            own, buffer.to(module._buffers[own].device), own not in module._non_persistent_buffers_set
        )


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO-3 holds in pieces."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _borrowed(module: TrainModule) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """(module, parameter of another module that its forward reads): ZeRO-3 must gather these for it too."""
    for parameter in module.loss_head.head.parameters(recurse=False):
        yield module.loss_head, parameter
    for user in module.modules():
        for parameter in getattr(user, "parameters_used", list)():
            yield user, parameter


class Engine:
    """A DeepSpeed engine over `module` that trains `parameters` with AdamW."""

    def __init__(
        self,
        module: TrainModule,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        config_path: str | None,
        device: torch.device,
    ) -> None:
        count = sum(full_shape(parameter).numel() for parameter in parameters.values())
        config = deepspeed_config(config_path, settings, count)
        self.stage: int = config["zero_optimization"]["stage"]
        self.ema: Ema | None = None
        self.parameters, self.device, self.settings = parameters, device, settings
        self.world = dist.get_world_size()
        matrices = [p for p in parameters.values() if len(full_shape(p)) >= 2]
        others = [p for p in parameters.values() if len(full_shape(p)) < 2]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, settings.weight_decay), (others, 0.0))
            if group
        ]
        # one pass over weights, gradients and moments, where the other forms make one for each operation; it knows no strides
        fused = all(parameter.is_contiguous() for parameter in parameters.values())
        self.adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=self.adamw, config=config, dist_init_required=False
        )
        if self.stage == 0 and self.world == 1:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients out and back, unchanged
        if self.stage == 3:
            for user, parameter in _borrowed(module):
                deepspeed.zero.register_external_parameter(user, parameter)
        self.engine.train()

    def accumulate(self, batch: Forward, observe: bool, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; its share of the global loss, a scalar on the device. `last` completes the
        step's gradient. Collective: every rank calls it equally often."""
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(batch, observe)
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        return loss.detach()

    def step(self, lr: float) -> float | None:
        """Clips, updates and clears the gradients. Returns the global gradient norm before clipping, or None if it is not
        finite; then no weight has changed. Collective."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            norm = self._norm_and_clip()
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return None
            self.engine.step()
            return norm
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if self.engine.was_step_applied() and math.isfinite(norm) else None

    def _norm_and_clip(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        squares = torch.empty(max(g.numel() for g in gradients), dtype=torch.float32, device=self.device)
        sums = [torch.mul(g, g, out=squares[: g.numel()].view_as(g)).sum() for g in map(torch.Tensor.float, gradients)]
        norm = float(torch.stack(sums).sum().sqrt())
        limit = self.settings.max_grad_norm
        if limit is not None and norm + 1e-6 > limit:
            for gradient in gradients:
                gradient.mul_(1.0 / ((norm + 1e-6) / limit))
        return norm

    def make_moments(self, step: int) -> None:
        """Creates AdamW's moments (zero) and step count, so that they can be set and read before the first step.

        Also needed for a new training: DeepSpeed links moments to parameters after the first parameter group's step, and
        those of a second group would never be linked."""
        for flat in self.masters():
            on = flat.device if self.device.type == "cuda" else "cpu"
            moments = {name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in MOMENTS}
            self.adamw.state[flat] = {"step": torch.tensor(float(step), device=on), **moments}
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def masters(self) -> list[torch.Tensor]:
        """The tensors with AdamW moments on this rank: the parameters, or flat float32 partitions."""
        if self.stage == 0:
            return list(self.parameters.values())
        optimizer = self.engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        raise RuntimeError(f"DeepSpeed's {type(optimizer).__name__} has no known attribute with its float32 weights")

    def average(self, source: EmaStudent) -> None:
        """Keep an average of the weights from here on."""
        self.ema = Ema(source, self.masters())

    def close(self) -> None:
        """Removes DeepSpeed's hooks and frees its buffers. The next job builds a new engine."""
        self.engine.destroy()
