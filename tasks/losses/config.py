"""The `objective:` part of a config: one point in the product of axes, with what is refused and why. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, SerializeAsAny, WrapValidator, model_validator

from storage.identity import Identity
from tasks.losses.divergences import REGISTRY, Divergence, ReverseKL
from tasks.losses.needs import Needs, SignalNeed, StudentRequest

__all__ = [
    "DirectConfig",
    "FullSupport",
    "Needs",
    "ObjectiveConfig",
    "PolicyGradientConfig",
    "SftConfig",
    "SignalNeed",
    "StudentRequest",
    "TopkSupport",
]


def _registered(value: Any, handler: Callable[[Any], Any]) -> Any:
    """A divergence that a plugin registered after this module was read is validated by its own class."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in REGISTRY and kind not in _BUILT_IN:
        return REGISTRY[kind].model_validate(value)
    return value if isinstance(value, Divergence) else handler(value)


_BUILT_IN = tuple(REGISTRY)

if TYPE_CHECKING:
    DivergenceField = Divergence
else:
    DivergenceField = Annotated[
        SerializeAsAny[Annotated[Union[tuple(REGISTRY.values())], Field(discriminator="kind")]],  # noqa: UP007
        WrapValidator(_registered),
    ]

STORED_BYTES_PER_ENTRY = 8
"""An int32 id and a float32 log-probability."""


class TopkSupport(Identity):
    """The K most probable ids of the teacher, of the rollout-time student, or of either."""

    kind: Literal["teacher_topk", "student_topk", "union"] = "teacher_topk"
    k: int = Field(32, ge=1, description="entries per list; a union has between k and 2k")
    outside: Literal["renormalize", "bucket", "drop"] = Field(
        "bucket",
        description="what lies outside: `bucket` is one more category (a true divergence), `renormalize` ignores it and"
        " computes K rows of the head only, `drop` leaves the terms unnormalised (no divergence)",
    )


class FullSupport(Identity):
    """Every id: the exact divergence, from a cached top-K list with K = V."""

    kind: Literal["full"] = "full"
    k: int = Field(ge=1, description="the vocabulary size")
    outside: Literal["renormalize"] = Field("renormalize", description="nothing lies outside")
    max_bytes_per_token: int = Field(
        16384, ge=1, description="refuse above this much disk per completion token (8 bytes per id)"
    )

    @model_validator(mode="after")
    def _fits(self) -> FullSupport:
        size = self.k * STORED_BYTES_PER_ENTRY
        if size > self.max_bytes_per_token:
            raise ValueError(
                f"k: full support over {self.k} ids stores {size} bytes per token, above max_bytes_per_token"
                f" {self.max_bytes_per_token}; use kind: teacher_topk with outside: bucket, or raise the budget"
            )
        return self


class Normalised(Identity):
    """Fields about the denominator, shared by all objectives."""

    normalisation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="`token`: sum over the global batch / its masked-in tokens; `sequence`: mean of per-sample means;"
        " `constant`: sum / (samples x normalisation_length)",
    )
    normalisation_length: int | None = Field(None, ge=1, description="tokens per sample, for `constant`")

    @model_validator(mode="after")
    def _length_given(self) -> Normalised:
        if (self.normalisation == "constant") != (self.normalisation_length is not None):
            raise ValueError("normalisation_length: belongs to normalisation: constant, which cannot do without it")
        return self

    @property
    def requires_untruncated_sampling(self) -> bool:
        """Whether rollouts must be exact samples of the student: top-p 1, no top-k, temperature 1."""
        return False


