"""The advantage of a sample from the rewards of its group. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.losses.registry import Kind, Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Reward(Kind):
    """The advantage of each sample of a round."""

    uses_rewards: ClassVar[bool] = True

    @property
    def threshold(self) -> float | None:
        """The least reward of a correct sample."""
        return None

    @property
    def drops_equal_groups(self) -> bool:
        """Whether groups whose rewards are all equal are left out of the loss and of its denominator."""
        return False

    def advantages(self, rewards_S: NDArray[np.float64], group_S: NDArray[np.int64]) -> NDArray[np.float64]:
        """A of each sample of a round, from all rewards (NaN: not judged) and the groups they belong to."""
        return np.zeros(len(rewards_S))


REWARDS: Registry[Reward] = Registry("reward")
register = REWARDS.register


@register
class NoReward(Reward):
    """No reward: the advantage is what `add` gives."""

    kind: Literal["none"] = "none"
    equation = "A = 0"
    paper = ""
    uses_rewards = False


@register
class GroupReward(Reward):
    """The reward relative to the group of samples of one prompt and round (GRPO, 2402.03300); statistics are over all judged
    samples of the group, before routing and masks.

    A sample without a verdict is in no statistic and has A = 0, and so has a group whose rewards are all equal. DAPO (2503.14476)
    leaves such groups out of the loss: `drop_equal_groups`. Leave-one-out: r - mean of the others' rewards."""

    kind: Literal["group"] = "group"
    equation = "A = r - mean(r of the group), or r - mean of the others; divided by (std + eps) with `std`"
    paper = "2402.03300"

    center: Literal["mean", "leave_one_out"] = Field("mean", description="what is subtracted from a reward")
    std: bool = Field(True, description="divide by the standard deviation of the group (ddof 1)")
    eps: float = Field(1e-6, gt=0, description="added to the standard deviation")
    drop_equal_groups: bool = Field(
        False, description="leave groups whose rewards are all equal out of the loss and of its denominator"
    )
    success_threshold: float | None = Field(
        None,
        description="a sample is correct if its reward is at least this; for routes and weights that ask whether it is",
    )

    @property
    def threshold(self) -> float | None:
        return self.success_threshold

    @property
    def drops_equal_groups(self) -> bool:
        return self.drop_equal_groups

    @model_validator(mode="after")
    def _one_scale(self) -> GroupReward:
        if self.center == "leave_one_out" and self.std:
            raise ValueError(
                "std: with center: leave_one_out the advantage is r - mean of the others, undivided (its expectation is then the"
                " gradient of the mean reward); set std: false"
            )
        return self

    def advantages(self, rewards_S: NDArray[np.float64], group_S: NDArray[np.int64]) -> NDArray[np.float64]:
        counts, mean = _means(rewards_S, group_S)
        centred = np.where(np.isnan(rewards_S), 0.0, rewards_S - mean[group_S])
        n = counts[group_S]
        if self.center == "leave_one_out":
            centred = centred * n / np.maximum(n - 1, 1)
        elif self.std:
            squares = np.bincount(group_S, centred**2, minlength=len(counts))
            deviation = np.sqrt(squares / np.maximum(counts - 1, 1))
            centred = centred / (deviation[group_S] + self.eps)
        return np.where(all_equal(rewards_S, group_S), 0.0, centred)


def _means(
    values_S: NDArray[np.float64], group_S: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(judged samples, mean of their values) of each group; 0 without any."""
    judged = ~np.isnan(values_S)
    groups = int(group_S.max(initial=-1)) + 1
    counts = np.bincount(group_S[judged], minlength=groups).astype(np.float64)
    sums = np.bincount(group_S[judged], values_S[judged], minlength=groups)
    return counts, sums / np.maximum(counts, 1)


def all_equal(rewards_S: NDArray[np.float64], group_S: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all judged rewards of each sample's group are equal, as they are (also of a group without any)."""
    judged = ~np.isnan(rewards_S)
    groups = int(group_S.max(initial=-1)) + 1
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, group_S[judged], rewards_S[judged])
    np.maximum.at(high, group_S[judged], rewards_S[judged])
    return np.asarray(low >= high)[group_S]


def success(
    correct_S: NDArray[np.bool_], judged_S: NDArray[np.bool_], group_S: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Share of correct samples among the judged ones of each sample's group; NaN without any."""
    counts, mean = _means(np.where(judged_S, correct_S.astype(np.float64), np.nan), group_S)
    return np.where(counts > 0, mean, np.nan)[group_S]
