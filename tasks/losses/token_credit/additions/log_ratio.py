"""The log-ratio of teacher to student, and functions of it at the token alone. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tasks.losses.axes import FullSupport, TopkSupport
from tasks.losses.token_credit.additions import Addition, register
from tasks.losses.token_credit.stored import Tokens

if TYPE_CHECKING:
    from torch import Tensor


@register
class LogRatio(Addition):
    """The log-ratio of teacher to student: sampled-token OPD (2606.01039)."""

    kind: Literal["log_ratio"] = "log_ratio"
    equation = "delta = coef d"
    paper = "2606.01039"
    coef: float = Field(1.0, gt=0, description="weight of the log-ratio")

    def __call__(self, tokens: Tokens) -> Tensor:
        return self.coef * tokens.d_N


@register
class Proximal(Addition):
    """TOP-D (2607.04751): the log-ratio to a mixture of teacher and student, floored at log(1 - alpha)."""

    kind: Literal["proximal"] = "proximal"
    equation = "delta = log(alpha u + 1 - alpha)"
    paper = "2607.04751"
    experimental = True
    alpha: float = Field(0.5, gt=0, lt=1, description="share of the teacher in the mixture")

    def __call__(self, tokens: Tokens) -> Tensor:
        return (tokens.d_N + math.log(self.alpha)).logaddexp(tokens.d_N.new_tensor(math.log1p(-self.alpha)))


@register
class VOPD(Addition):
    """vOPD (2605.07865): the log-ratio with its mean over the vocabulary as a baseline, which leaves the expected gradient.

    With a list instead of the whole vocabulary the baseline is the reverse KL renormalised over it: still no function of y."""

    kind: Literal["vopd"] = "vopd"
    equation = "delta = d + sg KL(p || q) of the position"
    paper = "2605.07865"
    support: Literal["full", "student_topk"] = Field(
        "student_topk", description="ids over which the baseline is summed"
    )
    k: int = Field(100, ge=2, description="ids of the student's list; with `full`, the vocabulary's size")

    @property
    def lists(self) -> TopkSupport | FullSupport:
        if self.support == "full":
            return FullSupport(k=self.k)
        return TopkSupport(kind="student_topk", k=self.k, outside="renormalize")

    def __call__(self, tokens: Tokens) -> Tensor:
        assert tokens.listed is not None
        listed = tokens.listed
        out = ~listed.listed_NK
        p, q = (values.masked_fill(out, -1e30).log_softmax(-1) for values in (listed.log_p_NK, listed.log_q_NK))
        return tokens.d_N + (p.exp() * (p - q)).masked_fill(out, 0).sum(-1)


@register
class Power(Addition):
    """PowerOPD (2606.17199): a difference of powers of probabilities, bounded by 1. Its expectation is 0 only where p = q."""

    kind: Literal["power"] = "power"
    equation = "delta = q(y)^a - p(y)^a"
    paper = "2606.17199"
    a: float = Field(5.0, gt=0, description="the power")

    def __call__(self, tokens: Tokens) -> Tensor:
        return (self.a * tokens.log_q_N).exp() - (self.a * tokens.log_p_N).exp()
