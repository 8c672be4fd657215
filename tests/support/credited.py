"""The loss of `estimator: credit` on toy batches (`credit_rows.toy`), by way of the product's plan and objective, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from credit_rows.toy import Toy
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.token_credit.config import CreditConfig
from tasks.losses.token_credit.plan import plan_step, returns_of
from tasks.losses.token_credit.rewards import all_equal, success
from tasks.losses.token_credit.stored import ERROR_SPAN, KEY_SPAN, Stored
from tasks.losses.types import TokenBatch


def joined(toy: Toy, name: str) -> Tensor:
    """The log-probabilities [N, V] of one of the toy's models over all tokens, one sample after another."""
    return torch.cat([getattr(sample, name) for sample in toy.samples]).log_softmax(-1)


def sampled(toy: Toy, name: str) -> Tensor:
    return joined(toy, name).gather(1, torch.tensor([[y] for sample in toy.samples for y in sample.tokens])).squeeze(1)


def flat(toy: Toy, of: Any) -> Tensor:
    return torch.tensor([of(sample, t) for sample in toy.samples for t in range(len(sample.tokens))])


def _segment(sample: Any, t: int) -> int:
    return sum(end <= t for end in sample.segment_ends)


def _span(sample: Any, t: int) -> int:
    kinds = {kind for start, end, kind in sample.spans if start <= t < end}
    return KEY_SPAN if "key" in kinds else ERROR_SPAN if kinds else 0


def stored_of(toy: Toy, config: CreditConfig, step: int = 0, contexts: bool = True) -> Stored:
    """What is stored of the toy's tokens. `contexts`: whether samples have contexts of their own."""
    rewards = np.array([sample.reward for sample in toy.samples])
    groups = np.array([sample.prompt for sample in toy.samples])
    judged = ~np.isnan(rewards)
    threshold = config.reward.threshold
    correct = judged & (np.nan_to_num(rewards) >= (0.0 if threshold is None else threshold))
    teacher, old = joined(toy, "teacher").detach(), joined(toy, "old").detach()
    per_sample = {
        "advantage_S": config.reward.advantages(rewards, groups),
        "correct_S": correct,
        "judged_S": judged,
        "success_S": success(correct, judged, groups),
        "equal_S": all_equal(rewards, groups),
        "context_S": np.array([sample.has_context or not contexts for sample in toy.samples]),
        "ended_S": np.array([sample.stops for sample in toy.samples]),
    }
    return Stored(
        step=step,
        sample_N=torch.tensor([i for i, sample in enumerate(toy.samples) for _ in sample.tokens]),
        position_N=flat(toy, lambda sample, t: t),
        counted_N=flat(toy, lambda sample, t: sample.k(t) > 0),
        written_N=flat(toy, lambda sample, t: bool(sample.written[t])),
        valid_N=flat(toy, lambda sample, t: bool(sample.signal[t])),
        log_p_N=sampled(toy, "old").detach(),
        log_q_N=sampled(toy, "teacher").detach(),
        teacher_entropy_N=-(teacher.exp() * teacher).sum(-1),
        student_entropy_N=-(old.exp() * old).sum(-1),
        segment_N=flat(toy, _segment) if config.add.segments or config.add.judged_segments else None,
        span_N=flat(toy, _span),
        **{name: torch.from_numpy(values) for name, values in per_sample.items()},
    )


def planned(
    toy: Toy, config: CreditConfig, step: int = 0, contexts: bool = True, remembered: float | None = None
) -> dict[str, Tensor]:
    """The columns of the toy's step."""
    stored, returns = replace(stored_of(toy, config, step, contexts), remembered=remembered), None
    if config.returns.groups:
        group_N = stored.spread(torch.tensor([sample.prompt for sample in toy.samples]))
        returns = config.returns.normalise(returns_of(config, stored), stored.scored_N, group_N)
    return plan_step(config, stored, returns)


def batch_of(toy: Toy, config: CreditConfig, columns: dict[str, Tensor], dtype: torch.dtype) -> TokenBatch:
    """All tokens of the toy in one micro-batch."""
    old, teacher = joined(toy, "old").detach(), joined(toy, "teacher").detach()
    lists: dict[str, Tensor] = {}
    if (support := config.lists) is not None:
        of = {"student_topk": old, "teacher_topk": teacher, "full": teacher}[support.kind]
        k = min(support.k, toy.vocabulary)
        ids = of.topk(k, dim=-1).indices
        rest = teacher.scatter(1, ids, -torch.inf).logsumexp(-1)
        lists = {
            "support_ids_NK": ids,
            "support_valid_N": torch.full((len(ids),), k),
            "teacher_support_logprobs_NK": teacher.gather(1, ids).to(dtype),
            "student_support_logprobs_NK": old.gather(1, ids).to(dtype),
            "teacher_tail_logmass_N": rest.to(dtype),
        }
    return TokenBatch(
        token_ids_N=torch.tensor([y for sample in toy.samples for y in sample.tokens]),
        loss_mask_N=flat(toy, lambda sample, t: float(sample.k(t) > 0)).to(dtype),
        sample_N=torch.tensor([i for i, sample in enumerate(toy.samples) for _ in sample.tokens]),
        position_N=flat(toy, lambda sample, t: t),
        student_logprobs_N=sampled(toy, "old").detach().to(dtype),
        teacher_logprobs_N=sampled(toy, "teacher").detach().to(dtype),
        planned={name: values.to(dtype) for name, values in columns.items()},
        **lists,
    )


def weights_of(toy: Toy, config: CreditConfig) -> Tensor:
    """What the trainer multiplies each token's loss by."""
    kept = [sum(sample.k(t) > 0 for t in range(len(sample.tokens))) for sample in toy.samples]
    if config.normalisation == "token":
        of_sample = [1 / max(1, sum(kept))] * len(kept)
    elif config.normalisation == "sequence":
        of_sample = [1 / (max(1, sum(k > 0 for k in kept)) * max(1, k)) for k in kept]
    else:
        of_sample = [1 / (len(kept) * (config.normalisation_length or 1))] * len(kept)
    return torch.tensor(
        [w for w, sample in zip(of_sample, toy.samples, strict=True) for _ in sample.tokens], dtype=torch.float64
    )


def loss_of(
    config: CreditConfig,
    toy: Toy,
    *,
    step: int = 0,
    contexts: bool = True,
    remembered: float | None = None,
    parts: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The loss of a step, computed in the micro-batches `parts` of samples (null: one of all)."""
    objective = make_objective(config)
    whole = batch_of(toy, config, planned(toy, config, step, contexts, remembered), dtype)
    logits = torch.cat([sample.live for sample in toy.samples]).to(dtype)
    weights, total = weights_of(toy, config).to(dtype), torch.zeros((), dtype=dtype)
    for part in [range(len(toy.samples))] if parts is None else parts:
        places = torch.cat([(whole.sample_N == i).nonzero().squeeze(1) for i in part])
        batch = whole.at(places)
        view = PlainHead()(logits[places], nn.Identity(), batch, objective.needs.student)
        total = total + (weights[places] * objective(batch, view).per_token_N).sum()
    return total


def gradients_of(loss: Tensor, toy: Toy) -> list[Tensor]:
    """Of the live logits of every sample."""
    return list(torch.autograd.grad(loss, [sample.live for sample in toy.samples]))
