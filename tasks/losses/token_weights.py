"""Weights of tokens in the loss: one registered class each, which is its own configuration.

Weights are detached and multiply the per-token loss; the denominator stays the number of tokens, so that a token's
weight depends on no other token, and not on how a step is split into micro-batches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.losses.needs import SignalNeed
from tasks.losses.registry import Kind, Registry

if TYPE_CHECKING:
    from torch import Tensor


SMALLEST = 1e-12
"""Floor of the divergence: smaller values are below the resolution of float32."""


@dataclass(frozen=True)
class Weighable:
    """What a token's weight may depend on: detached, finite, harmless where masked."""

    position_N: Tensor
    """index of the token in its completion, floating"""
    divergence_N: Tensor
    """the divergence at the position: the direct loss itself, or where only the sampled token is known the estimate
    u - 1 - log u of the reverse KL (non-negative, unbiased under exact sampling)"""
    teacher_entropy_N: Tensor | None
    """nats"""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    """numbers of the signals that the weight wants: `<signal>_<column>`"""


class TokenWeight(Kind):
    """A non-negative weight per token."""

    needs: ClassVar[tuple[SignalNeed, ...]] = ()
    """Signals that the weight depends on, beside those of the objective: numbers per token, so without k."""

    @abstractmethod
    def __call__(self, tokens: Weighable) -> Tensor | None:
        """The weights, or null: 1 everywhere."""


TOKEN_WEIGHTS: Registry[TokenWeight] = Registry("token weight")
register = TOKEN_WEIGHTS.register


@register
class Unweighted(TokenWeight):
    """Every token counts the same."""

    kind: Literal["none"] = "none"
    equation = "1"
    paper = ""

    def __call__(self, tokens: Weighable) -> Tensor | None:
        return None


@register
class TeacherEntropyWeight(TokenWeight):
    """Weights by the teacher's entropy: lower where it is uncertain (slope < 0), or higher (slope > 0)."""

    kind: Literal["teacher_entropy"] = "teacher_entropy"
    slope: float = Field(-1.0, ge=-20, le=20, description="change of the log-weight per nat of entropy")
    largest: float = Field(4.0, ge=1, description="weights lie between 1 / this and this")
    equation = "exp(slope H(q)), within [1/largest, largest]"
    paper = ""
    experimental = True

    def __call__(self, tokens: Weighable) -> Tensor:
        assert tokens.teacher_entropy_N is not None
        bound = math.log(self.largest)
        return (self.slope * tokens.teacher_entropy_N).clamp(-bound, bound).exp()


@register
class PositionWeight(TokenWeight):
    """Weights that halve every `half_life` tokens: the longer the student's own prefix, the less reliable the teacher."""

    kind: Literal["position"] = "position"
    half_life: float = Field(256.0, gt=0, description="tokens after which a weight has halved")
    least: float = Field(0.1, ge=0, le=1, description="no weight is below this")
    equation = "max(least, 2^(-t / half_life))"
    paper = ""
    experimental = True

    def __call__(self, tokens: Weighable) -> Tensor:
        return (tokens.position_N * (-math.log(2) / self.half_life)).exp().clamp(min=self.least)


@register
class DivergenceWeight(TokenWeight):
    """Weights by the divergence at the token: higher where it is large (power > 0), or lower (power < 0)."""

    kind: Literal["divergence"] = "divergence"
    scale: float = Field(1.0, gt=0, description="divergence, in nats, at which the weight is 1")
    power: float = Field(0.5, ge=-4, le=4, description="growth of the weight with the divergence")
    largest: float = Field(4.0, ge=1, description="weights lie between 1 / this and this")
    equation = "(D_t / scale)^power, within [1/largest, largest]"
    paper = ""
    experimental = True

    def __call__(self, tokens: Weighable) -> Tensor:
        bound = math.log(self.largest)
        return ((tokens.divergence_N.clamp(min=SMALLEST) / self.scale).log() * self.power).clamp(-bound, bound).exp()
