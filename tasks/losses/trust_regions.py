"""Trust regions of the policy gradient: treatment of tokens on which the ratio of teacher to student is unreliable.

One registered class each, which is its own configuration (torch-free: the methods use the tensors they are given). A
region acts in up to three places and overrides what it needs:

    log u ─ reshape ─► advantage ─ bound ─► trusted x policy gradient + outlier x side term - likelihood x log p(y)
                                            └─────────────── weigh gives the three weights ──────────────┘
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tasks.losses.divergences import Divergence, ForwardKL
from tasks.losses.registry import Kind, Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What the weights of the terms may depend on, per token; detached, and harmless where masked."""

    log_u_rollout_N: Tensor
    """log q(y) - log p_old(y)"""
    log_u_live_N: Tensor
    """log q(y) - log p(y)"""
    teacher_entropy_N: Tensor | None
    uniform_N: Tensor | None
    """uniform draws in [0, 1), counter-based: a pure function of (seed, sample id, position)"""
    teacher_prefix_N: Tensor | None
    """1 where the teacher wrote the token"""


@dataclass(frozen=True)
class TermWeights:
    """Weights of the three terms, per token; null where a term is absent. `outside_N`, in [0, 1], says how much of a
    token lies outside the trust region: the metric `outlier_fraction`."""

    trusted_N: Tensor
    outside_N: Tensor
    outlier_N: Tensor | None = None
    likelihood_N: Tensor | None = None


@dataclass(frozen=True)
class SideTerm:
    """A divergence over the teacher's top K, beside the policy gradient."""

    divergence: Divergence
    k: int
    outside: Literal["renormalize", "bucket", "drop"]
    logprob_min: float


class TrustRegion(Kind):
    """How a token counts, given the ratio of teacher to student."""

    sampled_only: ClassVar[bool] = True
    """whether it makes sense for the sampled token alone, not for a list of candidates"""

    @property
    def side(self) -> SideTerm | None:
        """The divergence beside the policy gradient, if any."""
        return None

    @property
    def draws(self) -> bool:
        """Whether its weights depend on `uniform_N`."""
        return False

    @property
    def takes_prefixes(self) -> bool:
        """Whether it has a term of its own for tokens that the teacher wrote; they are then left to it, not masked."""
        return False

    def reshape(self, log_u: Tensor) -> Tensor:
        """log u as the advantage sees it, elementwise."""
        return log_u

    def weigh(self, evidence: Evidence) -> TermWeights | None:
        """Weights of the terms; null: the policy gradient alone, everywhere."""
        return None

    def bound(self, advantage: Tensor, weights: TermWeights | None) -> Tensor:
        """The advantage as it is used, elementwise."""
        return advantage


TRUST_REGIONS: Registry[TrustRegion] = Registry("trust region")
register = TRUST_REGIONS.register


@register
class NoTrustRegion(TrustRegion):
    """No trust region: every token has its policy gradient."""

    kind: Literal["none"] = "none"
    equation = "-A rho"
    paper = ""
    sampled_only = False


@register
class TrOPD(TrustRegion):
    """Trust a token with the probability that the teacher accepts it, and treat the others apart; TrOPD, 2606.01249.

    P_trust = min(u, 1), u = q(y) / p(y), of the rollout-time student or of the live one (`gate_at`). Trusted tokens get
    the policy gradient. Outliers get, by `outliers`: `forward_kl`, the unnormalised forward KL over the teacher's top k;
    `mask`, nothing; `clip`, the policy gradient with A = max(A, clip_at). Tokens of a teacher's prefix get
    -prefix_beta log p(y) and nothing else.

    `gate: bernoulli` draws M once per token, from a counter-based generator keyed by (seed, sample id, position);
    `gate: expected` (ours) weights by P_trust and 1 - P_trust: the same in expectation without the draw's variance. For y
    drawn from p, E[M] = 1 - TV(p, q). Where the student has no mass on the teacher's list forward KL diverges (the
    paper says that the term vanishes): `logprob_min` bounds it."""

    kind: Literal["tropd"] = "tropd"
    gate: Literal["bernoulli", "expected"] = Field(
        "bernoulli", description="draw whether a token is trusted, or weight it by the probability"
    )
    gate_at: Literal["rollout", "live"] = Field(
        "rollout", description="which student's log-probabilities define P_trust"
    )
    outliers: Literal["forward_kl", "mask", "clip"] = Field("forward_kl", description="the loss of untrusted tokens")
    k: int = Field(64, ge=1, description="teacher's candidates for the forward KL of outliers")
    clip_at: float = Field(-1.0, lt=0, description="least advantage of an untrusted token, for `outliers: clip`")
    prefix_beta: float = Field(0.001, ge=0, description="weight of -log p(y) on tokens that the teacher wrote")
    logprob_min: float = Field(-40.0, lt=0, ge=-80, description="floor of log p and log q in the forward KL")
    equation = (
        "M (-A rho) + (1-M) O, M ~ Bernoulli(min(q(y)/p(y), 1)) or its mean;"
        " O = sum_{v in top-k} q log(q/p), or 0, or -max(A, clip_at) rho"
    )
    paper = "2606.01249"

    @property
    def configured(self) -> str:
        trust = f"min(q(y)/{'p_old' if self.gate_at == 'rollout' else 'p'}(y), 1)"
        gate = f"M ~ Bernoulli({trust})" if self.gate == "bernoulli" else f"M = {trust}"
        outlier = {
            "forward_kl": " + (1-M) sum_{v in top-k} q log(q/p)",
            "mask": "",
            "clip": " + (1-M) (-max(A, clip_at) rho)",
        }[self.outliers]
        return f"M (-A rho){outlier}, {gate}"

    @property
    def side(self) -> SideTerm | None:
        if self.outliers != "forward_kl":
            return None
        return SideTerm(ForwardKL(), self.k, "drop", self.logprob_min)

    @property
    def draws(self) -> bool:
        return self.gate == "bernoulli"

    @property
    def takes_prefixes(self) -> bool:
        return True

    def weigh(self, evidence: Evidence) -> TermWeights:
        log_u = evidence.log_u_rollout_N if self.gate_at == "rollout" else evidence.log_u_live_N
        trust = log_u.clamp(max=0).exp()
        if self.gate == "bernoulli":
            assert evidence.uniform_N is not None
            trust = (evidence.uniform_N < trust).to(trust.dtype)
        prefix = trust.new_zeros(trust.shape)
        if evidence.teacher_prefix_N is not None:
            prefix = evidence.teacher_prefix_N.to(trust.dtype)
        own = 1 - prefix
        outside = own * (1 - trust)
        return TermWeights(
            trusted_N=own if self.outliers == "clip" else own * trust,
            outside_N=outside,
            outlier_N=outside if self.outliers == "forward_kl" else None,
            likelihood_N=self.prefix_beta * prefix,
        )

    def bound(self, advantage: Tensor, weights: TermWeights | None) -> Tensor:
        if self.outliers != "clip" or weights is None:
            return advantage
        return advantage.lerp(advantage.clamp(min=self.clip_at), weights.outside_N.to(advantage.dtype))


