"""Transformers models and their hidden states at the positions that predict completion tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from storage.errors import ConfigError, InputError
from tasks.engines.hf_folder import changed_logits, load_causal_lm, model_rows, positions
from tasks.engines.teacher import QUANTIZATION_NEEDS, Passage
from tasks.losses.products import logits_of

_PROBE_IDS = 4
_PROBE_TOLERANCE = {torch.float32: 1e-4}
"""By dtype, relative to the largest logit: rounding differs by far less, a scaled head by far more."""
_PROBE_TOLERANCE_LOW_PRECISION = 1e-2


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: padding included, at most `budget` tokens each (a longer
    one is a batch of its own). A pure function of its arguments, so a shard that is scored again has the same batches."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def placement(device: torch.device, devices: int) -> dict[str, int] | str | None:
    """transformers' `device_map`: on a GPU the weights go from the files to it, without a copy of the model on the host; over
    several GPUs layer by layer, by the memory that is free there. None on CPU."""
    if device.type == "cpu":
        return None
    return {"": device.index or 0} if devices == 1 else "auto"


def quantization_config(kind: str) -> Any:
    """transformers' config for weights in 8 bits; the output head stays as it is. None for "none". ConfigError where the library
    is missing."""
    if kind == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(QUANTIZATION_NEEDS)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


class LoadedModel:
    """A checkpoint on the device: backbone and output head apart, so that T x V logits never exist at once.

    Raises InputError for a checkpoint that does not load, or whose logits are more than head times hidden state."""

    def __init__(
        self, path: Path, dtype: str, device: torch.device, devices: int = 1, quantization: str = "none"
    ) -> None:
        self.path, self.device = path, device
        model = load_causal_lm(
            path,
            getattr(torch, dtype),
            device_map=placement(device, devices),
            quantization=quantization_config(quantization),
        )
        self._model = model.eval().requires_grad_(False)
        head = self._model.get_output_embeddings()
        if head is None or self._model.base_model is self._model:
            raise InputError(f"{path}: no causal language model with an output head ({type(model).__name__})")
        self.head: nn.Module = head
        self.rows = model_rows(path)
        self.positions = positions(model.config)
        if changed := changed_logits(model.config):
            self._refuse(f"{changed} in its config")
        self._check_head()

    @torch.inference_mode()
    def _check_head(self) -> None:
        ids = torch.arange(min(_PROBE_IDS, self.rows), device=self.device)[None]
        mask = torch.ones_like(ids)
        expected = self._model(ids, attention_mask=mask, use_cache=False).logits
        found = self.head(self._backbone(ids, mask)).to(expected.device)
        if found.shape != expected.shape or found.shape[-1] != self.rows:
            raise InputError(f"{self.path}: logits of shape {list(expected.shape)}, but vocab_size is {self.rows}")
        limit = _PROBE_TOLERANCE.get(expected.dtype, _PROBE_TOLERANCE_LOW_PRECISION)
        gap = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1)
        if gap > limit:  # NaN weights pass: their positions are flagged one by one
            self._refuse(f"relative difference {gap.item():.2g}")

    def _refuse(self, why: str) -> NoReturn:
        raise InputError(
            f"{self.path}: a {type(self._model).__name__} does more to its logits than multiply hidden states with the"
            f" output head ({why}); neither scoring nor training in chunks computes that"
        )

    def _backbone(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        output: Any = self._model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return output.last_hidden_state

    def check(self, passages: Sequence[Passage], names: Sequence[str]) -> None:
        """Raises InputError for a passage that is empty, too long, or has ids that this model lacks."""
        for passage, name in zip(passages, names, strict=True):
            if not len(passage.prompt):
                raise InputError(f"{name}: a prompt without tokens; nothing predicts its completion's first token")
            length = passage.length
            if self.positions is not None and length > self.positions:
                raise InputError(
                    f"{name}: {length} tokens of prompt and completion, but {self.path} has {self.positions} positions;"
                    " lower max_completion_length or max_prompt_length"
                )
            inputs = passage.inputs
            if inputs.max() >= self.rows or inputs.min() < 0:
                raise InputError(f"{name}: token id {inputs.max()}, but {self.path} has {self.rows} rows")

    @torch.inference_mode()
    def hidden(self, passages: Sequence[Passage]) -> Tensor:
        """hidden_ND: for every completion token, passage after passage, the hidden state that predicts it (one position
        before). One forward, padded on the right."""
        lengths = [passage.length for passage in passages]
        longest = max(lengths)
        ids_BT = torch.zeros(len(passages), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        index: list[Tensor] = []
        for row, passage in enumerate(passages):
            ids_BT[row, : lengths[row]] = torch.from_numpy(passage.inputs)
            mask_BT[row, : lengths[row]] = 1
            first = row * longest + len(passage.prompt) - 1
            index.append(torch.arange(first, first + len(passage.completion)))
        hidden_BTD = self._backbone(ids_BT.to(self.device), mask_BT.to(self.device))
        return hidden_BTD.flatten(0, 1).index_select(0, torch.cat(index).to(hidden_BTD.device))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The head's (N, V)."""
        if type(self.head) is nn.Linear and self.head.bias is None:
            return logits_of(hidden_ND, self.head.weight)
        found: Tensor = self.head(hidden_ND)
        return found

    def keep_head(self) -> None:
        """Free all of the model but its output head."""
        del self._model
