"""m: what multiplies the advantage from rewards, by how the teacher sees the token. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.losses.axes import TopkSupport
from tasks.losses.registry import Kind, Registry
from tasks.losses.token_credit.stored import Stored, Tokens

if TYPE_CHECKING:
    from torch import Tensor


class Scale(Kind):
    """A factor of the advantage from rewards."""

    live: ClassVar[bool] = False
    """whether it is known only from the live student"""
    contexts: ClassVar[bool] = False
    """whether tokens of samples without a context have m = 1"""
    success: ClassVar[bool] = False
    """whether it asks which samples are correct"""

    @property
    def lists(self) -> TopkSupport | None:
        """The support on which it compares both distributions."""
        return None

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        """Numbers per token [N] of a step that `__call__` reads, by name."""
        return {}

    @abstractmethod
    def __call__(self, tokens: Tokens) -> Tensor | None:
        """m [N]; null: 1 everywhere."""


SCALES: Registry[Scale] = Registry("scale")
register = SCALES.register


@register
class NoScale(Scale):
    """The advantage as it is."""

    kind: Literal["none"] = "none"
    equation = "m = 1"
    paper = ""

    def __call__(self, tokens: Tokens) -> Tensor | None:
        return None


def _blended(share_N: Tensor, factor_N: Tensor, advantage_N: Tensor) -> Tensor:
    """(1 - l) + l factor; 1 where A = 0, whose sign is none."""
    return (1 - share_N + share_N * factor_N).masked_fill(advantage_N == 0, 1)


@register
class RLRT(Scale):
    """RLRT (2605.10781): correct samples count more where a teacher that reads a correct rollout of the group disagrees.

    The context must be another rollout of the group than the scored one, under which q(y) would be about 1: ours. Samples that
    are wrong or have no context keep m = 1. The paper's eps are 1, 0.5 and 0.2."""

    kind: Literal["rlrt"] = "rlrt"
    equation = "m = (1-l) + l clip(exp(-sign(A) d), 1-eps, 1+eps) where correct and with a context, else 1"
    paper = "2605.10781"
    experimental = True
    contexts = True
    success = True

    share: float = Field(0.5, ge=0, le=1, description="l: how much of the factor counts")
    eps: float = Field(1.0, gt=0, le=1, description="the factor lies in 1 +- this")

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        assert stored.correct_S is not None
        scaled_N = stored.spread(stored.correct_S & stored.context_S) & stored.scored_N
        return {"scale_share": self.share * scaled_N}

    def __call__(self, tokens: Tokens) -> Tensor:
        factor = (-tokens.advantage_N.sign() * tokens.d_N).clamp(max=40).exp().clamp(1 - self.eps, 1 + self.eps)
        return _blended(tokens.planned["scale_share"], factor, tokens.advantage_N)


class _Signed(Scale):
    contexts = True

    share: float = Field(0.5, ge=0, le=1, description="l: how much of the factor counts")
    low: float = Field(0.8, gt=0, le=1, description="least factor")
    high: float = Field(1.2, ge=1, description="largest factor")
    negative_only: bool = Field(False, description="only where A < 0")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps over which l grows linearly from 0")
    decay_steps: int | None = Field(
        None, ge=1, description="optimizer steps after the warm-up over which l falls linearly to 0; null: it stays"
    )

    def share_at(self, step: int) -> float:
        """l at an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return self.share * step / self.warmup_steps
        left = 1.0 if self.decay_steps is None else max(0.0, 1 - (step - self.warmup_steps) / self.decay_steps)
        return self.share * left

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        assert stored.advantage_S is not None
        scaled_N = stored.scored_N & (stored.spread(stored.advantage_S < 0) if self.negative_only else stored.scored_N)
        return {"scale_share": self.share_at(stored.step) * scaled_N}

    def _of(self, d_N: Tensor, tokens: Tokens) -> Tensor:
        factor = (tokens.advantage_N.sign() * d_N).clamp(max=40).exp().clamp(self.low, self.high)
        return _blended(tokens.planned["scale_share"], factor, tokens.advantage_N)


@register
class RLSD(_Signed):
    """RLSD (2604.03128): samples count more at tokens where the teacher with the solution agrees with their sign."""

    kind: Literal["rlsd"] = "rlsd"
    equation = "m = (1-l) + l clip(exp(sign(A) d), low, high)"
    paper = "2604.03128"

    def __call__(self, tokens: Tokens) -> Tensor:
        return self._of(tokens.d_N, tokens)


@register
class VISD(_Signed):
    """VISD (2605.06094): RLSD with log-probabilities relative to the mass of the teacher's likeliest ids and y.

    Off after `until_step` steps. The student's mass on the teacher's list is known of the live student only, so this needs
    `advantage_at: live` (ours)."""

    kind: Literal["visd"] = "visd"
    equation = "RLSD's m with d~ = [log q(y) - lse_S log q] - [log p(y) - lse_S log p], S = the teacher's top k and y"
    paper = "2605.06094"
    live = True

    k: int = Field(16, ge=2, description="ids of the teacher's list")
    until_step: int | None = Field(600, ge=0, description="optimizer steps after which m = 1; null: never")

    @property
    def lists(self) -> TopkSupport:
        return TopkSupport(kind="teacher_topk", k=self.k, outside="renormalize")

    def share_at(self, step: int) -> float:
        return 0.0 if self.until_step is not None and step >= self.until_step else super().share_at(step)

    def __call__(self, tokens: Tokens) -> Tensor:
        assert tokens.listed is not None
        listed = tokens.listed

        def relative(log_NK: Tensor, log_N: Tensor) -> Tensor:
            mass = log_NK.masked_fill(~listed.listed_NK, -1e30).logsumexp(-1)
            return log_N - mass.logaddexp(log_N.masked_fill(listed.holds_token_N, -1e30))

        d = relative(listed.log_q_NK, tokens.log_q_N) - relative(listed.log_p_NK, tokens.log_p_N)
        return self._of(d, tokens)