class DirectConfig(Normalised):
    """Back-propagate a divergence between student and teacher over a support: loss = D(p, q).

    With reverse KL, teacher_topk, K = 32, renormalize: Revisiting OPD (Fu et al., 2026); with jsd: GKD (2306.13649)."""

    estimator: Literal["direct"] = "direct"
    divergence: DivergenceField = Field(ReverseKL(), description="what is minimised")
    support: Annotated[TopkSupport | FullSupport, Field(discriminator="kind")] = Field(
        TopkSupport.model_validate({}), description="ids on which the two are compared"
    )
    support_exclude_ids: tuple[int, ...] = Field(
        (), description="ids taken out of both distributions at every position (a teacher's <think>)"
    )
    logprob_min: float = Field(
        -40.0, lt=0, ge=-80, description="floor of log p and log q per category; no gradient below it"
    )
    tail_logmass_min: float = Field(-30.0, lt=0, ge=-80, description="floor of the bucket's log-mass, of both")
    allow_drop: bool = Field(
        False, description="accept `drop` where its sum falls without end as student mass leaves the support"
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
                " student moves its mass off the support, which is what training would do; use bucket or renormalize,"
                " or say allow_drop: true"
            )
        if any(i < 0 for i in self.support_exclude_ids):
            raise ValueError("support_exclude_ids: ids are not negative")
        return self

    def needs(self) -> Needs:
        """Signals and student quantities that the loss cannot do without, and those that its metrics want."""
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
        metrics = StudentRequest(
            support=self.support.kind,
            token_logprobs=True,
            log_normaliser=True,
            tail=True,
            entropy=True,
            overlap=True,
            exclude_ids=self.support_exclude_ids,
        )
        return Needs((SignalNeed("sampled"), SignalNeed("mask"), *lists), student, metrics)


class PolicyGradientConfig(Normalised):
    """Policy gradient on the sampled token: loss = -sg(A) rho, rho = exp(log p(y) - sg(log p_old(y))).

    The defaults are sampled-token OPD, A = log u: OPD+'s centred advantage of reverse KL (2606.01039). Discount 0, no
    normalisation of advantages."""

    estimator: Literal["policy_gradient"] = "policy_gradient"
    divergence: DivergenceField = Field(ReverseKL(), description="what is minimised in expectation")
    advantage: Literal["opd_plus", "stop_gradient"] = Field(
        "opd_plus",
        description="`opd_plus`: w_f(u) = -f(u) + u f'(u), unbiased; `stop_gradient`: -f(u), as is usual",
    )
    center: bool = Field(True, description="subtract the advantage at u = 1: equal in expectation, less variance")
    advantage_at: Literal["live", "rollout"] = Field(
        "live", description="log u from the live student each step, or frozen at the rollout"
    )
    log_ratio_clip: float = Field(6.0, gt=0, le=40, description="log u is clipped to +- this")
    ppo_clip: float | None = Field(None, gt=0, lt=1, description="clip of rho to 1 +- this, as PPO; null for none")
    dual_clip: float | None = Field(None, gt=1, description="loss of a negative advantage is at most this x |A|")
    log_rho_clip: float = Field(20.0, gt=0, le=40, description="log rho is clipped to +- this, against overflow")

    @model_validator(mode="before")
    @classmethod
    def _no_support(cls, data: Any) -> Any:
        if isinstance(data, dict) and "support" in data:
            raise ValueError(
                "support: a divergence over a support does not depend on the sampled token, so as an advantage its"
                " expected gradient is zero; use estimator: direct, or leave support out"
            )
        return data

    @model_validator(mode="after")
    def _sensible(self) -> PolicyGradientConfig:
        if self.dual_clip is not None and self.ppo_clip is None:
            raise ValueError("dual_clip: bounds a clipped ratio; set ppo_clip as well (0.2 is usual)")
        return self

    @property
    def requires_untruncated_sampling(self) -> bool:
        """True: constants of the advantage vanish only under exact sampling from p (OPD+, 2606.01039), and no
        importance weight restores tokens outside a nucleus."""
        return True

    def needs(self) -> Needs:
        """The sampled tokens' log-probabilities under student and teacher, and the live student's."""
        student = StudentRequest(token_logprobs=True)
        return Needs(
            (SignalNeed("sampled"), SignalNeed("mask")), student, StudentRequest(token_logprobs=True, entropy=True)
        )


class SftConfig(Normalised):
    """Supervised fine-tuning on given text: loss = -log p(y). Used by the warm-up."""

    estimator: Literal["sft"] = "sft"

    def needs(self) -> Needs:
        """No signals; the live student's log-probabilities of the text."""
        student = StudentRequest(token_logprobs=True)
        return Needs((), student, StudentRequest(token_logprobs=True, entropy=True))


ObjectiveConfig = Annotated[DirectConfig | PolicyGradientConfig | SftConfig, Field(discriminator="estimator")]
"""The objective of an experiment, chosen by `estimator`."""
