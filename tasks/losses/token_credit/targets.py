"""q': what the divergence pulls the student to, always detached. Imports no torch."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from tasks.losses.registry import Kind, Registry
from tasks.schedules import LinearSchedule, ScheduleField

if TYPE_CHECKING:
    from torch import Tensor


class Target(Kind):
    """The distribution, over the support's categories, that the student is compared with."""

    of_tail: ClassVar[bool] = True
    """whether it holds for the bucket of what lies outside the support"""

    def value(self, step: int) -> float | None:
        """A number of the step that `__call__` reads."""
        return None

    @abstractmethod
    def __call__(self, log_p_NC: Tensor, log_q_NC: Tensor, valid_NC: Tensor, value_N: Tensor | None) -> Tensor:
        """log q' [N, C], from detached log-probabilities over the categories (finite; those outside `valid_NC` do not count)."""


TARGETS: Registry[Target] = Registry("target")
register = TARGETS.register


@register
class Teacher(Target):
    """The teacher's distribution."""

    kind: Literal["teacher"] = "teacher"
    equation = "q' = q"
    paper = ""

    def __call__(self, log_p_NC: Tensor, log_q_NC: Tensor, valid_NC: Tensor, value_N: Tensor | None) -> Tensor:
        return log_q_NC


@register
class Floor(Target):
    """RESD (2605.12741): no category of the teacher below a share of the student's; not renormalised."""

    kind: Literal["floor"] = "floor"
    equation = "q' = max(q, share p), on every category, the tail included"
    paper = "2605.12741"
    share: float = Field(0.2, gt=0, lt=1, description="least ratio of target to student")

    def __call__(self, log_p_NC: Tensor, log_q_NC: Tensor, valid_NC: Tensor, value_N: Tensor | None) -> Tensor:
        return log_q_NC.maximum(log_p_NC + math.log(self.share))


@register
class Product(Target):
    """Veto (2601.07155): the teacher's distribution times a power of the student's, which falls over the run.

    The product of tails is not the tail of the product: needs the whole vocabulary, or outside: renormalize."""

    kind: Literal["product"] = "product"
    equation = "q' = q p^beta / Z, p detached"
    paper = "2601.07155"
    of_tail = False
    beta: ScheduleField = Field(
        LinearSchedule(initial=1.2, final=0.0, steps=100), description="the power, over optimizer steps; 0: the teacher"
    )

    @field_validator("beta")
    @classmethod
    def _not_negative(cls, beta: ScheduleField) -> ScheduleField:
        if beta.bounds[0] < 0:
            raise ValueError(f"beta: must not be negative; it lies in {list(beta.bounds)}")
        return beta

    def value(self, step: int) -> float:
        return self.beta.value(step)

    def __call__(self, log_p_NC: Tensor, log_q_NC: Tensor, valid_NC: Tensor, value_N: Tensor | None) -> Tensor:
        assert value_N is not None
        product = log_q_NC + value_N.unsqueeze(-1) * log_p_NC
        return product.masked_fill(~valid_NC, -1e30).log_softmax(-1).masked_fill(~valid_NC, 0)
