"""Trust-region blending (TRB, arXiv 2605.31159): the distribution between student and teacher that stays close to the student.

    mu_beta ~ p^(1-beta) q^beta,   beta = max { b in [0, 1] : KL(mu_b || p) <= epsilon }

With r = log q - log p and A(beta) = log sum p e^(beta r) it is log mu_beta = log p + beta r - A, and KL(mu_beta || p) =
beta A'(beta) - A(beta), which grows with beta. p: student, q: teacher. N positions, V ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_INF = float("inf")
_HALVINGS = {torch.float32: 24, torch.float64: 53}
"""As many as keep an end below 1 below 1."""


class Blend(NamedTuple):
    """beta_N and KL(mu || p) in nats of every position, and log mu (N, V)."""

    beta_N: Tensor
    kl_N: Tensor
    logprobs_NV: Tensor


def blend(student_NV: Tensor, teacher_NV: Tensor, epsilon: float) -> Blend:
    """mu of every position, from log-probabilities of student and teacher (float32 or float64).

    The end of the bisection that is returned keeps KL <= epsilon as computed in the inputs' type. Exact limits: epsilon 0 gives
    the student, KL(q || p) <= epsilon the teacher. An id that one of the two excludes (-inf) is excluded by mu, unless mu is the
    other one, and by its cost: KL is at least -log p(ids that are left). Where that is above epsilon, or the teacher excludes
    all ids, mu is the student. ValueError for a negative epsilon."""
    if epsilon < 0:
        raise ValueError(f"epsilon {epsilon} must not be negative")
    beta_N = student_NV.new_zeros(len(student_NV))
    kl_N, mu_NV = torch.zeros_like(beta_N), student_NV.clone()
    if epsilon == 0 or not len(student_NV):
        return Blend(beta_N, kl_N, mu_NV)
    limit = _below(epsilon, student_NV.dtype)
    whole_N = _divergence(teacher_NV, student_NV)
    teacher_N = (whole_N <= limit) & (teacher_NV > -_INF).any(-1)
    beta_N[teacher_N] = 1
    kl_N[teacher_N] = whole_N[teacher_N]
    mu_NV[teacher_N] = teacher_NV[teacher_N]
    left = (~teacher_N).nonzero()[:, 0]
    if len(left):
        found = _bisect(student_NV[left], teacher_NV[left], limit)
        beta_N[left], kl_N[left], mu_NV[left] = found
    return Blend(beta_N, kl_N, mu_NV)


def _bisect(student_NV: Tensor, teacher_NV: Tensor, limit: float) -> Blend:
    """As `blend`, where the teacher itself is too far away."""
    common_NV = (student_NV > -_INF) & (teacher_NV > -_INF)
    base_NV = student_NV.masked_fill(~common_NV, -_INF)
    ratio_NV = (teacher_NV - student_NV).masked_fill_(~common_NV, 0)
    low_N = torch.zeros_like(student_NV[:, 0])
    high_N = torch.ones_like(low_N)
    for _ in range(_HALVINGS[student_NV.dtype]):
        middle_N = (low_N + high_N) / 2
        fits_N = _at(base_NV, ratio_NV, middle_N)[1] <= limit
        low_N, high_N = torch.where(fits_N, middle_N, low_N), torch.where(fits_N, high_N, middle_N)
    mu_NV, kl_N = _at(base_NV, ratio_NV, low_N)
    student_N = low_N == 0
    mu_NV = torch.where(student_N[:, None], student_NV, mu_NV)
    return Blend(low_N, kl_N.masked_fill(student_N, 0), mu_NV)


def _at(base_NV: Tensor, ratio_NV: Tensor, beta_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log mu_beta, KL(mu_beta || p)); +inf where nothing is common to both models."""
    shift_NV = beta_N[:, None] * ratio_NV
    mu_NV = base_NV + shift_NV
    normaliser_N = mu_NV.logsumexp(-1)
    mu_NV = mu_NV.sub_(normaliser_N[:, None])
    terms_NV = mu_NV.exp() * (shift_NV.sub_(normaliser_N[:, None]))
    kl_N = terms_NV.masked_fill_(base_NV == -_INF, 0).sum(-1)
    return mu_NV, torch.where(normaliser_N > -_INF, kl_N.clamp(min=0), _INF)


def _divergence(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """KL(first || second), +inf where the second excludes what the first has."""
    terms_NV = first_NV.exp() * (first_NV - second_NV)
    return terms_NV.masked_fill_(first_NV == -_INF, 0).sum(-1).clamp_(min=0)


def _below(value: float, dtype: torch.dtype) -> float:
    """The largest number of the type that is not above `value`."""
    rounded = torch.tensor(value, dtype=dtype)
    return float(rounded if float(rounded) <= value else torch.nextafter(rounded, torch.tensor(-_INF, dtype=dtype)))


def without(logprobs_NV: Tensor, ids: Sequence[int]) -> Tensor:
    """The distributions over the other ids (renormalised), with -inf at `ids`; all -inf where nothing is left. The same tensor
    where there are none."""
    known = [token for token in ids if token < logprobs_NV.shape[-1]]
    if not known:
        return logprobs_NV
    kept_NV = logprobs_NV.index_fill(-1, torch.tensor(known, device=logprobs_NV.device), -_INF)
    mass_N1 = kept_NV.logsumexp(-1, keepdim=True)
    return kept_NV.sub_(mass_N1.masked_fill(mass_N1 == -_INF, 0))


def draw(weights_V: Tensor, uniform: float) -> int:
    """The id that a uniform number in [0, 1) draws, with probability in proportion to `weights_V` (none negative, not all 0)."""
    edges_V = weights_V.double().cumsum(0)
    at = int(torch.searchsorted(edges_V, edges_V[-1] * uniform, right=True))
    if at >= len(edges_V) or weights_V[at] <= 0:  # by rounding past the last id that has mass
        at = int(weights_V.nonzero()[-1])
    return at


def acceptance(mu: float, student: float) -> float:
    """min(1, mu(y) / p(y)) of a drafted token, from its log-probabilities."""
    if mu == -math.inf:
        return 0.0
    return math.exp(min(0.0, mu - student)) if student > -math.inf else 1.0


def residual(mu_V: Tensor, student_V: Tensor) -> Tensor:
    """Weights of the token that replaces a rejected one: (mu - p)+, from log-probabilities; mu itself where that is 0 everywhere
    (by rounding)."""
    weights_V = (mu_V.double().exp() - student_V.double().exp()).clamp(min=0)
    return weights_V if float(weights_V.sum()) > 0 else mu_V.double().exp()
