"""What a step's plan and a token's factors may depend on. Shapes: S samples of an optimizer step, N all their completion tokens,
also those that the loss mask leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KEY_SPAN, ERROR_SPAN = 1, 2
"""Values of `span_N`."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Stored values of an optimizer step's samples, of all ranks and micro-batches, sample after sample; float64, CPU.

    Numbers are finite where `valid_N` is false. What the objective does not need may be null."""

    step: int
    """optimizer steps done before, over the whole run"""
    sample_N: Tensor
    """index of the token's sample in the step"""
    position_N: Tensor
    counted_N: Tensor
    """bool: the loss mask k"""
    written_N: Tensor
    """bool: the student wrote it"""
    valid_N: Tensor
    """bool: its numbers are valid"""
    log_p_N: Tensor
    """log p_old(y) of the student that wrote the rollouts"""
    log_q_N: Tensor
    """log q(y) of the teacher"""
    teacher_entropy_N: Tensor | None = None
    student_entropy_N: Tensor | None = None
    segment_N: Tensor | None = None
    """index of the token's segment in its completion"""
    span_N: Tensor | None = None
    """0, KEY_SPAN or ERROR_SPAN"""
    advantage_S: Tensor | None = None
    """A of the sample, from the rewards of its group"""
    correct_S: Tensor | None = None
    """bool: the reward reaches the threshold; false without a reward"""
    judged_S: Tensor | None = None
    """bool: it has a reward"""
    success_S: Tensor | None = None
    """share of correct samples among the judged ones of its group; NaN without any"""
    equal_S: Tensor | None = None
    """bool: all rewards of its group are equal"""
    context_S: Tensor
    """bool: the teacher reads a context of its own"""
    remembered: float | None = None
    """the number that a choice with a memory gives this step"""
    ended_S: Tensor | None = None
    """bool: the completion ends with a stop token"""

    @property
    def scored_N(self) -> Tensor:
        """bool: written, valid, and its sample has the context that the teacher needs: where d is known."""
        return self.written_N & self.valid_N & self.spread(self.context_S)

    @property
    def d_N(self) -> Tensor:
        """log q(y) - log p_old(y), 0 where it is not known."""
        return (self.log_q_N - self.log_p_N).masked_fill(~self.scored_N, 0)

    @property
    def length_S(self) -> Tensor:
        """Tokens of each completion."""
        return self.sums(self.counted_N | True)

    def sums(self, values_N: Tensor) -> Tensor:
        """Sums over each sample's tokens [S]."""
        values = values_N.to(self.log_p_N.dtype)
        return values.new_zeros(len(self.context_S)).index_add_(0, self.sample_N, values)

    def spread(self, values_S: Tensor) -> Tensor:
        """Each token's sample's value [N]."""
        return values_S[self.sample_N]

    def each(self) -> list[slice]:
        """The tokens of each sample, in order."""
        counts = self.sample_N.bincount(minlength=len(self.context_S)).tolist()
        found, start = [], 0
        for count in counts:
            found.append(slice(start, start + count))
            start += count
        return found


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Two distributions on a list of ids per token, normalised over the vocabulary; detached."""

    log_p_NK: Tensor
    log_q_NK: Tensor
    listed_NK: Tensor
    holds_token_N: Tensor
    """bool: the sampled token is on the list"""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the advantage of tokens may depend on: detached, finite, harmless where they do not count.

    p is the live student or the one that wrote the rollouts, as `advantage_at` has it."""

    log_p_N: Tensor
    log_q_N: Tensor
    d_N: Tensor
    """log q(y) - log p(y), clipped; 0 where the teacher's value is not known"""
    advantage_N: Tensor
    """A of the token's sample; 0 without rewards"""
    planned: Mapping[str, Tensor] = field(default_factory=dict)
    """numbers per token that the step's plan has computed for this choice"""
    listed: Listed | None = None
    """where the choice asks for `lists`: both distributions on the support, over the vocabulary"""
