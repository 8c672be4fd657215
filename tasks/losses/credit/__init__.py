"""Credits: how much each token is pushed up or down. One registered class per file of this package.

A credit is its own configuration and a function from `CreditContext` to the terms of

    a PPO(rho, A) + b w D(p, q),  A = m A_r + delta

per token. PPO(rho, A) = -min(rho A, clip(rho) A), A_r is an advantage from rewards, delta one from student and teacher, D the
divergence of `Credit.side`. The policy-gradient objective computes the expression; a credit gives its factors. To add a
credit, add a file to this package (or to a plugin):

    @register
    class Mine(Credit):
        kind: Literal["mine"] = "mine"
        equation = "..."
        paper = "..."

        def __call__(self, context: CreditContext) -> CreditTerms: ...

Torch is not imported: the methods use those of the tensors that they are given.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from tasks.losses.divergences import Divergence
from tasks.losses.needs import CreditNeeds
from tasks.losses.registry import Kind, Registry
from tasks.losses.trust_regions import SideTerm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CreditContext:
    """What a credit may depend on. All tensors are detached, finite, and harmless where masked.

    Log-probabilities are those of the tokens that have an advantage: the sampled token [N], or the candidates of
    `support: student_topk` [N, K]. What only `CreditNeeds` asks for is null otherwise."""

    divergence: Divergence
    """the objective's"""
    log_u: Tensor
    """log u as the advantage uses it: live or at the rollout (`advantage_at`), reshaped by the trust region, clipped"""
    log_p_live: Tensor
    """log p(y) of the live student"""
    log_p_rollout: Tensor
    """log p_old(y), of the student that wrote the rollouts, scored at temperature 1"""
    log_q: Tensor
    """log q(y) of the teacher"""
    mask_N: Tensor
    """1 where the token counts, 0 where it does not"""
    sample_N: Tensor
    """index of the token's sample in the optimizer step"""
    position_N: Tensor
    """index of the token in its completion"""
    segment_N: Tensor | None = None
    """index of the token's segment in its completion; `CreditNeeds.segment_ends`"""
    teacher_entropy_N: Tensor | None = None
    """nats, over the vocabulary"""
    student_entropy_N: Tensor | None = None
    """the same of the student at the rollout"""
    reward_N: Tensor | None = None
    """reward of the token's sample, NaN where its judge failed (its advantage is then 0); `CreditNeeds.reward`"""
    group_N: Tensor | None = None
    """index of the sample's prompt in the round; `CreditNeeds.groups`"""
    group_rewards_NG: Tensor | None = None
    """rewards of all samples of that prompt in the round, its own among them; NaN where a judge failed, and padded with NaN on
    the right. A micro-batch holds only some of them, so a statistic of a group must come from here; needs `reward` and
    `groups`."""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    """numbers per token of the signals that `CreditNeeds.signals` adds: `<signal>_<column>`"""

    @property
    def log_u_live(self) -> Tensor:
        """log q(y) - log p(y) of the live student, as it is."""
        return self.log_q - self.log_p_live

    @property
    def log_u_rollout(self) -> Tensor:
        """log q(y) - log p_old(y), as it is."""
        return self.log_q - self.log_p_rollout


@dataclass(frozen=True, kw_only=True)
class CreditTerms:
    """The factors of `a PPO(rho, m A_r + delta) + b w D`; see the package. Each has the shape of `CreditContext.log_u`; b and w
    are [N]. Null: A_r = delta = b = 0, m = a = w = 1."""

    delta: Tensor | None = None
    A_r: Tensor | None = None
    m: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    w: Tensor | None = None

    def advantage(self, center: float) -> Tensor:
        """A = m A_r + delta - center; `center` counts only where there is a delta. ValueError without delta and A_r."""
        delta = None if self.delta is None else self.delta - center
        if self.A_r is None:
            if delta is None:
                raise ValueError("CreditTerms: give delta, A_r, or both")
            return delta
        rewarded = self.A_r if self.m is None else self.m * self.A_r
        return rewarded if delta is None else rewarded + delta


class Credit(Kind):
    """How much each token is pushed up or down."""

    exact_samples: ClassVar[bool] = False
    """whether it is derived for exact samples of the student, which no importance weight stands in for"""
    sampled_only: ClassVar[bool] = True
    """whether it is defined for the sampled token alone, not for a list of candidates"""
    tokenwise: ClassVar[bool] = False
    """whether a token's factors depend on no other token, not even of its sample: the head's gradient is then formed with its
    logits, which takes less time and memory"""

    @property
    def needs(self) -> CreditNeeds:
        """What must be in `CreditContext` beside log-probabilities and positions."""
        return CreditNeeds()

    @property
    def side(self) -> SideTerm | None:
        """D of the expression, if b is not 0: a divergence over the teacher's top K."""
        return None

    def delta_at_one(self, divergence: Divergence) -> float:
        """delta where student and teacher agree (u = 1): what `center: true` subtracts."""
        return 0.0

    def growth(self, divergence: Divergence) -> float:
        """c such that |A| does not exceed e^(c x) by much, where |log u| <= x. Configs keep it in float32."""
        return divergence.advantage_growth

    def of(self, divergence: Divergence) -> str:
        """The equation for this divergence."""
        return self.configured

    def check(self, divergence: Divergence, *, listed: bool, baseline: bool, center: bool) -> None:
        """Raises ValueError, naming the field, for a combination that makes no sense.

        listed: the advantage is of a list of candidates; baseline: their mean advantage is subtracted."""
        if listed and (self.sampled_only or self.side is not None):
            raise ValueError(
                f"advantage: {self.kind} is defined for the sampled token, but support.kind is student_topk; use"
                " support.kind: sampled, or another advantage"
            )
        one = 0.0 if center else self.delta_at_one(divergence)
        if listed and not baseline and one != 0:
            raise ValueError(
                f"center: false gives every candidate the advantage {one:g} where student and teacher agree; over a list"
                " that is not the whole vocabulary this moves mass onto or off the list, regardless of the teacher; use"
                " center: true, or support.baseline: list"
            )

    @abstractmethod
    def __call__(self, context: CreditContext) -> CreditTerms:
        """The factors of each token, before centring. At least one of `delta` and `A_r` is given."""


CREDITS: Registry[Credit] = Registry("credit")
register = CREDITS.register

for _module in pkgutil.iter_modules(__path__):  # each registers what it holds
    importlib.import_module(f"{__name__}.{_module.name}")
