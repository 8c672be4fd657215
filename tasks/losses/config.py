"""The `objective:` section of a config: one choice on each axis. Combinations that make no sense are refused with the
reason. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from storage.identity import Identity, by_kind, omit_at
from tasks.losses.axes import FullSupport, Normalised, SampledToken, StudentCandidates, TopkSupport
from tasks.losses.credit import CREDITS, Credit
from tasks.losses.credit.opd_plus import OpdPlus
from tasks.losses.divergences import (
    DIVERGENCES,
    LARGEST_EXPONENT,
    Divergence,
    ReverseKL,
    fields_of,
    refuse_overflow,
    tenths,
)
from tasks.losses.needs import Needs, SignalNeed, StudentRequest, everything
from tasks.losses.token_credit.config import CreditConfig
from tasks.losses.token_weights import TOKEN_WEIGHTS, TokenWeight, Unweighted
from tasks.losses.trust_regions import TRUST_REGIONS, NoTrustRegion, TrustRegion

__all__ = [
    "CreditConfig",
    "DirectConfig",
    "FullSupport",
    "Needs",
    "ObjectiveConfig",
    "PairsConfig",
    "PolicyGradientConfig",
    "SampledToken",
    "SftConfig",
    "SignalNeed",
    "StudentCandidates",
    "StudentRequest",
    "TopkSupport",
]

if TYPE_CHECKING:
    CreditField = Credit
    DivergenceField = Divergence
    TrustRegionField = TrustRegion
    TokenWeightField = TokenWeight
else:
    CreditField = CREDITS.annotation(names=True)
    DivergenceField = DIVERGENCES.annotation()
    TrustRegionField = TRUST_REGIONS.annotation()
    TokenWeightField = TOKEN_WEIGHTS.annotation()


class Weighted(Normalised):
    """The token weight, a field of all objectives of distillation."""

    token_weight: TokenWeightField = Field(
        Unweighted(), description="how much each token counts", json_schema_extra=omit_at({"kind": "none"})
    )


class DirectConfig(Weighted):
    """Back-propagate a divergence between student and teacher over a support: loss = D(p, q).

    With reverse KL, teacher_topk, K = 32, renormalize: Revisiting OPD (2603.25562); with jsd: GKD (2306.13649)."""

    estimator: Literal["direct"] = "direct"
    equation: ClassVar[str] = "D(p, q) over the support's categories, back-propagated"
    paper: ClassVar[str] = "2306.13649"
    divergence: DivergenceField = Field(ReverseKL(), description="what is minimised")
    support: Annotated[TopkSupport | FullSupport, Field(discriminator="kind")] = Field(
        TopkSupport.model_validate({}), description="ids on which the two are compared"
    )
    support_exclude_ids: tuple[int, ...] = Field(
        (),
        description="ids removed from both distributions at tokens whose support lists them (a teacher's <think>); at other"
        " tokens they are outside the support like any other id",
    )
    logprob_min: float = Field(
        -40.0, lt=0, ge=-80, description="floor of log p and log q per category; no gradient below it"
    )
    tail_logmass_min: float = Field(-30.0, lt=0, ge=-80, description="floor of the bucket's log-mass, of both")
    allow_drop: bool = Field(
        False,
        description="accept `drop` with a divergence whose sum is unbounded below as student mass leaves the support",
    )

    @model_validator(mode="after")
    def _sensible(self) -> DirectConfig:
        support = self.support
        if support.kind in ("teacher_topk", "student_topk") and support.k == 1 and support.outside == "renormalize":
            raise ValueError(
                "support.k: one renormalised category is 1 in both distributions, so loss and gradient are identically"
                " zero; use outside: bucket, or a larger k"
            )
        if support.outside == "drop" and self.divergence.w_at_one < 0 and not self.allow_drop:
            raise ValueError(
                f"support.outside: {self.divergence.kind} with `drop` is no divergence: its sum becomes negative as the"
                " student moves its mass off the support, which training would then do; use bucket or renormalize, or set"
                " allow_drop: true"
            )
        if any(i < 0 for i in self.support_exclude_ids):
            raise ValueError("support_exclude_ids: ids must not be negative")
        floors = {"logprob_min": self.logprob_min}
        if support.outside == "bucket":
            floors["tail_logmass_min"] = self.tail_logmass_min
        refuse_overflow(self.divergence, **floors)
        return self

    def needs(self) -> Needs:
        """The signals and student quantities of the loss and of its metrics."""
        k = self.support.k
        lists: tuple[SignalNeed, ...] = {
            "teacher_topk": (SignalNeed("teacher_topk", k),),
            "full": (SignalNeed("teacher_topk", k),),
            "student_topk": (SignalNeed("student_topk", k),),
            "union": (SignalNeed("teacher_topk", k), SignalNeed("student_topk", k)),
        }[self.support.kind]
        bucket = self.support.outside == "bucket"
        student = StudentRequest(
            support=self.support.kind,
            log_normaliser=self.support.outside != "renormalize",
            tail=bucket,
            exclude_ids=self.support_exclude_ids,
        )
        metrics = everything(self.support.kind, self.support_exclude_ids)
        return Needs((SignalNeed("sampled"), SignalNeed("mask"), *lists, *self.token_weight.needs), student, metrics)


class PolicyGradientConfig(Weighted):
    """Policy gradient: loss = -sg(A) rho, rho = exp(log p(y) - sg(log p_old(y))), on the sampled token or on candidates.

    The defaults are sampled-token OPD, A = log u: OPD+'s centred advantage of reverse KL (2606.01039). Discount 0, no
    normalisation of advantages. With `support: {kind: student_topk}` the sum over the student's K likeliest ids,
    `sum_v sg(w_v) rho_v sg(-A_v)`, takes the place of the sampled token (Rethinking OPD, 2604.13016; TRB, 2605.31159)."""

    estimator: Literal["policy_gradient"] = "policy_gradient"
    equation: ClassVar[str] = (
        "a PPO(rho, A) + b w D, A = sg(m A_r + delta), rho = p(y) / sg(p_old(y)); A_r = b = 0 and m = a = w = 1 unless the credit"
        " gives them; PPO(rho, A) = -A rho without ppo_clip and dual_clip"
    )
    paper: ClassVar[str] = "2606.01039"
    divergence: DivergenceField = Field(ReverseKL(), description="what is minimised in expectation")
    support: Annotated[SampledToken | StudentCandidates, Field(discriminator="kind")] = Field(
        SampledToken(),
        description="the tokens that have an advantage: the sampled one, or the rollout-time student's top K",
        json_schema_extra=omit_at({"kind": "sampled"}),
    )
    advantage: CreditField = Field(
        OpdPlus(),
        description="the credit of each token: its name, or {kind: name, ...} where it has fields; `opd objectives` lists"
        " them",
        json_schema_extra=by_kind(),
    )
    center: bool = Field(
        True,
        description="subtract delta at u = 1: same gradient in expectation for exact samples of the sampled token, without"
        " a ratio clip or trust region; less variance",
    )
    advantage_at: Literal["live", "rollout"] = Field(
        "live", description="log u from the live student each step, or frozen at the rollout"
    )
    trust_region: TrustRegionField = Field(
        NoTrustRegion(),
        description="treatment of tokens on which the ratio of teacher to student is unreliable",
        json_schema_extra=omit_at({"kind": "none"}),
    )
    log_ratio_clip: float = Field(6.0, gt=0, le=40, description="log u is clipped to +- this")
    ppo_clip: float | None = Field(None, gt=0, lt=1, description="clip of rho to 1 +- this, as PPO; null for none")
    dual_clip: float | None = Field(None, gt=1, description="loss of a negative advantage is at most this x |A|")
    log_rho_clip: float = Field(20.0, gt=0, le=40, description="log rho is clipped to +- this, against overflow")

    @model_validator(mode="before")
    @classmethod
    def _no_divergence_as_advantage(cls, data: Any) -> Any:
        support = data.get("support") if isinstance(data, dict) else None
        kind = support.get("kind", "teacher_topk") if isinstance(support, dict) else "sampled"
        if kind in ("teacher_topk", "union", "full"):
            raise ValueError(
                f"support.kind: {kind}: a divergence over a support does not depend on the sampled token, so as an"
                " advantage its expected gradient is zero; use estimator: direct, or leave support out"
            )
        return data

    @model_validator(mode="after")
    def _sensible(self) -> PolicyGradientConfig:
        if self.dual_clip is not None and self.ppo_clip is None:
            raise ValueError("dual_clip: bounds a clipped ratio; set ppo_clip as well (0.2 is usual)")
        if self.support.kind != "sampled" and self.trust_region.sampled_only:
            raise ValueError(
                f"trust_region: {self.trust_region.kind} is defined for the sampled token, but support.kind is"
                f" {self.support.kind}; use support.kind: sampled, or another trust region"
            )
        support = self.support
        self.advantage.check(
            self.divergence,
            listed=isinstance(support, StudentCandidates),
            baseline=isinstance(support, StudentCandidates) and support.baseline == "list",
            center=self.center,
        )
        if self.advantage.side is not None and self.trust_region.side is not None:
            raise ValueError(
                f"advantage: {self.advantage.kind} and trust_region {self.trust_region.kind} each have a divergence beside"
                " the policy gradient; one objective computes one: use another advantage or trust region"
            )
        growth = self.advantage.growth(self.divergence)
        reached = growth * self.log_ratio_clip + self.log_rho_clip
        if reached > LARGEST_EXPONENT:
            raise ValueError(
                f"log_ratio_clip: with {fields_of(self.divergence)}, log_ratio_clip {self.log_ratio_clip:g} and log_rho_clip"
                f" {self.log_rho_clip:g} an advantage times its ratio reaches e^{reached:g}, which float32 cannot hold; use"
                f" {tenths((LARGEST_EXPONENT - self.log_rho_clip) / growth):g} or less"
            )
        return self

    @property
    def exact_samples(self) -> bool:
        """Whether the advantage is derived for exact samples, so that importance weights do not make up for others."""
        return self.advantage.exact_samples

    @property
    def requires_untruncated_sampling(self) -> bool:
        """Whether rollouts must be exact samples of the student, which a sampled token's advantage needs: its constants
        vanish only under exact sampling from p (OPD+, 2606.01039), and no importance weight restores tokens outside a
        nucleus."""
        return self.support.kind == "sampled"

    @property
    def side(self) -> DirectConfig | None:
        """The divergence beside the policy gradient, the credit's or the trust region's, as a direct objective."""
        term = self.advantage.side or self.trust_region.side
        if term is None:
            return None
        return DirectConfig.model_validate(
            {
                "divergence": term.divergence,
                "support": {"kind": "teacher_topk", "k": term.k, "outside": term.outside},
                "logprob_min": term.logprob_min,
                "allow_drop": True,
            }
        )

    def needs(self) -> Needs:
        """Log-probabilities of the sampled tokens under student and teacher, those of the live student, the lists of the
        support, the trust region or the credit, and what else the credit reads."""
        student, metrics = StudentRequest(token_logprobs=True), StudentRequest(token_logprobs=True, entropy=True)
        lists: tuple[SignalNeed, ...] = ()
        if self.support.kind == "student_topk":
            student = StudentRequest(support="student_topk", log_normaliser=True)
            metrics, lists = everything("student_topk"), (SignalNeed("student_topk", self.support.k),)
        elif self.side is not None:
            beside = self.side.needs()
            student = replace(beside.student, token_logprobs=True, log_normaliser=True)
            metrics, lists = everything("teacher_topk"), tuple(n for n in beside.signals if n.k is not None)
        return Needs(
            (
                SignalNeed("sampled"),
                SignalNeed("mask"),
                *lists,
                *self.token_weight.needs,
                *self.advantage.needs.signals,
            ),
            student,
            metrics,
            draws=self.trust_region.draws,
            takes_prefixes=self.trust_region.takes_prefixes,
            credit=self.advantage.needs,
        )


class SftConfig(Normalised):
    """Supervised fine-tuning on given text: loss = -log p(y). Used by the warm-up."""

    estimator: Literal["sft"] = "sft"
    equation: ClassVar[str] = "-log p(y)"
    paper: ClassVar[str] = ""

    def needs(self) -> Needs:
        """No signals; log-probabilities of the text under the live student."""
        student = StudentRequest(token_logprobs=True)
        return Needs((), student, StudentRequest(token_logprobs=True, entropy=True))


class PairsConfig(Identity):
    """Compare two completions of a prompt, the teacher's y+ and the student's y-, by how far the student's log-probability of
    each is above the teacher's (PBSD, 2605.05040).

    h(y) is the sum of log p(y_t) - log q(y_t) over the completion's tokens that the loss mask has: q is constant and reads the
    context c, p is the live student, which reads the prompt alone. The loss of an optimizer step is the mean over its pairs.
    Ours: the teacher writes y+ once for all rounds; a pair with a completion of which no token counts is not in the mean."""

    estimator: Literal["pairs"] = "pairs"
    equation: ClassVar[str] = (
        "mean over pairs of -log sigmoid(beta (h(y+) - h(y-))), h(y) = sum_t [log p(y_t | x, y_<t) - log q(y_t | x, c, y_<t)]"
    )
    paper: ClassVar[str] = "2605.05040"
    experimental: ClassVar[bool] = True
    normalisation: ClassVar[Literal["token"]] = "token"
    """of the trainer's sum over tokens; each pair's loss is shared out so that this makes the mean over pairs"""
    normalisation_length: ClassVar[None] = None
    exact_samples: ClassVar[bool] = False
    requires_untruncated_sampling: ClassVar[bool] = False

    beta: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="factor of the margin, a difference of log-probabilities of whole completions in nats; the paper's value is"
        " not known to us, so there is no default",
    )

    def needs(self) -> Needs:
        """Log-probabilities of the sampled tokens under the teacher and the live student, for pairs of samples."""
        student = StudentRequest(token_logprobs=True)
        metrics = StudentRequest(token_logprobs=True, entropy=True)
        return Needs((SignalNeed("sampled"), SignalNeed("mask")), student, metrics, takes_prefixes=True, pairs=True)


AnyObjective = DirectConfig | PolicyGradientConfig | CreditConfig | PairsConfig | SftConfig
ObjectiveConfig = Annotated[AnyObjective, Field(discriminator="estimator")]
"""The objective of an experiment, chosen by `estimator`."""
