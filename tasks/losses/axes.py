"""Axes that several estimators share: the support, the mass outside of it, the denominator. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from storage.identity import Identity

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
    k: int = Field(
        ge=1, description="the vocabulary size; may be left out where the models' sizes are known before loading"
    )
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


class SampledToken(Identity):
    """Policy gradient on the token that was sampled, alone."""

    kind: Literal["sampled"] = "sampled"


class StudentCandidates(Identity):
    """Policy gradient on the rollout-time student's K most probable ids, each weighed by its probability.

    The weight is p(v) renormalised over the K ids, detached: of the rollout-time student, so that weight x ratio is
    the live probability (up to the constant mass of the list), or of the live one, as some code does.

    With A = log u the list's mean advantage is log(q(S) / p(S)) - KL(p^ || q^), p^ and q^ renormalised over the list S.
    Where it is negative it pushes student mass off the list, where nothing is compared; where it is positive (the
    teacher has more mass on the list) it pulls mass onto it. `baseline: list` (ours) subtracts it: on-policy, and
    where log u is not clipped, the gradient is then that of the reverse KL renormalised over the list: Revisiting OPD's
    on the student's candidates."""

    kind: Literal["student_topk"] = "student_topk"
    k: int = Field(16, ge=1, description="candidates per token")
    weights_at: Literal["rollout", "live"] = Field("rollout", description="whose probabilities weigh the candidates")
    baseline: Literal["none", "list"] = Field(
        "none", description="what is subtracted from the advantages: nothing, or their weighted mean over the list"
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> StudentCandidates:
        if self.k == 1 and self.baseline == "list":
            raise ValueError(
                "baseline: the mean advantage of a list of one is that advantage, so loss and gradient are identically"
                " zero; use a larger k, or baseline: none"
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
            raise ValueError("normalisation_length: required with normalisation: constant, and only allowed there")
        return self

    @property
    def exact_samples(self) -> bool:
        """Whether it holds for exact samples alone, so that importance weights do not make up for others."""
        return False

    @property
    def requires_untruncated_sampling(self) -> bool:
        """Whether rollouts must be exact samples of the student: top-p 1, no top-k, temperature 1."""
        return False
