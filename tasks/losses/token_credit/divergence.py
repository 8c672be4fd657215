"""D(q', p) of a token: the support's categories, their temperature, the target, and the sum of clipped terms."""

from __future__ import annotations

from torch import Tensor

from tasks.losses.divergences import Divergence
from tasks.losses.support import Categories, categories, listed_mask
from tasks.losses.token_credit.beside import Beside
from tasks.losses.types import StudentView, TokenBatch, lowest, required, working


def compare(beside: Beside, batch: TokenBatch, student: StudentView, counted_N: Tensor) -> Categories:
    """Student and teacher on the categories of the support, each at its temperature; none where not `counted_N` (bool)."""
    ids = required(batch.support_ids_NK, "batch.support_ids_NK")
    counted_N = counted_N & (batch.loss_mask_N > 0)
    listed = listed_mask(ids, required(batch.support_valid_N, "batch.support_valid_N"))
    p = required(student.support_logprobs_NK, "student.support_logprobs_NK")
    q = required(batch.teacher_support_logprobs_NK, "batch.teacher_support_logprobs_NK")
    if not beside.temperate:  # without a bucket the scores are renormalised over the list afterwards
        p, q = (
            working(values).clamp(min=lowest(working(values))) / temperature
            for values, temperature in ((p, beside.student_temperature), (q, beside.teacher_temperature))
        )
    return categories(
        p,
        q,
        listed,
        counted_N,
        outside=beside.support.outside,
        logprob_min=beside.logprob_min,
        tail_logmass_min=beside.tail_logmass_min,
        student_tail_N=student.support_tail_logmass_N,
        teacher_tail_N=batch.teacher_tail_logmass_N,
    )


def divergence_of(divergence: Divergence, beside: Beside, compared: Categories, target_N: Tensor | None) -> Tensor:
    """D [N] of the target and the live student; back-propagates to the student alone."""
    log_p, valid = compared.log_p_NC, compared.valid_NC
    log_q = beside.target(log_p.detach(), compared.log_q_NC.detach(), valid, target_N).detach()
    terms = -log_q.exp() * log_p if beside.cross_entropy else divergence.terms(log_p, log_q)
    if beside.term_clip is not None:
        terms = terms.clamp(max=beside.term_clip)
    return compared.sum(terms)
