"""The terms beside the policy gradient, as configs. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from storage.identity import Identity
from tasks.losses.axes import FullSupport, TopkSupport
from tasks.losses.divergences import DIVERGENCES, JSD, Divergence, ForwardKL, ReverseKL, refuse_overflow
from tasks.losses.token_credit.targets import TARGETS, Target, Teacher
from tasks.losses.token_credit.weights import DIVERGENCE_WEIGHTS, DivergenceWeight, Unweighted

if TYPE_CHECKING:
    DivergenceField = Divergence
    TargetField = Target
    WeightField = DivergenceWeight
else:
    DivergenceField = DIVERGENCES.annotation()
    TargetField = TARGETS.annotation()
    WeightField = DIVERGENCE_WEIGHTS.annotation()


class SequenceGradient(Identity):
    """What a token does to the divergence at later positions: + sg(sum_{s>t} gamma^(s-t) b_s w_s D_s) log p(y_t).

    With gamma 1 and a sum over tokens this makes the gradient that of the expected sum over the completion; gamma < 1 is biased.
    DistIL (2606.05152) is the cross-entropy with it; its paper's estimator is not known from summaries."""

    equation: ClassVar[str] = "+ sg(sum_{s>t} gamma^(s-t) b_s w_s D_s) log p(y_t)"
    paper: ClassVar[str] = "2606.05152"
    experimental: ClassVar[bool] = True

    gamma: float = Field(1.0, gt=0, le=1, description="discount per token")


class Beside(Identity):
    """The divergence beside the policy gradient, of a target and the student over a support."""

    equation: ClassVar[str] = "b w c coef D(q', p), c = min(is_clip, sg rho)"
    paper: ClassVar[str] = "2601.20802"

    divergence: DivergenceField = Field(JSD(beta=0.5), description="D, of the target and the student")
    support: Annotated[TopkSupport | FullSupport, Field(discriminator="kind")] = Field(
        TopkSupport(kind="student_topk", k=100, outside="bucket"), description="ids on which the two are compared"
    )
    target: TargetField = Field(Teacher(), description="what the student is compared with")
    weight: WeightField = Field(Unweighted(), description="w: how much each routed token counts")
    coef: float = Field(1.0, gt=0, description="factor of the divergence")
    is_clip: float | None = Field(None, gt=0, description="c = min(this, sg rho); null: c = 1")
    term_clip: float | None = Field(
        None,
        gt=0,
        description="each category's term, the tail's too, is at most this; for forward and reverse KL, and may make the sum"
        " negative",
    )
    cross_entropy: bool = Field(
        False,
        description="forward KL without its entropy: -sum q' log p. Same gradient at the token, another sequence_gradient",
    )
    on_errors: DivergenceField | None = Field(
        None, description="D on the error spans of `route: spans`; null: the same"
    )
    student_temperature: float = Field(1.0, gt=0, description="temperature of p in D")
    teacher_temperature: float = Field(1.0, gt=0, description="temperature of q in D")
    sequence_gradient: SequenceGradient | None = Field(
        None,
        description="count what a token does to the divergence at later positions; null: positions are independent",
    )
    logprob_min: float = Field(
        -40.0, lt=0, ge=-80, description="floor of log p and log q per category; no gradient below it"
    )
    tail_logmass_min: float = Field(-30.0, lt=0, ge=-80, description="floor of the bucket's log-mass, of both")

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """Those that it computes."""
        return (self.divergence,) if self.on_errors is None else (self.divergence, self.on_errors)

    @property
    def temperate(self) -> bool:
        """Whether both temperatures are 1."""
        return self.student_temperature == self.teacher_temperature == 1.0

    @model_validator(mode="after")
    def _sensible(self) -> Beside:
        support, outside = self.support, self.support.outside
        if support.kind in ("teacher_topk", "student_topk") and support.k == 1 and outside == "renormalize":
            raise ValueError(
                "support.k: one renormalised category is 1 in both distributions, so loss and gradient are identically zero;"
                " use outside: bucket, or a larger k"
            )
        if outside == "drop":
            raise ValueError(
                "support.outside: `drop` is no divergence, and its sum can become negative as the student moves its mass off"
                " the support; use bucket or renormalize"
            )
        if outside == "bucket" and not self.target.of_tail:
            raise ValueError(
                f"support.outside: with target {self.target.kind} the tail is not the product of the tails, so it is unknown; use"
                " outside: renormalize, or support kind full"
            )
        if outside == "bucket" and not self.temperate:
            raise ValueError(
                "student_temperature, teacher_temperature: at a temperature other than 1 the mass outside the list is unknown;"
                " use outside: renormalize, or support kind full"
            )
        if self.term_clip is not None and not all(isinstance(d, ForwardKL | ReverseKL) for d in self.divergences):
            raise ValueError(
                f"term_clip: bounds the terms of forward_kl or reverse_kl, whose single terms are log-ratios, and the divergence"
                f" is {self.divergence.kind}; leave it out"
            )
        tail = {"tail_logmass_min": self.tail_logmass_min} if outside == "bucket" else {}
        for divergence in self.divergences:
            refuse_overflow(divergence, logprob_min=self.logprob_min, **tail)
        if self.cross_entropy and not isinstance(self.divergence, ForwardKL):
            raise ValueError(
                f"cross_entropy: is forward_kl without the target's entropy, and the divergence is {self.divergence.kind}"
            )
        return self


class Clip(Identity):
    """The clip of the ratio of live to rollout-time student, as PPO's; DAPO (2503.14476) has 0.2 below and 0.28 above."""

    equation: ClassVar[str] = "PPO(rho, A) = -min(rho A, clip(rho, 1-low, 1+high) A), where A < 0 at most dual |A|"
    paper: ClassVar[str] = "2503.14476"

    low: float = Field(0.2, gt=0, le=1, description="rho is clipped from below to 1 - this")
    high: float = Field(0.2, gt=0, description="rho is clipped from above to 1 + this")
    dual: float | None = Field(
        3.0, gt=1, description="the loss of a negative advantage is at most this x |A|; null for none"
    )


class Likelihood(Identity):
    """SDAR (2605.15155): tokens that the teacher prefers are made likelier, by a gate of its log-ratio; p is live."""

    equation: ClassVar[str] = "coef sg(sigmoid(slope d)) (log q(y) - log p(y))"
    paper: ClassVar[str] = "2605.15155"

    coef: float = Field(0.1, gt=0, description="factor of the term")
    slope: float = Field(5.0, gt=0, description="slope of the gate: sigmoid(slope d)")


class Reference(Identity):
    """A penalty for leaving a reference model, which is the run's teacher or the student that wrote the rollouts.

    `k3`: exp(r) - r - 1 with r = log p_ref(y) - log p(y), the estimate of KL(p || p_ref) that GRPO has. `squared`: r^2 / 2 (SDPG,
    2606.04036). `to: teacher` is the initial student where the run's teacher is that, and reads its context."""

    equation: ClassVar[str] = "coef (e^r - r - 1), or coef r^2 / 2; r = log p_ref(y) - log p(y)"
    paper: ClassVar[str] = "2402.03300"

    kind: Literal["k3", "squared"] = Field("k3", description="form of the penalty")
    coef: float = Field(1e-2, gt=0, description="factor of the penalty")
    to: Literal["teacher", "rollout"] = Field("teacher", description="the reference model")
    where: Literal["all", "unrouted"] = Field(
        "all", description="all tokens, or those where the divergence does not count"
    )
