"""w: how much a routed token counts in the divergence; detached, of mean 1. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.losses.registry import Kind, Registry
from tasks.losses.token_credit.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor


class DivergenceWeight(Kind):
    """A weight of the divergence at each token."""

    teacher_entropy: ClassVar[bool] = False
    success: ClassVar[bool] = False
    """whether it asks which samples are correct"""

    @abstractmethod
    def __call__(self, stored: Stored, routed_N: Tensor) -> Tensor | None:
        """The weights [N] of a step; null: 1 everywhere. routed_N: bool, the tokens where the divergence counts."""


DIVERGENCE_WEIGHTS: Registry[DivergenceWeight] = Registry("divergence weight")
register = DIVERGENCE_WEIGHTS.register


@register
class Unweighted(DivergenceWeight):
    """Every routed token counts the same."""

    kind: Literal["none"] = "none"
    equation = "w = 1"
    paper = ""

    def __call__(self, stored: Stored, routed_N: Tensor) -> Tensor | None:
        return None


@register
class TeacherEntropy(DivergenceWeight):
    """SRPO (2604.02288): less weight where the teacher is uncertain, relative to the mean over the step's routed tokens."""

    kind: Literal["teacher_entropy"] = "teacher_entropy"
    equation = "w = exp(-beta H_q) / its mean over the routed tokens of the optimizer step"
    paper = "2604.02288"
    teacher_entropy = True
    beta: float = Field(1.0, ge=0, description="fall of the log-weight per nat of the teacher's entropy")

    def __call__(self, stored: Stored, routed_N: Tensor) -> Tensor:
        assert stored.teacher_entropy_N is not None
        entropy_N = stored.teacher_entropy_N.masked_fill(~routed_N, 0)
        least = entropy_N[routed_N].min() if bool(routed_N.any()) else 0.0  # the ratio is the same, without underflow
        weight_N = (-self.beta * (entropy_N - least)).exp() * routed_N
        return weight_N / (weight_N.sum() / routed_N.sum().clamp(min=1)).clamp(min=1e-30)


@register
class SuccessRate(DivergenceWeight):
    """RESD (2605.12741): correct samples count by the share of wrong ones, wrong ones by that of correct ones; of mean 1.

    The share is that of the step's judged samples, kept in [1/B, 1 - 1/B]. A sample without a reward has weight 0."""

    kind: Literal["success_rate"] = "success_rate"
    equation = "w = (1 - s) if correct else s, divided by its mean over the samples; s = success rate of the step"
    paper = "2605.12741"
    success = True

    def __call__(self, stored: Stored, routed_N: Tensor) -> Tensor:
        assert stored.correct_S is not None and stored.judged_S is not None
        count = int(stored.judged_S.sum())
        if count == 0:
            return stored.log_p_N.new_zeros(stored.log_p_N.shape)
        rate = float(stored.correct_S.sum()) / count
        rate = min(max(rate, 1 / count), 1 - 1 / count) if count > 1 else 0.5
        of_wrong = stored.log_p_N.new_full(stored.correct_S.shape, rate)
        weight_S = of_wrong.masked_fill(stored.correct_S, 1 - rate).masked_fill(~stored.judged_S, 0)
        return stored.spread(weight_S / (weight_S.sum() / count).clamp(min=1e-30))
