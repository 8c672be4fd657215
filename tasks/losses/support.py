"""Supports: which ids are compared, and how the mass outside of them is treated.

`renormalize` divides both distributions by their own mass on the support (Revisiting OPD, 2603.25562): a softmax
over the support's scores alone. `bucket` adds one category with the remaining mass of each: by data processing never
above the full divergence, and equal to it at K = V. `drop` keeps the terms of the support unnormalised (TrOPD's
outlier term, 2606.01249). Values are masked before they are used: padded entries and masked tokens hold harmless values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.losses.types import lowest, working

Outside = Literal["renormalize", "bucket", "drop"]


@dataclass(frozen=True)
class Categories:
    """Two distributions over the same categories, finite everywhere; entries outside `valid_NC` do not count."""

    log_p_NC: Tensor
    log_q_NC: Tensor
    valid_NC: Tensor

    def sum(self, terms_NC: Tensor) -> Tensor:
        """Sum of the valid terms of each token."""
        return terms_NC.masked_fill(~self.valid_NC, 0).sum(-1)


def listed_mask(ids_NK: Tensor, valid_N: Tensor) -> Tensor:
    """bool [N, K]: which entries of right-padded lists are real."""
    return torch.arange(ids_NK.shape[-1], device=ids_NK.device) < valid_N.unsqueeze(-1)


def excluded_mask(ids_NK: Tensor, exclude_ids: tuple[int, ...]) -> Tensor:
    """bool [N, K]: which ids are among `exclude_ids`."""
    if not exclude_ids:
        return torch.zeros_like(ids_NK, dtype=torch.bool)
    return torch.isin(ids_NK, torch.tensor(exclude_ids, device=ids_NK.device))


def masked_logsumexp(values_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """logsumexp over the masked-in entries; a very low finite number, without gradient, if there are none."""
    floor = lowest(values_NK)
    return torch.logsumexp(values_NK.clamp(min=floor).masked_fill(~mask_NK, floor), -1)


def log1mexp(x: Tensor, minimum: float) -> Tensor:
    """log(1 - exp(x)) for x <= 0, not below `minimum`, and without gradient where that floor holds.

    `log(-expm1(x))` near zero and `log1p(-exp(x))` elsewhere (Maechler 2012): `1 - sum` cancels."""
    top = -torch.exp(torch.tensor(minimum, dtype=x.dtype, device=x.device))
    x = torch.minimum(x, top)
    split = torch.log(torch.tensor(0.5, dtype=x.dtype, device=x.device))
    near = x > split
    close = torch.log(-torch.expm1(x.masked_fill(~near, split)))
    far = torch.log1p(-torch.exp(x.masked_fill(near, split)))
    return torch.where(near, close, far).clamp(min=minimum)


def categories(
    student_NK: Tensor,
    teacher_NK: Tensor,
    listed_NK: Tensor,
    counted_N: Tensor,
    *,
    outside: Outside,
    logprob_min: float,
    tail_logmass_min: float,
    student_tail_N: Tensor | None = None,
    teacher_tail_N: Tensor | None = None,
    excluded_NK: Tensor | None = None,
) -> Categories:
    """The categories that a divergence compares; none where `counted_N` (bool) is false.

    student_NK: log-probabilities of the live student on the support, without the excluded ids (logits will do for
    `renormalize`); teacher_NK: the teacher's over the whole vocabulary. Without a tail given it is computed as
    log(1 - mass), which is accurate to about 1e-7 in mass in float32. Excluded ids are taken out of both where the support
    lists them; where it does not, they stay in both tails."""
    p, q = working(student_NK), working(teacher_NK)
    p, q = p.clamp(min=lowest(p)), q.clamp(min=lowest(q)).to(p.dtype)
    listed_NK = listed_NK & counted_N.unsqueeze(-1)
    valid = listed_NK if excluded_NK is None else listed_NK & ~excluded_NK
    if outside == "renormalize":
        p = p.masked_fill(~valid, lowest(p)).log_softmax(-1)
        q = q.masked_fill(~valid, lowest(q)).log_softmax(-1)
        return _floored(p, q, valid, logprob_min)
    p, q = p.masked_fill(~valid, lowest(p)), q.masked_fill(~listed_NK, lowest(q))
    tail_q = None if teacher_tail_N is None else working(teacher_tail_N).to(p.dtype)
    if tail_q is None:
        tail_q = log1mexp(masked_logsumexp(q, listed_NK), tail_logmass_min)
    if excluded_NK is not None:
        left = log1mexp(masked_logsumexp(q, listed_NK & excluded_NK), tail_logmass_min)
        q, tail_q = q - left.unsqueeze(-1), tail_q - left
    if outside == "drop":
        return _floored(p, q, valid, logprob_min)
    tail_p = None if student_tail_N is None else working(student_tail_N).to(p.dtype)
    if tail_p is None:
        tail_p = log1mexp(masked_logsumexp(p, valid), tail_logmass_min)
    body = _floored(p, q, valid, logprob_min)
    tail = _floored(tail_p.unsqueeze(-1), tail_q.unsqueeze(-1), counted_N.unsqueeze(-1), tail_logmass_min)
    return Categories(
        torch.cat((body.log_p_NC, tail.log_p_NC), -1),
        torch.cat((body.log_q_NC, tail.log_q_NC), -1),
        torch.cat((body.valid_NC, tail.valid_NC), -1),
    )


def _floored(log_p: Tensor, log_q: Tensor, valid: Tensor, minimum: float) -> Categories:
    safe_p = log_p.masked_fill(~valid, 0).clamp(min=minimum)
    safe_q = log_q.masked_fill(~valid, 0).clamp(min=minimum)
    return Categories(safe_p, safe_q, valid)
