"""a and b: where the policy gradient counts and where the divergence does. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from tasks.losses.registry import Kind, Registry
from tasks.losses.token_credit.stored import ERROR_SPAN, KEY_SPAN, Stored
from tasks.schedules import LinearSchedule, ScheduleField

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """Per token [N] of a step, before weights."""

    a_N: Tensor
    b_N: Tensor
    error_N: Tensor | None = None
    """bool: the divergence of errors counts here, in place of the other"""


class Route(Kind):
    """Where each term counts."""

    policy: ClassVar[bool] = True
    """whether the policy gradient counts anywhere"""
    splits: ClassVar[bool] = False
    """whether the terms share the tokens: both are then divided by the number of all (`denominator`)"""
    contexts: ClassVar[bool] = False
    """whether it asks which samples have a context"""
    success: ClassVar[bool] = False
    """whether it asks which samples are correct"""
    spans: ClassVar[bool] = False
    """whether it asks for spans of tokens"""
    beside: ClassVar[bool] = False
    """whether it makes no sense without a divergence"""
    equal_groups: ClassVar[bool] = False
    """whether the divergence counts on groups whose rewards are all equal"""

    @abstractmethod
    def __call__(self, stored: Stored) -> Routed:
        """The factors of the tokens of a step."""


ROUTES: Registry[Route] = Registry("route")
register = ROUTES.register


def _float(flags_N: Tensor, stored: Stored) -> Tensor:
    return flags_N.to(stored.log_p_N.dtype)


@register
class Everywhere(Route):
    """Both terms at every token."""

    kind: Literal["all"] = "all"
    equation = "a = b = 1"
    paper = ""

    def __call__(self, stored: Stored) -> Routed:
        ones = _float(stored.counted_N | True, stored)
        return Routed(ones, ones)


@register
class DivergenceAlone(Route):
    """The divergence at every token; no policy gradient (RESD, 2605.12741, whose weights ask for rewards)."""

    kind: Literal["divergence"] = "divergence"
    equation = "a = 0, b = 1"
    paper = "2605.12741"
    policy = False
    beside = True

    def __call__(self, stored: Stored) -> Routed:
        ones = _float(stored.counted_N | True, stored)
        return Routed(0 * ones, ones)


@register
class WithContext(Route):
    """SDPO (2601.20802): the divergence on samples that have a context; no policy gradient."""

    kind: Literal["contexts"] = "contexts"
    equation = "a = 0, b = 1 where the teacher has a context"
    paper = "2601.20802"
    policy = False
    contexts = True
    beside = True

    def __call__(self, stored: Stored) -> Routed:
        b_N = _float(stored.spread(stored.context_S), stored)
        return Routed(0 * b_N, b_N)


@register
class SRPO(Route):
    """SRPO (2604.02288): wrong samples that have a context get the divergence, all others the policy gradient.

    A wrong sample of a group without a correct one has no context to read, and no advantage either. A sample without a reward is
    not routed."""

    kind: Literal["srpo"] = "srpo"
    equation = "z = (1 - correct) has_context; a = 1 - z, b = z"
    paper = "2604.02288"
    splits = True
    contexts = True
    success = True
    beside = True

    def __call__(self, stored: Stored) -> Routed:
        assert stored.correct_S is not None and stored.judged_S is not None
        z_N = _float(stored.spread(~stored.correct_S & stored.judged_S & stored.context_S), stored)
        return Routed(1 - z_N, z_N)


@register
class FailedGroups(Route):
    """PTD-PO (2606.07000): the policy gradient everywhere, the divergence on the wrong samples of groups that mostly fail.

    The threshold is 1 or 0.2 in the paper. Its published divergence has no gradient (p is detached beside a live mixture); ours
    differentiates p."""

    kind: Literal["failed_groups"] = "failed_groups"
    equation = "a = 1, b = (1 - correct) 1[success of the group < threshold] has_context"
    paper = "2606.07000"
    experimental = True
    contexts = True
    success = True
    beside = True
    equal_groups = True

    threshold: float = Field(1.0, gt=0, le=1, description="groups whose share of correct samples is below this")

    def __call__(self, stored: Stored) -> Routed:
        assert stored.correct_S is not None and stored.judged_S is not None and stored.success_S is not None
        failed_S = ~stored.correct_S & stored.judged_S & (stored.success_S < self.threshold) & stored.context_S
        b_N = _float(stored.spread(failed_S), stored)
        return Routed(_float(stored.counted_N | True, stored), b_N)


@register
class Spans(Route):
    """TRACE (2605.10194): the divergence on key spans of correct samples, and on error spans of wrong ones where `errors`.

    A span's sum is divided by the completion's length and weighed by lambda, which falls; the policy gradient on the tokens of
    these spans grows as lambda falls. A sample whose spans cover more than `coverage` of it has the policy gradient alone."""

    kind: Literal["spans"] = "spans"
    equation = "b = lambda / length on its spans, a = 1 - lambda / lambda_0 on its spans, 1 elsewhere"
    paper = "2605.10194"
    experimental = True
    splits = True
    success = True
    spans = True
    beside = True

    weight: ScheduleField = Field(
        LinearSchedule(initial=0.5, final=0.0, steps=30, start=10), description="lambda, over optimizer steps"
    )
    coverage: float = Field(0.25, gt=0, le=1, description="largest share of a completion that its spans may cover")
    errors: bool = Field(False, description="the divergence of `beside.on_errors` on error spans of wrong samples")

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: ScheduleField) -> ScheduleField:
        if weight.bounds[0] < 0 or weight.bounds[1] <= 0:
            raise ValueError(f"weight: lambda must not be negative, nor always 0; it lies in {list(weight.bounds)}")
        return weight

    def __call__(self, stored: Stored) -> Routed:
        assert stored.correct_S is not None and stored.judged_S is not None and stored.span_N is not None
        correct_N = stored.spread(stored.correct_S)
        key_N = (stored.span_N == KEY_SPAN) & correct_N
        error_N = (stored.span_N == ERROR_SPAN) & ~correct_N & stored.spread(stored.judged_S) & self.errors
        length_S = stored.length_S.clamp(min=1)
        fits_S = stored.sums(key_N | error_N) <= self.coverage * length_S
        fits_N = stored.spread(fits_S)
        key_N, error_N = key_N & fits_N, error_N & fits_N
        inside_N = _float(key_N | error_N, stored)
        now, most = self.weight.value(stored.step), self.weight.bounds[1]
        a_N = 1 - inside_N * (now / most)
        return Routed(a_N, inside_N * now / stored.spread(length_S), error_N)