@register
class ProximalTeacher(TrustRegion):
    """Learn from a mixture of teacher and student instead of the teacher itself; TOP-D, 2607.04751.

    The target is q' = alpha q + (1 - alpha) p with p held constant, so u' = alpha u + 1 - alpha. With reverse KL
    A = log(alpha u + 1 - alpha), which is never below log(1 - alpha). This is TOP-D's reward alone: its mean over later
    tokens and its normalisation within a prompt's group are not used."""

    kind: Literal["proximal_teacher"] = "proximal_teacher"
    alpha: float = Field(0.2, gt=0, lt=1, description="share of the teacher in the target")
    equation = "A of u' = alpha u + 1 - alpha; reverse KL: A = log(alpha u + 1 - alpha) >= log(1 - alpha)"
    paper = "2607.04751"
    experimental = True
    sampled_only = False

    def reshape(self, log_u: Tensor) -> Tensor:
        keep = log_u.new_full((), math.log1p(-self.alpha))
        return (log_u + math.log(self.alpha)).logaddexp(keep)


@register
class AdvantageFloor(TrustRegion):
    """Advantages have a floor; REOPOLD, 2603.11137.

    Copies of the paper disagree on how the floor follows from lambda (log(l / (1-l)) or log(l) / (1-l)), so the floor
    itself is the field; the default is the former at lambda = 0.3. `below: mask` is its first phase, `clip` its second;
    the choice of tokens by student entropy in the second is not used."""

    kind: Literal["advantage_floor"] = "advantage_floor"
    floor: float = Field(-0.847, lt=0, description="least advantage, after centring")
    below: Literal["clip", "mask"] = Field("clip", description="tokens below it: raised to the floor, or without loss")
    equation = "A = max(A, floor); or A = 0 where A < floor"
    paper = "2603.11137"
    experimental = True
    sampled_only = False

    @property
    def configured(self) -> str:
        return "A = max(A, floor)" if self.below == "clip" else "A = 0 where A < floor"

    def bound(self, advantage: Tensor, weights: TermWeights | None) -> Tensor:
        if self.below == "mask":
            return advantage.masked_fill(advantage < self.floor, 0)
        return advantage.clamp(min=self.floor)


@register
class EntropyGate(TrustRegion):
    """Adds forward KL over the teacher's top k where the teacher's entropy is high; EOPD, 2603.07079.

    These tokens keep their policy gradient. By default the sum over the k candidates is unnormalised (`outside: drop`)."""

    kind: Literal["entropy_gate"] = "entropy_gate"
    threshold: float = Field(0.8, ge=0, description="teacher entropy, in nats, from which the term is added")
    k: int = Field(16, ge=1, description="teacher's candidates for the forward KL")
    weight: float = Field(1.0, gt=0, description="weight of the forward KL")
    outside: Literal["renormalize", "bucket", "drop"] = Field("drop", description="what lies outside the k candidates")
    logprob_min: float = Field(-40.0, lt=0, ge=-80, description="floor of log p and log q in the forward KL")
    equation = "-A rho + 1[H(q) >= threshold] weight sum_{v in top-k} q log(q/p)"
    paper = "2603.07079"
    experimental = True

    @property
    def configured(self) -> str:
        first, _, _ = self.equation.partition("sum")
        return (
            first
            + {
                "drop": "sum_{v in top-k} q log(q/p)",
                "renormalize": "sum_{v in top-k} q^ log(q^/p^)",
                "bucket": "sum_{v in top-k, rest} q log(q/p)",
            }[self.outside]
        )

    @model_validator(mode="after")
    def _sensible(self) -> EntropyGate:
        if self.k == 1 and self.outside == "renormalize":
            raise ValueError("k: one renormalised category is 1 in both distributions, so the term is identically zero")
        return self

    @property
    def side(self) -> SideTerm:
        return SideTerm(ForwardKL(), self.k, self.outside, self.logprob_min)

    def weigh(self, evidence: Evidence) -> TermWeights:
        entropy = evidence.teacher_entropy_N
        assert entropy is not None
        open_ = (entropy >= self.threshold).to(evidence.log_u_live_N.dtype)
        return TermWeights(open_.new_ones(open_.shape), open_, self.weight * open_)
