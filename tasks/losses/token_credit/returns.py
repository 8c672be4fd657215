"""Returns: how what is added at later tokens counts for a token. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.losses.registry import Kind, Registry
from tasks.losses.token_credit.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor


class Return(Kind):
    """The return of each token, from what is added at each."""

    groups: ClassVar[bool] = False
    """whether it has statistics of all samples of a prompt in the round"""

    @abstractmethod
    def __call__(self, values_N: Tensor, stored: Stored) -> Tensor:
        """R [N]; `values_N` are 0 where they are not known. Later tokens count where the student wrote them."""

    def normalise(self, returns_N: Tensor, mask_N: Tensor, group_N: Tensor) -> Tensor:
        """The returns relative to those of the group; `mask_N`: the tokens that count in it."""
        return returns_N


def discounted(values_T: Tensor, gamma: float) -> Tensor:
    """sum_{s>=t} gamma^(s-t) of the values along the last axis, in log2(T) additions."""
    found, shift = values_T, 1
    while shift < values_T.shape[-1]:
        later = found[..., shift:] * gamma**shift
        found = found.clone()
        found[..., :-shift] += later
        shift *= 2
    return found


RETURNS: Registry[Return] = Registry("return")
register = RETURNS.register


@register
class TokenReturn(Return):
    """A token's own value alone (discount 0)."""

    kind: Literal["token"] = "token"
    equation = "R_t = r_t"
    paper = ""

    def __call__(self, values_N: Tensor, stored: Stored) -> Tensor:
        return values_N


@register
class Discounted(Return):
    """The discounted sum over the rest of the completion; gamma 1 is unbiased for the sequence's reverse KL."""

    kind: Literal["discounted"] = "discounted"
    equation = "R_t = sum_{s>=t} gamma^(s-t) r_s"
    paper = ""
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token")

    def __call__(self, values_N: Tensor, stored: Stored) -> Tensor:
        found = values_N.clone()
        for rows in stored.each():
            found[rows] = discounted(values_N[rows], self.gamma)
        return found


@register
class MeanFuture(Return):
    """TOP-D's return (2607.04751): a token's own value and the mean of the later ones; the mean of nothing is 0.

    `standardise`: relative to mean and standard deviation (ddof 1) over the scored tokens of all samples of the prompt in the
    round."""

    kind: Literal["mean_future"] = "mean_future"
    equation = "R_t = r_t + mean of r_s, s > t"
    paper = "2607.04751"
    experimental = True
    standardise: bool = Field(True, description="(R - mean) / (std + eps) over the group's tokens")
    eps: float = Field(1e-6, gt=0, description="added to the standard deviation")

    @property
    def groups(self) -> bool:  # type: ignore[override]
        return self.standardise

    def __call__(self, values_N: Tensor, stored: Stored) -> Tensor:
        found = values_N.clone()
        for rows in stored.each():
            values, written = values_N[rows], stored.written_N[rows].to(values_N.dtype)
            later = (values.flip(0).cumsum(0) - values.flip(0)).flip(0)
            count = (written.flip(0).cumsum(0) - written.flip(0)).flip(0)
            found[rows] = values + later / count.clamp(min=1)
        return found

    def normalise(self, returns_N: Tensor, mask_N: Tensor, group_N: Tensor) -> Tensor:
        if not self.standardise:
            return returns_N
        groups = int(group_N.max()) + 1 if len(group_N) else 0
        inside = mask_N.to(returns_N.dtype)

        def sums(values_N: Tensor) -> Tensor:
            return returns_N.new_zeros(groups).index_add_(0, group_N, values_N * inside)

        count = sums(inside)
        mean = sums(returns_N) / count.clamp(min=1)
        centred = returns_N - mean[group_N]
        deviation = (sums(centred**2) / (count - 1).clamp(min=1)).sqrt()
        return (centred / (deviation[group_N] + self.eps)).masked_fill((count < 2)[group_N], 0)
