"""The direct estimator: the value of a divergence over a support, to be back-propagated."""

from __future__ import annotations

from tasks.losses.config import DirectConfig
from tasks.losses.metrics import sampled_metrics, support_metrics
from tasks.losses.support import categories, excluded_mask, listed_mask
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch, required
from tasks.losses.weighting import weighted


class DirectObjective:
    """per_token = D(p, q) over the support's categories; the gradient is that of the divergence.

    With reverse KL, teacher_topk and `renormalize` (Revisiting OPD, 2603.25562) the gradient at a logit v in S is
    `p^_v (log(p^_v / q^_v) - loss)` and zero elsewhere. With JSD: GKD (2306.13649)."""

    tokenwise = True

    def __init__(self, config: DirectConfig) -> None:
        self.config = config
        self.needs = config.needs()

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """Needs the support lists with the teacher's log-probabilities, and the student's scores on them."""
        config = self.config
        ids = required(batch.support_ids_NK, "batch.support_ids_NK")
        counted = batch.loss_mask_N > 0
        listed = listed_mask(ids, required(batch.support_valid_N, "batch.support_valid_N"))
        scores = required(student.support_logprobs_NK, "student.support_logprobs_NK")
        if config.support.outside != "renormalize":
            required(student.log_normaliser_N, "student.log_normaliser_N (scores normalised over the vocabulary)")
        exclude = config.support_exclude_ids
        compared = categories(
            scores,
            required(batch.teacher_support_logprobs_NK, "batch.teacher_support_logprobs_NK"),
            listed,
            counted,
            outside=config.support.outside,
            logprob_min=config.logprob_min,
            tail_logmass_min=config.tail_logmass_min,
            student_tail_N=student.support_tail_logmass_N,
            teacher_tail_N=batch.teacher_tail_logmass_N,
            excluded_NK=excluded_mask(ids, exclude) if exclude else None,
        )
        per_token = compared.sum(config.divergence.terms(compared.log_p_NC, compared.log_q_NC))
        per_token = weighted(per_token, config.token_weight, batch, per_token).masked_fill(~counted, 0)
        view = observed or student
        metrics = support_metrics(batch, view, exclude, config.logprob_min, config.tail_logmass_min)
        metrics.update(sampled_metrics(batch, view))
        return ObjectiveOutput(per_token, metrics)
