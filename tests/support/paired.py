"""The loss of `estimator: pairs` on toy batches (`credit_rows.toy`), by way of the product's plan, packing and objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from credit_rows.toy import Sample, Toy
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import PairsConfig
from tasks.losses.types import TokenBatch
from tasks.trainer.data import Ragged, Samples, forward_batch, loss_denominators
from tasks.trainer.pairing import PairPlanner

CPU = torch.device("cpu")


def _ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    return Ragged(np.concatenate([np.array(row, np.int64) for row in lists]), np.cumsum([0, *map(len, lists)]))


def teachers(sample: Sample) -> Tensor:
    """log q [T] of the sampled tokens."""
    return sample.teacher.log_softmax(-1)[range(len(sample.tokens)), sample.tokens].detach()


def samples_of(toy: Toy, contexts: bool = True) -> Samples:
    """The samples of the toy's pairs, the teacher's completion first, as the trainer has them. What counts is what has a loss
    mask and a valid signal; `contexts`: of samples that have a context alone."""
    chosen = [toy.samples[i] for pair in toy.pairs for i in pair]
    kept = [
        [s.loss[t] and s.signal[t] and (s.has_context or not contexts) for t in range(len(s.tokens))] for s in chosen
    ]
    return Samples(
        ids=[f"s{i}" for pair in toy.pairs for i in pair],
        prompts=_ragged([[1]] * len(chosen)),
        completions=_ragged([s.tokens for s in chosen]),
        keep=np.array([flag for flags in kept for flag in flags], bool),
        floats={"teacher_logprobs": torch.cat([teachers(s) for s in chosen]).float().numpy()},
        pairs=np.arange(len(chosen)).reshape(-1, 2),
    )


def loss_of(
    config: PairsConfig,
    toy: Toy,
    *,
    rows: Sequence[int] | None = None,
    parts: Sequence[Sequence[int]] | None = None,
    contexts: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The loss of a step over the pairs' completions `rows` (numbers in `samples_of`), in micro-batches of the places `parts`
    (null: one of all)."""
    samples, chosen = samples_of(toy, contexts), [toy.samples[i] for pair in toy.pairs for i in pair]
    rows = range(len(chosen)) if rows is None else rows
    objective = make_objective(config)
    planned = PairPlanner(samples)(rows, 0)
    weights = loss_denominators(samples, rows, config.normalisation, config.normalisation_length)
    total = torch.zeros((), dtype=dtype)
    for part in [range(len(rows))] if parts is None else parts:
        batch = forward_batch(samples, rows, weights, part, False, CPU, planned)
        at = [
            (rows[place], t)
            for place, t in zip(batch.tokens.sample_N.tolist(), batch.tokens.position_N.tolist(), strict=True)
        ]
        logits = torch.stack([chosen[row].live[t] for row, t in at]).to(dtype)
        tokens = _exact(batch.tokens, torch.stack([teachers(chosen[row])[t] for row, t in at]), dtype)
        view = PlainHead()(logits, nn.Identity(), tokens, objective.needs.student)
        total = total + (batch.weight_N.to(dtype) * objective(tokens, view).per_token_N).sum()
    return total


def _exact(tokens: TokenBatch, teacher_N: Tensor, dtype: torch.dtype) -> TokenBatch:
    """With log q in the test's precision, not that in which it is stored."""
    assert tokens.planned is not None
    planned = {name: values.to(dtype) for name, values in tokens.planned.items()}
    return replace(tokens, teacher_logprobs_N=teacher_N.to(dtype), planned=planned)


def gradients_of(loss: Tensor, toy: Toy) -> list[Tensor]:
    """Of the live logits of every sample; zeros where the loss does not depend on it."""
    lives = [sample.live for sample in toy.samples]
    found = torch.autograd.grad(loss, lives, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, lives, strict=True)]
