"""The log-ratio, weighed by those of the other tokens of the completion. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tasks.losses.token_credit.additions import Addition, register
from tasks.losses.token_credit.stored import Stored, Tokens

if TYPE_CHECKING:
    from torch import Tensor


@register
class SOD(Addition):
    """SOD (2605.07725): the log-ratio, weighed down in segments where student and teacher are further apart than in the first.

    d_k is the mean of |d| over the tokens of segment k; segments without tokens are skipped. The paper's segments are the runs of
    the assistant's tokens between tool outputs; here an id of `segment_ends` ends one, or the judge says where they end."""

    kind: Literal["sod"] = "sod"
    equation = "delta = coef w_k d, w_1 = 1, w_k = min((d_1 + eps) / (d_k + eps), 1 + rise)"
    paper = "2605.07725"
    coef: float = Field(1.0, gt=0, description="weight of the log-ratio")
    eps: float = Field(1e-6, gt=0, description="added to both means")
    rise: float = Field(0.2, ge=0, description="a weight is at most 1 + this")
    segment_ends: tuple[int, ...] = Field(
        (), description="token ids, each the last of its segment; none: one segment, whose weight is 1"
    )

    segments_of: Literal["ids", "judge"] = Field(
        "ids", description="what ends a segment: `segment_ends`, or the judge's `segments`"
    )

    @model_validator(mode="after")
    def _one_source(self) -> SOD:
        if self.segments_of == "judge" and self.segment_ends:
            raise ValueError("segment_ends: with segments_of: judge the judge ends segments; leave the ids out")
        return self

    @property
    def segments(self) -> tuple[int, ...]:
        return self.segment_ends

    @property
    def judged_segments(self) -> bool:
        return self.segments_of == "judge"

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        gap_N, weight_N = stored.d_N.abs(), stored.d_N.new_ones(stored.d_N.shape)
        if stored.segment_N is None:
            return {"pace": weight_N}
        for rows in stored.each():
            segments, scored = stored.segment_N[rows].long(), stored.scored_N[rows]
            count = segments.bincount(weights=scored.to(gap_N.dtype))
            mean = segments.bincount(weights=gap_N[rows]) / count.clamp(min=1)
            filled = (count > 0).nonzero().squeeze(-1)
            if len(filled) == 0:
                continue
            first = int(filled[0])
            weights = ((mean[first] + self.eps) / (mean + self.eps)).clamp(max=1 + self.rise)
            weights[first] = 1.0
            weight_N[rows] = weights[segments]
        return {"pace": weight_N}

    def __call__(self, tokens: Tokens) -> Tensor:
        return self.coef * tokens.planned["pace"] * tokens.d_N


@register
class ImportanceWeighted(Addition):
    """IW-OPD (2606.22600): the log-ratio, weighed by the share of the completion's |d| that is still to come."""

    kind: Literal["iw"] = "iw"
    equation = "delta = w_t d_t, w_t = 1 + rise (1 - sum_{j<t} |d_j| / max(sum_j |d_j|, eps))"
    paper = "2606.22600"
    rise: float = Field(0.5, gt=0, description="weight of the first token, less 1")
    eps: float = Field(1e-8, gt=0, description="floor of the sum")

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        gap_N, weight_N = stored.d_N.abs(), stored.d_N.new_ones(stored.d_N.shape)
        for rows in stored.each():
            gap = gap_N[rows]
            before = gap.cumsum(0) - gap
            weight_N[rows] = 1 + self.rise * (1 - before / gap.sum().clamp(min=self.eps))
        return {"pace": weight_N}

    def __call__(self, tokens: Tokens) -> Tensor:
        return tokens.planned["pace"] * tokens.d_N


@register
class DASD(Addition):
    """DASD (2605.22263): the log-ratio, turned around where the entropy is above its quantile in the completion.

    The paper's summaries leave open whose entropy it is, how x is normalised and beta: three required fields. Normalised by
    `std`: (d - mean) / (std + eps) over the completion (ddof 1); `mean_abs`: d / (mean |d| + eps); `none`: d."""

    kind: Literal["dasd"] = "dasd"
    equation = (
        "delta = beta tanh((tau - H) / s) sigmoid(|x| - 1) x, tau the quantile of H, s its mean absolute deviation"
    )
    paper = "2605.22263"
    experimental = True
    beta: float = Field(gt=0, description="weight; not known from the paper's summaries")
    entropy_of: Literal["teacher", "student"] = Field(
        description="whose entropy H is; not known from the paper's summaries"
    )
    normalised_by: Literal["none", "std", "mean_abs"] = Field(
        description="how d becomes x, over the completion; not known from the paper's summaries"
    )
    quantile: float = Field(
        0.2, ge=0, le=1, description="tau is this quantile of H over the completion (linear interpolation)"
    )
    eps: float = Field(1e-6, gt=0, description="floor of s, and added to what d is divided by")

    @property
    def entropy(self) -> Literal["teacher", "student"]:
        return self.entropy_of

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        entropy_N = stored.teacher_entropy_N if self.entropy_of == "teacher" else stored.student_entropy_N
        assert entropy_N is not None
        gate_N, shift_N = stored.d_N.new_zeros(stored.d_N.shape), stored.d_N.new_zeros(stored.d_N.shape)
        width_N = stored.d_N.new_ones(stored.d_N.shape)
        for rows in stored.each():
            scored = stored.scored_N[rows]
            entropy, d = entropy_N[rows][scored], stored.d_N[rows][scored]
            if len(d) == 0:
                continue
            spread = (entropy - entropy.mean()).abs().mean().clamp(min=self.eps)
            gate_N[rows] = ((entropy.quantile(self.quantile) - entropy_N[rows]) / spread).tanh() * scored
            if self.normalised_by == "std":
                shift_N[rows] = d.mean()
                width_N[rows] = (d.std() if len(d) > 1 else d.new_zeros(())) + self.eps
            elif self.normalised_by == "mean_abs":
                width_N[rows] = d.abs().mean() + self.eps
        return {"gate": gate_N, "shift": shift_N, "width": width_N}

    def __call__(self, tokens: Tokens) -> Tensor:
        x = (tokens.d_N - tokens.planned["shift"]) / tokens.planned["width"]
        return self.beta * tokens.planned["gate"] * (x.abs() - 1).sigmoid() * x
