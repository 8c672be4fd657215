"""A plugin that brings three credits: two that are right, and one whose advantage depends on the other tokens of the batch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from opdflow.plugin import Credit, CreditContext, CreditNeeds, CreditTerms, SideTerm, register
from tasks.losses.divergences import ForwardKL


@register
class Decayed(Credit):
    """The centred unbiased advantage, which counts less the later a token comes."""

    kind: Literal["decayed"] = "decayed"
    half_life: float = Field(4.0, gt=0, description="tokens after which the advantage has halved")
    equation = "delta = (w_f(u) - w_f(1)) 2^(-t / half_life)"
    paper = ""
    experimental = True
    tokenwise = True

    def __call__(self, context: CreditContext) -> CreditTerms:
        divergence = context.divergence
        weight = (context.position_N * (-math.log(2) / self.half_life)).exp()
        return CreditTerms(delta=weight * (divergence.w(context.log_u) - divergence.w_at_one))


@register
class Grouped(Credit):
    """The reward against the mean of its prompt's judged samples (0 where the judge failed); below it, forward KL to the teacher
    where the student was sure."""

    kind: Literal["grouped"] = "grouped"
    end: int = Field(0, ge=0, description="token id that ends a segment")
    k: int = Field(4, ge=1, description="teacher's candidates for the forward KL")
    equation = (
        "A_r = r - mean of the group, m = 2^(-segment), delta = log u / 10, a = 1[H(q) < 5.12], b = 1[A_r < 0],"
        " w = exp(-H(p_old) / 5), D = sum_{v in top-k} q log(q/p)"
    )
    paper = ""
    experimental = True

    @property
    def needs(self) -> CreditNeeds:
        return CreditNeeds(
            reward=True, groups=True, teacher_entropy=True, student_entropy=True, segment_ends=(self.end,)
        )

    @property
    def side(self) -> SideTerm:
        return SideTerm(ForwardKL(), self.k, "drop", -40.0)

    def __call__(self, context: CreditContext) -> CreditTerms:
        rewards, others, segment = context.reward_N, context.group_rewards_NG, context.segment_N
        teacher, student = context.teacher_entropy_N, context.student_entropy_N
        assert rewards is not None and others is not None and segment is not None
        assert teacher is not None and student is not None
        advantage = (rewards - others.nanmean(1)).nan_to_num(0.0)
        return CreditTerms(
            A_r=advantage,
            m=0.5**segment,
            delta=context.log_u / 10,
            a=(teacher < 5.12).to(advantage.dtype),
            b=(advantage < 0).to(advantage.dtype),
            w=(-student / 5).exp(),
        )


@register
class Whitened(Credit):
    """log u against its mean over the batch, which micro-batches and ranks would change."""

    kind: Literal["whitened"] = "whitened"
    equation = "delta = log u - mean log u"
    paper = ""

    def __call__(self, context: CreditContext) -> CreditTerms:
        return CreditTerms(delta=context.log_u - context.log_u.mean())
