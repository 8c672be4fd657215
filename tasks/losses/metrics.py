"""Per-token metrics, named as columns of `training_steps`: without gradient, from values that were computed anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.losses.divergences import ReverseKL
from tasks.losses.support import categories, excluded_mask, listed_mask, masked_logsumexp
from tasks.losses.types import StudentView, TokenBatch, lowest, working


@torch.no_grad()
def sampled_metrics(batch: TokenBatch, view: StudentView) -> dict[str, Tensor]:
    """Metrics of the sampled token: `log_ratio_mean` (log p - log p_old: how stale the round has become), entropies."""
    found: dict[str, Tensor] = {}
    if view.token_logprobs_N is not None and batch.student_logprobs_N is not None:
        found["log_ratio_mean"] = difference(view.token_logprobs_N, batch.student_logprobs_N)
    if view.entropy_N is not None:
        found["student_entropy"] = working(view.entropy_N)
    if batch.teacher_entropy_N is not None:
        found["teacher_entropy"] = working(batch.teacher_entropy_N)
    return _masked(batch, found)


@torch.no_grad()
def support_metrics(
    batch: TokenBatch,
    view: StudentView,
    exclude_ids: tuple[int, ...],
    logprob_min: float,
    tail_logmass_min: float,
) -> dict[str, Tensor]:
    """Metrics of a support S.

    `teacher_mass` and `student_mass` are the probability of S under each, `overlap_ratio` the share of the teacher's
    top-K list among as many top entries of the live student (Rethinking OPD's diagnostic, 2604.13016; absent for
    `student_topk`, where the teacher's list is not known), `reverse_kl` the bucketed reverse KL: a lower bound of the
    full one."""
    ids, valid = batch.support_ids_NK, batch.support_valid_N
    teacher = batch.teacher_support_logprobs_NK
    if ids is None or valid is None or teacher is None:
        return {}
    listed = listed_mask(ids, valid)
    found = {"teacher_mass": masked_logsumexp(working(teacher), listed).exp()}
    if view.support_overlap_N is not None:
        found["overlap_ratio"] = working(view.support_overlap_N)
    if view.log_normaliser_N is not None and view.support_logprobs_NK is not None:
        excluded = excluded_mask(ids, exclude_ids) if exclude_ids else None
        inside = listed if excluded is None else listed & ~excluded
        found["student_mass"] = masked_logsumexp(working(view.support_logprobs_NK), inside).exp()
        if view.support_tail_logmass_N is not None:
            compared = categories(
                view.support_logprobs_NK,
                teacher,
                listed,
                batch.loss_mask_N > 0,
                outside="bucket",
                logprob_min=logprob_min,
                tail_logmass_min=tail_logmass_min,
                student_tail_N=view.support_tail_logmass_N,
                teacher_tail_N=batch.teacher_tail_logmass_N,
                excluded_NK=excluded,
            )
            found["reverse_kl"] = compared.sum(ReverseKL().terms(compared.log_p_NC, compared.log_q_NC))
    return _masked(batch, found)


def difference(a_N: Tensor, b_N: Tensor) -> Tensor:
    """a - b of log-probabilities, finite also where both are -inf."""
    a, b = working(a_N), working(b_N)
    return a.clamp(min=lowest(a)) - b.clamp(min=lowest(b))


def _masked(batch: TokenBatch, found: dict[str, Tensor]) -> dict[str, Tensor]:
    out = batch.loss_mask_N <= 0
    return {name: value.detach().masked_fill(out, 0) for name, value in found.items()}
