"""The stored quantities of two distributions, from one chunk of their logits. Pure tensor functions, without gradient.

Shapes as in `tasks.losses`: N packed completion tokens, V vocabulary rows, K candidates. Everything is computed from
log-probabilities in float32 at least. A position whose logits hold NaN or +inf is NaN everywhere: it is flagged and
counted by the caller, never repaired."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.losses.stop_ids import merge_scores
from tasks.signals.tables import LOGPROB_MAX

_INF = float("inf")


def log_probabilities(logits_NV: Tensor, rows: int | None = None, stop_ids: Sequence[int] = ()) -> Tensor:
    """log softmax over the first `rows` rows (all by default), in float32. May reuse the memory of the logits. `stop_ids` are
    merged before, so that those past `rows` count too."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logits_NV = merge_scores(logits_NV, stop_ids)[:, :rows]
    normaliser_N = logits_NV.logsumexp(-1)
    broken_N = ~normaliser_N.isfinite()
    logprobs_NV = logits_NV.sub_(normaliser_N[:, None])
    return logprobs_NV.masked_fill_(broken_N[:, None], float("nan"))


def of_tokens(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities of the ids (N, K); -inf for ids past the rows, which this distribution does not have."""
    here_NK = ids_NK < logprobs_NV.shape[-1]
    values_NK = logprobs_NV.gather(-1, ids_NK.where(here_NK, torch.zeros_like(ids_NK)))
    broken_N1 = logprobs_NV[:, :1].isnan()
    return usable(values_NK.masked_fill(~here_NK & ~broken_N1, -_INF))


def usable(logprobs: Tensor) -> Tensor:
    """Values above zero by rounding become zero, larger ones NaN."""
    return logprobs.masked_fill(logprobs > LOGPROB_MAX, float("nan")).clamp(max=0)


def entropy(logprobs_NV: Tensor) -> Tensor:
    """-sum p log p in nats (N), with 0 log 0 = 0. Sums log-probabilities, so nothing cancels."""
    terms_NV = logprobs_NV.exp().mul_(logprobs_NV)
    return -terms_NV.masked_fill_(logprobs_NV == -_INF, 0).sum(-1)


def top(logprobs_NV: Tensor, k: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_NK, logprobs_NK, valid_N): the k likeliest of the first `rows` ids, likeliest first. Only the first valid_N
    entries of a row are usable: those with a finite log-probability, none at a NaN position."""
    values_NK, ids_NK = logprobs_NV[:, :rows].topk(k, dim=-1, sorted=True)
    values_NK = usable(values_NK)
    valid_N = values_NK.isfinite().sum(-1).masked_fill(values_NK[:, 0].isnan(), 0)  # broken anywhere: broken at the top
    return ids_NK, values_NK, valid_N


def tail_logmass(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log of the mass of everything but the ids (N): logsumexp over the complement, because 1 - sum cancels. -inf
    where nothing is left. `logprobs_NV` is unchanged afterwards."""
    values_NK = logprobs_NV.gather(-1, ids_NK)
    result_N = logprobs_NV.scatter_(-1, ids_NK, -_INF).logsumexp(-1)
    logprobs_NV.scatter_(-1, ids_NK, values_NK)
    return usable(result_N.masked_fill(values_NK[:, 0].isnan(), float("nan")))


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Exact KL(student || teacher) per position (N, float64), over the rows that both have; a student with more is
    normalised over these. NaN positions stay NaN; +inf where the teacher excludes what the student can write."""
    rows = min(student_NV.shape[-1], teacher_NV.shape[-1])
    teacher_NV = teacher_NV[:, :rows]
    if student_NV.shape[-1] > rows:
        student_NV = student_NV[:, :rows] - student_NV[:, :rows].logsumexp(-1, keepdim=True)
    terms_NV = (student_NV - teacher_NV).mul_(student_NV.exp())
    return terms_NV.masked_fill_(student_NV == -_INF, 0).sum(-1, dtype=torch.float64)


def sampling_logprobs(
    logprobs_NV: Tensor, ids_N: Tensor, temperature: float, top_p: float, top_k: int, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(logprobs_N, outside_N): log-probabilities of sampled tokens under the distribution that vLLM samples from.

    As there: logits / temperature; then min-p: a token stays if it is at least min_p times as likely as the likeliest; then
    top-k, ties with the k-th kept; then top-p on what is left, renormalised: a
    token stays if the mass of those likelier than it is below top_p. Temperature 0 is the distribution of the model
    itself, as the sampler records it. A token that was sampled belongs to the set; where this model's rounding puts it
    just outside (`outside_N`), it is taken in and the mass grows by it."""
    token_N1 = ids_N[:, None]
    whole = top_p == 1 and min_p == 0 and not 0 < top_k < logprobs_NV.shape[-1]
    if temperature == 0 or (temperature == 1 and whole):
        return of_tokens(logprobs_NV, token_N1)[:, 0], torch.zeros_like(ids_N, dtype=torch.bool)
    scaled_NV = logprobs_NV / temperature
    chosen_N = scaled_NV.gather(-1, token_N1)[:, 0]
    least_N = torch.full_like(chosen_N, -_INF)
    if min_p > 0:
        least_N = scaled_NV.max(-1).values + math.log(min_p)
        scaled_NV.masked_fill_(scaled_NV < least_N[:, None], -_INF)
    if 0 < top_k < scaled_NV.shape[-1]:
        least_N = torch.maximum(least_N, scaled_NV.topk(top_k, dim=-1).values[:, -1])
        scaled_NV.masked_fill_(scaled_NV < least_N[:, None], -_INF)
    if top_p < 1:
        ordered_NV = scaled_NV.sort(dim=-1).values
        dropped_NV = ordered_NV.softmax(-1).cumsum_(-1) <= 1 - top_p
        dropped_NV[:, -1] = False
        scaled_NV = ordered_NV.masked_fill_(dropped_NV, -_INF)
        least_N = ordered_NV.gather(-1, dropped_NV.sum(-1, keepdim=True))[:, 0]
    mass_N = scaled_NV.logsumexp(-1)
    outside_N = chosen_N < least_N
    mass_N = torch.where(outside_N, torch.logaddexp(mass_N, chosen_N), mass_N)
    return usable(chosen_N - mass_N), outside_N
