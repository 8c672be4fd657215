"""The sampled estimators where an expectation shows nothing: what is held constant, both sides of every clip, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_head import PlainHead
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tasks.losses.build import make_objective
from tasks.losses.config import PolicyGradientConfig, SftConfig
from tasks.losses.divergences import REGISTRY
from tasks.losses.head import ChunkedHead
from tasks.losses.policy_gradient import surrogate
from tasks.losses.types import ObjectiveOutput, TokenBatch

N, V = 4, 6
NAN = float("nan")
SAMPLED = [PolicyGradientConfig(ppo_clip=0.2, dual_clip=3.0), PolicyGradientConfig(center=False), SftConfig()]
"""Uncentred, A is not zero where all log-probabilities are equal, as they are made to be at masked tokens."""


def batch_of(old: Tensor | float, teacher: Tensor | float, mask: Tensor | None = None) -> TokenBatch:
    return TokenBatch(
        token_ids_N=torch.arange(N),
        loss_mask_N=torch.ones(N) if mask is None else mask,
        sample_N=torch.arange(N),
        position_N=torch.zeros(N, dtype=torch.int64),
        student_logprobs_N=torch.as_tensor(old).expand(N),
        teacher_logprobs_N=torch.as_tensor(teacher).expand(N),
    )


def run(config: Any, logits_NV: Tensor, batch: TokenBatch, provider: Any = None) -> ObjectiveOutput:
    objective = make_objective(config)
    return objective(batch, (provider or PlainHead())(logits_NV, nn.Identity(), batch, objective.needs.student))


def uniform(dtype: torch.dtype = torch.float64) -> Tensor:
    """A student that gives every token the probability 1/V."""
    return torch.zeros(N, V, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("kind", REGISTRY)
@pytest.mark.parametrize("kept", ["opd_plus", "stop_gradient"])
@pytest.mark.parametrize("at", ["live", "rollout"])
def test_advantage_and_rollout_are_held_constant(kind: str, kept: str, at: str) -> None:
    """The gradient is A rho d(-log p), whatever the advantage itself would say about p."""
    torch.manual_seed(0)
    logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    old, teacher = (torch.log(torch.rand(N, dtype=torch.float64)).requires_grad_() for _ in range(2))
    config = PolicyGradientConfig(divergence={"kind": kind}, advantage=kept, advantage_at=at)
    out = run(config, logits, batch_of(old, teacher)).per_token_N
    grads = torch.autograd.grad(out.sum(), (logits, old, teacher), allow_unused=True)
    assert grads[1] is None and grads[2] is None
    live = logits.log_softmax(1).diagonal()
    log_u = (teacher - (live if at == "live" else old)).detach()
    divergence = REGISTRY[kind]()
    a = divergence.w(log_u) - divergence.w_at_one if kept == "opd_plus" else -divergence.f(log_u)
    rho = (live - old).exp().detach()
    (wanted,) = torch.autograd.grad(-(a * rho * live).sum(), logits)
    torch.testing.assert_close(grads[0], wanted, rtol=1e-10, atol=1e-12)


def test_each_part_stops_gradients_by_itself() -> None:
    live, old, a = (torch.full((N,), -1.0, requires_grad=True) for _ in range(3))
    loss, held = surrogate(a, live, old, ppo_clip=0.2, dual_clip=3.0, log_rho_clip=20.0)
    grads = torch.autograd.grad(loss.sum(), (live, old, a), allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None and not held.requires_grad


@pytest.mark.parametrize(("gap", "clipped"), [(-50.0, -6.0), (-6.5, -6.0), (-2.0, -2.0), (2.0, 2.0), (6.5, 6.0)])
def test_log_ratio_clip_has_two_sides(gap: float, clipped: float) -> None:
    logits = uniform()
    old = float(logits.detach().log_softmax(1)[0, 0])
    out = run(PolicyGradientConfig(), logits, batch_of(old, old + gap))
    torch.testing.assert_close(out.per_token_N, torch.full((N,), -clipped, dtype=torch.float64))
    reverse_kl = torch.full((N,), -clipped, dtype=torch.float64)  # E log(p/q) is estimated by minus log u
    torch.testing.assert_close(out.metrics["reverse_kl"], reverse_kl)


@pytest.mark.parametrize(("drift", "clipped"), [(-9.0, -3.0), (-1.0, -1.0), (1.0, 1.0), (9.0, 3.0)])
def test_log_rho_clip_has_two_sides(drift: float, clipped: float) -> None:
    logits = uniform()
    live = float(logits.detach().log_softmax(1)[0, 0])
    out = run(PolicyGradientConfig(log_rho_clip=3.0), logits, batch_of(live - drift, live + 1.0))
    rho = torch.full((N,), clipped, dtype=torch.float64).exp()
    torch.testing.assert_close(out.per_token_N.detach(), -rho)
    torch.testing.assert_close(out.metrics["log_ratio_mean"], torch.full((N,), drift, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.per_token_N.sum(), logits)
    assert grad.any() == (drift == clipped), "beyond the clip there is no gradient"


def test_clip_fraction_counts_what_was_held() -> None:
    logits = uniform()
    live = logits.log_softmax(1).detach().diagonal()
    old = live - torch.tensor([0.5, 0.0, -0.5, 0.5], dtype=torch.float64)
    teacher = live + torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    out = run(PolicyGradientConfig(ppo_clip=0.2), logits, batch_of(old, teacher))
    assert out.metrics["clip_fraction"].tolist() == [1, 0, 0, 0]
    assert "clip_fraction" not in run(PolicyGradientConfig(), logits, batch_of(old, teacher)).metrics


@pytest.mark.parametrize("config", SAMPLED, ids=["pg", "uncentred", "sft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("provider", [PlainHead(), ChunkedHead(2)], ids=["plain", "chunked"])
def test_masked_tokens_have_no_influence(config: Any, dtype: torch.dtype, provider: Any) -> None:
    torch.manual_seed(1)
    logits = torch.randn(N, V).to(dtype)
    spoilt = logits.clone()
    spoilt[1:3] = 50.0
    spoilt[1, 1] = -float("inf")
    spoilt.requires_grad_()
    bad, mask = torch.tensor([-1.0, NAN, -float("inf"), -1.0]), torch.tensor([1.0, 0, 0, 1])
    clean = run(config, logits, batch_of(-1.0, -2.0, mask), provider).per_token_N
    dirty = run(config, spoilt, batch_of(bad, bad - 1, mask), provider)
    assert torch.equal(dirty.per_token_N, clean) and not clean[1:3].any() and clean[[0, 3]].all()
    (grad,) = torch.autograd.grad(dirty.per_token_N.sum(), spoilt)
    assert grad.isfinite().all() and not grad[1:3].any() and grad[[0, 3]].any()
    assert not any(value[1:3].any() for value in dirty.metrics.values())


@pytest.mark.parametrize("config", SAMPLED, ids=["pg", "uncentred", "sft"])
def test_an_all_masked_batch_gives_a_zero_that_back_propagates(config: Any) -> None:
    head = nn.Linear(3, V)
    for provider in (PlainHead(), ChunkedHead(2)):
        hidden = torch.randn(N, 3, requires_grad=True)
        batch, objective = batch_of(NAN, NAN, torch.zeros(N)), make_objective(config)
        loss = objective(batch, provider(hidden, head, batch, objective.needs.student)).per_token_N.sum()
        grads = torch.autograd.grad(loss, [hidden, *head.parameters()])
        assert loss == 0 and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sft_is_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    logits = torch.randn(N, V).to(dtype).requires_grad_()
    batch = batch_of(-1.0, -1.0)
    found = run(SftConfig(), logits, batch).per_token_N
    wide = logits.detach().to(found.dtype).requires_grad_()
    wanted = cross_entropy(wide, batch.token_ids_N, reduction="none")
    torch.testing.assert_close(found, wanted)
    (grad,), (wanted_grad,) = (torch.autograd.grad(x.sum(), y) for x, y in ((found, logits), (wanted, wide)))
    torch.testing.assert_close(grad, wanted_grad.to(dtype))
