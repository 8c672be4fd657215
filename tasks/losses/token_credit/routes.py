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
    rest_N: Tensor | None = None
    """bool: where a reference penalty counts that leaves out what is distilled"""


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
    by_length: ClassVar[bool] = False
    """whether the divergence of a sample is divided by its completion's length and by the number of samples"""

    @property
    def equal_groups(self) -> bool:
        """Whether it sends samples of groups whose rewards are all equal to the divergence."""
        return False

    @abstractmethod
    def __call__(self, stored: Stored) -> Routed:
        """The factors of the tokens of a step."""


ROUTES: Registry[Route] = Registry("route")
register = ROUTES.register


def _float(flags_N: Tensor, stored: Stored) -> Tensor:
    return flags_N.to(stored.log_p_N.dtype)


@register
class Everywhere(Route):
    """The policy gradient at every token, the divergence where the teacher has what it reads."""

    kind: Literal["all"] = "all"
    equation = "a = 1, b = 1 where the teacher has a context"
    paper = ""

    def __call__(self, stored: Stored) -> Routed:
        b_N = _float(stored.spread(stored.context_S), stored)
        return Routed(b_N**0, b_N)


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

    A wrong sample of a group without a correct one has no advantage either: its group has no gradient, unless a context from
    `feedback` counts too. A sample without a reward is not routed."""

    kind: Literal["srpo"] = "srpo"
    equation = "z = (1 - correct) has_context 1[a correct sample in the group]; a = 1 - z, b = z"
    paper = "2604.02288"
    splits = True
    contexts = True
    success = True
    beside = True

    feedback: bool = Field(False, description="route wrong samples with a context of groups without a correct one too")

    @property
    def equal_groups(self) -> bool:
        return self.feedback

    def __call__(self, stored: Stored) -> Routed:
        assert stored.correct_S is not None and stored.judged_S is not None and stored.success_S is not None
        z_S = ~stored.correct_S & stored.judged_S & stored.context_S
        if not self.feedback:
            z_S = z_S & (stored.success_S > 0)
        z_N = _float(stored.spread(z_S), stored)
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

    threshold: float = Field(1.0, gt=0, le=1, description="groups whose share of correct samples is below this")

    @property
    def equal_groups(self) -> bool:
        return True

    def __call__(self, stored: Stored) -> Routed:
        assert stored.correct_S is not None and stored.judged_S is not None and stored.success_S is not None
        hard_S = stored.success_S < self.threshold  # not so of a group that nothing has judged
        failed_S = ~stored.correct_S & stored.judged_S & hard_S & stored.context_S
        b_N = _float(stored.spread(failed_S), stored)
        return Routed(b_N.new_ones(b_N.shape), b_N, rest_N=stored.spread(~hard_S))


@register
class Spans(Route):
    """TRACE (2605.10194): the divergence on key spans of correct samples, and on error spans of wrong ones where `errors`.

    A sample's sum is divided by its completion's length, and the sum over samples by their number; lambda falls.
    The policy gradient on the tokens of these spans grows as it does. A sample whose spans cover more than `coverage` of it
    has the policy gradient alone."""

    kind: Literal["spans"] = "spans"
    equation = "b = lambda N / (samples x length) on its spans; a = 1 - lambda / lambda_0 there, 1 elsewhere"
    paper = "2605.10194"
    experimental = True
    splits = True
    contexts = True
    success = True
    spans = True
    beside = True
    by_length = True

    weight: ScheduleField = Field(
        LinearSchedule(initial=0.5, final=0.0, steps=30, start=10), description="lambda, over optimizer steps"
    )
    coverage: float = Field(0.25, gt=0, le=1, description="largest share of a completion that its spans may cover")
    errors: bool = Field(False, description="the divergence on error spans of wrong samples too (`beside.on_errors`)")

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: ScheduleField) -> ScheduleField:
        if weight.bounds[0] < 0 or weight.bounds[1] <= 0:
            raise ValueError(f"weight: lambda must not be negative, nor always 0; it lies in {list(weight.bounds)}")
        return weight

    @property
    def equal_groups(self) -> bool:
        return True

    def __call__(self, stored: Stored) -> Routed:
        assert stored.correct_S is not None and stored.judged_S is not None and stored.span_N is not None
        known_N = stored.spread(stored.judged_S & stored.context_S) & stored.written_N
        correct_N = stored.spread(stored.correct_S)
        key_N = (stored.span_N == KEY_SPAN) & correct_N & known_N
        error_N = (stored.span_N == ERROR_SPAN) & ~correct_N & known_N & self.errors
        length_S = stored.length_S.clamp(min=1)
        fits_S = stored.sums(key_N | error_N) <= self.coverage * length_S
        fits_N = stored.spread(fits_S)
        key_N, error_N = key_N & fits_N, error_N & fits_N
        inside_N = _float(key_N | error_N, stored)
        now, most = self.weight.value(stored.step), self.weight.bounds[1]
        a_N = 1 - inside_N * (now / most)
        return Routed(a_N, inside_N * now, error_N)
