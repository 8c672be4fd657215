"""LoRA whose trained student is the exported one, also in bfloat16.

The exported student has the adapters merged: W + s B A, rounded to the dtype. In bfloat16 that rounding hides most of a small
update, so a forward with separate adapters trains another student than the one that is exported, rolled out and evaluated. Here
the forward computes with the merged and rounded weight itself. Its gradient goes through the rounding as through the identity:
what bfloat16 training of all weights does with its float32 master."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import deepspeed
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from storage.errors import ConfigError, OpdError
from tasks.trainer.config import LoraSettings

_ADAPTER = "default"


def add_adapters(model: PreTrainedModel, lora: LoraSettings) -> None:
    """Adds LoRA layers to `model` in place; only they stay trainable. Uses torch's global generator. In 16 bits the layers
    compute with the merged weight (`MergedLinear`).

    Raises ConfigError if no layer has one of the names, or one of them is no linear layer in a 16-bit model."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it by r; its annotation is too narrow
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
    )
    merges = model.dtype != torch.float32
    if merges:
        config._register_custom_module({nn.Linear: MergedLinear, Conv1D: MergedConv1D})
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"train.lora.target_modules: {error}") from error
    for name, layer in lora_layers(model):
        if merges and not isinstance(layer, MergedLinear):
            raise ConfigError(
                f"train.lora.target_modules: {name} is a {type(layer.get_base_layer()).__name__}; with train.dtype: bfloat16 only"
                " linear layers can have adapters. Name others, or set train.dtype: float32"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with an adapter."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


class MergedLinear(PeftLinear):
    """A linear layer with an adapter that computes with the weight that is exported."""

    def parameters_used(self) -> list[nn.Parameter]:
        """Parameters of the layers below that the forward reads itself."""
        return [parameter for parameter in self._tensors() if parameter is not None]

    def forward_weight(self) -> Tensor:
        """The weight of the forward, in the layout of the base layer's: `merged_weight` of what the parameters hold."""
        weight, _, a, b = self._tensors()
        return merged_weight(weight, a, b, self.scaling[_ADAPTER], self.fan_in_fan_out)

    def _tensors(self) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter, nn.Parameter]:
        """Weight and bias of the base layer, a (r, in), b (out, r)."""
        base: Any = self.get_base_layer()
        a, b = (cast(Any, part[_ADAPTER]) for part in (self.lora_A, self.lora_B))
        return base.weight, base.bias, a.weight, b.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out). With dropout, the adapter's part of it has its noise around the merged layer's output."""
        weight, bias, a, b = self._tensors()
        scale = self.scaling[_ADAPTER]
        result: Tensor = _MergedForward.apply(x, weight, bias, a, b, scale, self.fan_in_fan_out)
        dropout = self.lora_dropout[_ADAPTER]
        if self.training and isinstance(dropout, nn.Dropout):
            result = result + F.linear(F.linear(dropout(x) - x, a), b) * scale
        return result


class MergedConv1D(MergedLinear):
    """The same for GPT-2's linear layer, whose weight is (in, out)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config.fan_in_fan_out = True
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=True, **kwargs)


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool) -> Tensor:
    """weight + scale b a, computed in float32 and rounded once to weight's dtype. a (r, in), b (out, r); weight (out, in), or
    `transposed` (in, out)."""
    delta = b.float() @ a.float() * scale
    return (weight.float() + (delta.T if transposed else delta)).to(weight.dtype)


class _MergedForward(torch.autograd.Function):
    """y = x (W + s B A)^T + bias. Backward computes the merged weight again, so that no second copy of the model is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.transposed = scale, transposed
        merged = merged_weight(weight, a, b, scale, transposed)
        return F.linear(x, merged.T if transposed else merged, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        (grad,) = gradients
        grad_x = None
        if ctx.needs_input_grad[0]:
            merged = merged_weight(weight, a, b, ctx.scale, ctx.transposed)
            grad_x = grad @ (merged.T if ctx.transposed else merged)
        x_NI, grad_NO = x.flatten(0, -2), grad.flatten(0, -2)
        grad_a = (grad_NO @ b).T @ x_NI * ctx.scale
        grad_b = grad_NO.T @ (x_NI @ a.T) * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None, None


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """In the block the parameters are whole on every rank, whatever the ZeRO stage."""
    partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)
    return deepspeed.zero.GatheredParameters(parameters) if partitioned else nullcontext()


def trained_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, weight that the forward computes with, weight without the adapter) of every layer with an adapter, on the CPU.
    Collective."""
    for name, layer in lora_layers(model):
        with gathered(list(layer.parameters())), torch.no_grad():
            base = layer.get_base_layer().weight
            weight = layer.forward_weight() if isinstance(layer, MergedLinear) else _exact(layer)
            yield name, weight.cpu(), base.detach().cpu()


def _exact(layer: Any) -> Tensor:
    """What a layer with a separate adapter computes with, before rounding."""
    return layer.get_base_layer().weight.double() + layer.get_delta_weight(_ADAPTER).double()


def merge_adapters(model: PreTrainedModel) -> float:
    """Merges every adapter of a model on the CPU into its weight, in place, and removes the adapter layers. In 16 bits the
    adapters, which hold the float32 master, are rounded first, as the trainer's forward has them.

    Returns |merged weight - unrounded one| / |update|: the share of the adapters' update that the dtype cannot represent."""
    rounding = Norms()
    for name, layer in list(lora_layers(model)):
        below = layer.get_base_layer()
        delta = layer.get_delta_weight(_ADAPTER).float()
        if isinstance(layer, MergedLinear):
            for adapter in (layer.lora_A, layer.lora_B):
                adapter[_ADAPTER].weight.data = adapter[_ADAPTER].weight.data.to(below.weight.dtype)
            merged = layer.forward_weight()
        else:
            merged = (below.weight.float() + delta).to(below.weight.dtype)
        rounding.add(merged, below.weight.double() + delta.double(), below.weight)
        below.weight.data = merged
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, below)
    return rounding.ratio


class Norms:
    """Sums of squares over layers of an error and of the update that it belongs to."""

    def __init__(self) -> None:
        self.error = self.update = 0.0

    def add(self, found: Tensor, expected: Tensor, base: Tensor) -> None:
        self.error += float((found.double() - expected.double()).square().sum())
        self.update += float((expected.double() - base.double()).square().sum())

    @property
    def ratio(self) -> float:
        """|error| / |update|; 0 without an error, infinite where there is an error and no update."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.update) if self.update else math.inf


class ExportDiffers(OpdError):
    """The exported student is not the trained one."""


def require_trained(error: float, limit: float) -> None:
    """Raises ExportDiffers where |exported - trained| / |update| is above the limit."""
    if error > limit:
        raise ExportDiffers(
            f"train.lora: the exported weights differ from those that the trainer computed with by {error:.3g} of the update"
            f" (runtime.trainer.max_export_error: {limit:g}); nothing was committed. Set train.dtype: float32, or raise the limit"
        )
