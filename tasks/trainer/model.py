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
from tasks.losses.head import ChunkedHead, HeadProvider, obstacle
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch
from tasks.trainer.data import Forward

_STEP = (0.7548776662466927, 0.5698402909980532)
"""Steps of a low-discrepancy sequence over two dimensions: 1 / g and 1 / g^2, g^3 = g + 1."""
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
    """Statistics of a forward's tokens, or of those that count; detached, each of the same length."""

    per_token_N: torch.Tensor
    mask_N: torch.Tensor
    sample_N: torch.Tensor
    metrics: dict[str, torch.Tensor]
    log_ratio_N: torch.Tensor | None
    """Live student to rollout-time student, log; None where token log-probabilities were not computed."""
    seen_N: torch.Tensor | None = None
    """bool: the tokens of which the metrics `of_seen` were computed; null: all"""
    of_seen: frozenset[str] = frozenset()

    def seen(self, metric: str) -> torch.Tensor | None:
        """bool: the tokens of which a metric was computed; None: all."""
        return self.seen_N if metric in self.of_seen else None


def _joined(parts: list[TokenStats], tokens: TokenBatch) -> TokenStats:
    """The statistics of consecutive tokens; those of no token where there are no parts."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return TokenStats(tokens.loss_mask_N[:0], tokens.loss_mask_N[:0], tokens.sample_N[:0], {}, None)
    first, log_ratios = parts[0], [part.log_ratio_N for part in parts if part.log_ratio_N is not None]
    return TokenStats(
        torch.cat([part.per_token_N for part in parts]),
        torch.cat([part.mask_N for part in parts]),
        torch.cat([part.sample_N for part in parts]),
        {name: torch.cat([part.metrics[name] for part in parts]) for name in first.metrics},
        torch.cat(log_ratios) if log_ratios else None,
        None if first.seen_N is None else torch.cat([part.seen_N for part in parts if part.seen_N is not None]),
        first.of_seen,
    )


class LossHead(nn.Module):
    """Hidden states of the completion tokens in, the micro-batch's share of the loss out. `stop_ids` are one category."""

    def __init__(
        self,
        head: nn.Module,
        objective: Objective,
        provider: HeadProvider,
        weights: Weights | None,
        stop_ids: tuple[int, ...] = (),
        metrics_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.metrics_share = metrics_share
        self._head = [head]  # in a list, so that the model's layer is not registered twice
        self.objective, self.provider, self.weights = objective, provider, weights
        self.student = replace(objective.needs.student, stop_ids=stop_ids)
        self.metrics = replace(objective.needs.metrics, stop_ids=stop_ids)
        self.stats: TokenStats | None = None

    @property
    def head(self) -> nn.Module:
        return self._head[0]

    def forward(self, hidden_ND: torch.Tensor, batch: Forward, observe: bool) -> torch.Tensor:
        """Scalar: sum over tokens of weight x importance weight x per-token loss (float32). Back-propagates once.

        With `observe`, values for metrics only are computed too, without gradient, of `metrics_share` of the tokens; the loss
        stays bit-identical."""
        seen_N = self._seen(batch.tokens) if observe else None
        tokens, weight_N, importance_N = batch.tokens, batch.weight_N, None
        if self.weights is not None:
            importance_N = self.weights(tokens)
            weight_N = weight_N * importance_N
        parts: list[TokenStats] = []

        def share(places_C: torch.Tensor | None, view: StudentView, observed: StudentView | None) -> torch.Tensor:
            part = tokens if places_C is None else tokens.at(places_C)
            weight_C, importance_C, seen_C = (_at(values_N, places_C) for values_N in (weight_N, importance_N, seen_N))
            assert weight_C is not None
            output = self.objective(part, view, observed if seen_C is None else None)
            parts.append(self._stats(part, output, view, observed, importance_C, seen_C))
            return (weight_C * output.per_token_N.float()).sum()

        head = self.head
        if self.fuses(tokens):
            assert isinstance(self.provider, ChunkedHead)
            metrics = self.metrics if observe else None
            loss = self.provider.loss(hidden_ND, head, tokens, self.student, metrics, share, seen_N)
        else:
            view, observed = self.provider(hidden_ND, head, tokens, self.student), None
            if observe:
                mask_N = tokens.loss_mask_N if seen_N is None else tokens.loss_mask_N * seen_N
                with torch.no_grad():
                    observed = self.provider(
                        hidden_ND.detach(), head, replace(tokens, loss_mask_N=mask_N), self.metrics
                    )
            loss = share(None, view, observed)
        self.stats = _joined(parts, tokens)
        return loss

    @torch.no_grad()
    def _stats(
        self,
        part: TokenBatch,
        output: ObjectiveOutput,
        view: StudentView,
        observed: StudentView | None,
        importance_C: torch.Tensor | None,
        seen_C: torch.Tensor | None,
    ) -> TokenStats:
        """Of some tokens. With `seen_C` what the loss does not yield itself is right at these alone, and listed in `of_seen`."""
        metrics = {name: value.detach().float() for name, value in output.metrics.items()}
        log_ratio_C = _log_ratio(part, view)
        if log_ratio_C is None and observed is not None:
            log_ratio_C = _log_ratio(part, observed)
        of_all = {*metrics, "importance_weight_mean"}
        if view.token_logprobs_N is not None:
            of_all |= {"log_ratio_mean", "drift"}
        if seen_C is not None:
            metrics = self.objective(part, view, observed).metrics | metrics
        if importance_C is not None:
            metrics["importance_weight_mean"] = importance_C
        if log_ratio_C is not None:
            metrics["log_ratio_mean"] = log_ratio_C
            metrics["drift"] = torch.expm1(log_ratio_C.double()) - log_ratio_C
        of_seen = frozenset() if seen_C is None else frozenset(metrics) - of_all
        per_token_C = output.per_token_N.detach().float()
        return TokenStats(per_token_C, part.loss_mask_N, part.sample_N, metrics, log_ratio_C, seen_C, of_seen)

    def _seen(self, tokens: TokenBatch) -> torch.Tensor | None:
        """Which tokens metrics are computed of, spread evenly over samples and positions; the same however a step is cut."""
        if self.metrics_share >= 1:
            return None
        place = tokens.position_N.double() * _STEP[0] + tokens.sample_N.double() * _STEP[1]
        return place % 1 < self.metrics_share

    @property
    def note(self) -> str | None:
        """Why a loss over the whole vocabulary makes its logits a second time in backward; null where it does not."""
        if not self.student.whole_vocabulary:
            return None
        reason = obstacle(self.head)
        if reason is None and not self.objective.tokenwise:
            reason = "a token's loss may depend on other tokens (the objective is not tokenwise)"
        return None if reason is None else f"the logits are made again in backward: {reason}"

    def fuses(self, tokens: TokenBatch) -> bool:
        """Whether loss and gradients of these tokens are formed in one pass over their logits."""
        fused = isinstance(self.provider, ChunkedHead) and self.provider.fuses(self.head, tokens, self.student)
        return fused and self.objective.tokenwise


@dataclass(frozen=True)
class Weights:
    """Importance weights of tokens: min(cap, exp(`over` - sampling log-probability))."""

    over: Literal["behaviour_logprobs", "student_logprobs"]
    cap: float

    def __call__(self, tokens: TokenBatch) -> torch.Tensor:
        over_N = tokens.behaviour_logprobs_N if self.over == "behaviour_logprobs" else tokens.student_logprobs_N
        assert over_N is not None and tokens.sampling_logprobs_N is not None
        return (over_N - tokens.sampling_logprobs_N).exp().clamp(max=self.cap)


def _at(values_N: torch.Tensor | None, places_C: torch.Tensor | None) -> torch.Tensor | None:
    return values_N if values_N is None or places_C is None else values_N[places_C]


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
        metrics_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_head = LossHead(model.get_output_embeddings(), objective, provider, weights, stop_ids, metrics_share)

    def forward(self, batch: Forward, observe: bool) -> torch.Tensor:
        hidden_BTD = self.model.get_decoder()(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.hidden_index_N)
        return self.loss_head(hidden_ND, batch, observe)
