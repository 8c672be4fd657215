"""The model and its objective in one module, so that DeepSpeed's hooks see every use of every parameter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from storage.errors import ConfigError
from tasks.engines.hf_folder import changed_logits, load_causal_lm
from tasks.losses.build import Objective
from tasks.losses.head import HeadProvider
from tasks.losses.types import StudentView, TokenBatch
from tasks.trainer.data import Forward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(path: Path, dtype: str, dropout: bool = True) -> PreTrainedModel:
    """The checkpoint at `path` on the CPU in `dtype`, in training mode; `dropout`: that of its config acts.

    Raises InputError if it cannot be loaded, ConfigError for models whose logits are not head(hidden)."""
    model = load_causal_lm(path, DTYPES[dtype], dropout=dropout)
    if changed := changed_logits(model.config):
        raise ConfigError(
            f"{path}: {changed} in its config changes the logits after the output head; such models are not supported"
        )
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ConfigError(
            f"{path}: the output head is not a linear layer, but {type(model.get_output_embeddings()).__name__}"
        )
    model.config.use_cache = False
    return model.train()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class TokenStats:
    """Statistics of a forward's tokens; detached, each of length N."""

    per_token_N: torch.Tensor
    mask_N: torch.Tensor
    sample_N: torch.Tensor
    metrics: dict[str, torch.Tensor]
    log_ratio_N: torch.Tensor | None
    """Live student to rollout-time student, log; None where token log-probabilities were not computed."""


class LossHead(nn.Module):
    """Hidden states of the completion tokens in, the micro-batch's share of the loss out. `stop_ids` are one category."""

    def __init__(
        self,
        head: nn.Module,
        objective: Objective,
        provider: HeadProvider,
        weights: Weights | None,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self._head = [head]  # in a list, so that the model's layer is not registered twice
        self.objective, self.provider, self.weights = objective, provider, weights
        self.student = replace(objective.needs.student, stop_ids=stop_ids)
        self.metrics = replace(objective.needs.metrics, stop_ids=stop_ids)
        self.stats: TokenStats | None = None

    @property
    def head(self) -> nn.Module:
        return self._head[0]

    def forward(self, hidden_ND: torch.Tensor, batch: Forward, observe: bool) -> torch.Tensor:
        """Scalar: sum over tokens of weight x importance weight x per-token loss (float32).

        With `observe`, values for metrics only are computed too, without gradient; the loss stays bit-identical."""
        tokens = batch.tokens
        view, observed = self.provider(hidden_ND, self.head, tokens, self.student), None
        if observe:
            with torch.no_grad():
                observed = self.provider(hidden_ND.detach(), self.head, tokens, self.metrics)
        output = self.objective(tokens, view, observed)
        per_token_N = output.per_token_N.float()
        metrics = {name: value.detach().float() for name, value in output.metrics.items()}
        weight_N = batch.weight_N
        if self.weights is not None:
            importance_N = self.weights(tokens)
            metrics["importance_weight_mean"] = importance_N
            weight_N = weight_N * importance_N
        log_ratio_N = _log_ratio(tokens, observed or view)
        if log_ratio_N is not None:
            metrics["log_ratio_mean"] = log_ratio_N
            metrics["drift"] = torch.expm1(log_ratio_N.double()) - log_ratio_N
        stats = (per_token_N.detach(), tokens.loss_mask_N, tokens.sample_N, metrics, log_ratio_N)
        self.stats = TokenStats(*stats)
        return (weight_N * per_token_N).sum()


@dataclass(frozen=True)
class Weights:
    """Importance weights of tokens: min(cap, exp(`over` - sampling log-probability))."""

    over: Literal["behaviour_logprobs", "student_logprobs"]
    cap: float

    def __call__(self, tokens: TokenBatch) -> torch.Tensor:
        over_N = tokens.behaviour_logprobs_N if self.over == "behaviour_logprobs" else tokens.student_logprobs_N
        assert over_N is not None and tokens.sampling_logprobs_N is not None
        return (over_N - tokens.sampling_logprobs_N).exp().clamp(max=self.cap)


def _log_ratio(tokens: TokenBatch, view: StudentView) -> torch.Tensor | None:
    if view.token_logprobs_N is None or tokens.student_logprobs_N is None:
        return None
    return view.token_logprobs_N.detach().float() - tokens.student_logprobs_N


class TrainModule(nn.Module):
    """The module that DeepSpeed trains: backbone, hidden states at the completion's positions, output head, objective."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        provider: HeadProvider,
        weights: Weights | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_head = LossHead(model.get_output_embeddings(), objective, provider, weights, stop_ids)

    def forward(self, batch: Forward, observe: bool) -> torch.Tensor:
        hidden_BTD = self.model.get_decoder()(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.hidden_index_N)
        return self.loss_head(hidden_ND, batch, observe)
