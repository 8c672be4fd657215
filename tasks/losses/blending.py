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
_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""The search ends where KL lies within this share below epsilon, or as near as rounding shows."""
_STEPS = {torch.float32: (8, 24), torch.float64: (10, 53)}
"""Steps by Newton's rule, and steps in all: as many halvings keep an end below 1 below 1."""


class Blend(NamedTuple):
    """beta_N and KL(mu || p) in nats of every position, and log mu (N, V)."""

    beta_N: Tensor
    kl_N: Tensor
    logprobs_NV: Tensor


def blend(student_NV: Tensor, teacher_NV: Tensor, epsilon: float) -> Blend:
    """mu of every position, from log-probabilities of student and teacher (float32 or float64).

    The beta that is returned keeps KL <= epsilon as computed in the inputs' type, and spends all of it but a share of 1e-5
    or 5e-7 nats (float32; 1e-9 in float64). Exact limits: epsilon 0 gives
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
        found = _search(student_NV[left], teacher_NV[left], whole_N[left], limit)
        beta_N[left], kl_N[left], mu_NV[left] = found
    return Blend(beta_N, kl_N, mu_NV)


def _search(student_NV: Tensor, teacher_NV: Tensor, whole_N: Tensor, limit: float) -> Blend:
    """As `blend`, where the teacher itself is too far away: KL(q || p) is `whole_N`.

    sqrt(KL) is nearly linear in beta (KL = beta^2 Var(r) / 2 near 0), so Newton's rule on it needs few passes over V. Its steps
    stay between an end that fits and one that does not; where they leave it, and after the first few, the ends are halved."""
    common_NV = (student_NV > -_INF) & (teacher_NV > -_INF)
    base_NV = student_NV.masked_fill(~common_NV, -_INF)
    ratio_NV = (teacher_NV - student_NV).masked_fill_(~common_NV, 0)
    found = Blend(torch.zeros_like(whole_N), torch.zeros_like(whole_N), student_NV.clone())
    rows_N = torch.arange(len(whole_N), device=whole_N.device)
    low_N, high_N = torch.zeros_like(whole_N), torch.ones_like(whole_N)
    slack = max(limit * _CLOSE[whole_N.dtype], 4 * torch.finfo(whole_N.dtype).eps)
    aim, close = math.sqrt(max(0.0, limit - slack / 2)), limit - slack
    beta_N = (limit / whole_N).sqrt()
    rule, steps = _STEPS[whole_N.dtype]
    for step in range(steps):
        middle_N = (low_N + high_N) / 2
        inside_N = (beta_N > low_N) & (beta_N < high_N) & (step < rule)
        beta_N = torch.where(inside_N, beta_N, middle_N)
        mu_NV, kl_N, slope_N = _at(base_NV, ratio_NV, beta_N)
        fits_N = kl_N <= limit
        for stored, value in zip(found, (beta_N, kl_N, mu_NV), strict=True):
            stored[rows_N[fits_N]] = value[fits_N]
        low_N, high_N = torch.where(fits_N, beta_N, low_N), torch.where(fits_N, high_N, beta_N)
        root_N = kl_N.sqrt()
        beta_N = beta_N - (root_N - aim) * 2 * root_N / slope_N
        open_N = ~fits_N | (kl_N < close)
        if not open_N.any():
            break
        if not open_N.all():
            rows_N, low_N, high_N, beta_N, base_NV, ratio_NV = (
                x[open_N] for x in (rows_N, low_N, high_N, beta_N, base_NV, ratio_NV)
            )
    return found


def _at(base_NV: Tensor, ratio_NV: Tensor, beta_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log mu_beta, KL(mu_beta || p), its slope beta Var(r) in beta, to about a percent); KL is +inf where nothing is common to
    both models."""
    gain_NV = beta_N[:, None] * ratio_NV
    mu_NV = base_NV + gain_NV
    normaliser_N = mu_NV.logsumexp(-1)
    mu_NV = mu_NV.sub_(normaliser_N[:, None])
    gain_NV = gain_NV.sub_(normaliser_N[:, None])
    terms_NV = (mu_NV.exp() * gain_NV).masked_fill_(base_NV == -_INF, 0)
    kl_N = terms_NV.sum(-1)
    slope_N = (terms_NV.mul_(gain_NV).sum(-1) - kl_N.square()) / beta_N
    return mu_NV, torch.where(normaliser_N > -_INF, kl_N.clamp(min=0), _INF), slope_N


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
