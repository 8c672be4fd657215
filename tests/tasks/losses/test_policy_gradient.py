"""Policy gradients by exact enumeration over a toy vocabulary; clips by cases."""

from __future__ import annotations

import pytest
import torch
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import PolicyGradientConfig
from tasks.losses.divergences import REGISTRY, Divergence
from tasks.losses.policy_gradient import surrogate
from tasks.losses.types import ObjectiveOutput, TokenBatch

V = 7


def models() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    p, q = torch.randn(V, dtype=torch.float64), 2 * torch.randn(V, dtype=torch.float64)
    return p.requires_grad_(), q.log_softmax(0)


def every_token(p_V: Tensor, q_V: Tensor, old_V: Tensor | None = None, **fields: object) -> ObjectiveOutput:
    """The objective at every token of the vocabulary, one per row."""
    old = p_V.detach().log_softmax(0) if old_V is None else old_V
    batch = TokenBatch(
        token_ids_N=torch.arange(V),
        loss_mask_N=torch.ones(V, dtype=torch.float64),
        sample_N=torch.arange(V),
        position_N=torch.zeros(V, dtype=torch.int64),
        student_logprobs_N=old,
        teacher_logprobs_N=q_V,
    )
    objective = make_objective(PolicyGradientConfig(log_ratio_clip=30, **fields))
    return objective(batch, PlainHead()(p_V.expand(V, V), nn.Identity(), batch, objective.needs.student))


def expected_gradient(p_V: Tensor, q_V: Tensor, **fields: object) -> Tensor:
    chances = p_V.detach().softmax(0)
    return torch.autograd.grad((chances * every_token(p_V, q_V, **fields).per_token_N).sum(), p_V)[0]


def true_gradient(divergence: Divergence, p_V: Tensor, q_V: Tensor) -> Tensor:
    return torch.autograd.grad(divergence.terms(p_V.log_softmax(0), q_V).sum(), p_V)[0]


@pytest.mark.parametrize("kind", REGISTRY)
@pytest.mark.parametrize("center", [True, False])
def test_opd_plus_is_the_gradient_of_the_divergence(kind: str, center: bool) -> None:
    p, q = models()
    found = expected_gradient(p, q, divergence={"kind": kind}, advantage="opd_plus", center=center)
    wanted = true_gradient(REGISTRY[kind](), p, q)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_stop_gradient_is_not(kind: str) -> None:
    p, q = models()
    found = expected_gradient(p, q, divergence={"kind": kind}, advantage="stop_gradient")
    wanted = true_gradient(REGISTRY[kind](), p, q)
    assert torch.dot(found, wanted) < 0.5 * wanted.norm() ** 2


def test_reverse_kl_is_the_same_either_way() -> None:
    p, q = models()
    plain, plus = (expected_gradient(p, q, advantage=a, center=False) for a in ("stop_gradient", "opd_plus"))
    torch.testing.assert_close(plain, plus, rtol=1e-10, atol=1e-12)


def test_off_policy_tokens_are_reweighted_by_rho() -> None:
    """Tokens drawn from p_old with rho = p / p_old: still the gradient of the divergence at the live p."""
    p, q = models()
    old = torch.linspace(-1, 1, V, dtype=torch.float64).log_softmax(0)
    live = every_token(p, q, old, divergence={"kind": "jsd"}).per_token_N
    found = torch.autograd.grad((old.exp() * live).sum(), p)[0]
    torch.testing.assert_close(found, true_gradient(REGISTRY["jsd"](), p, q), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "same"),
    [({}, True), ({"ppo_clip": 0.2}, False), ({"trust_region": {"kind": "advantage_floor"}}, False)],
    ids=["plain", "ratio clip", "trust region"],
)
def test_centring_keeps_the_expected_gradient_where_nothing_is_clipped(fields: dict[str, object], same: bool) -> None:
    """Every token weighed by its chance of being sampled: the constant's part vanishes, unless a clip treats signs apart."""
    p, q = models()
    old = torch.linspace(-1, 1, V, dtype=torch.float64).log_softmax(0)
    centred, not_centred = (
        torch.autograd.grad((old.exp() * every_token(p, q, old, center=c, **fields).per_token_N).sum(), p)[0]
        for c in (True, False)
    )
    assert ((centred - not_centred).abs().max() < 1e-12) == same


def test_advantage_at_rollout_is_frozen() -> None:
    p, q = models()
    old = torch.linspace(-1, 1, V, dtype=torch.float64).log_softmax(0)
    frozen = every_token(p, q, old, advantage_at="rollout").per_token_N
    rho = (p.log_softmax(0) - old).exp()
    torch.testing.assert_close(frozen, -(q - old) * rho)
    torch.testing.assert_close(every_token(p, q, old).per_token_N, -(q - p.log_softmax(0)) * rho)


def test_ppo_and_dual_clip() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 5.0, 1.1, 1.1], dtype=torch.float64)
    a = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    loss, clipped = surrogate(a, logprobs, torch.zeros_like(a), ppo_clip=0.2, dual_clip=3.0, log_rho_clip=20.0)
    # up too far for a gain: held; down for a gain: free; up for a loss: free; down too far for a loss: held; dual: held
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.2, -0.5, 1.5, 0.8, 3.0, -1.1, 1.1], dtype=torch.float64))
    assert clipped.tolist() == [1, 0, 0, 1, 1, 0, 0]
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(grad, torch.where(clipped > 0, 0.0, -a * ratio))


def test_log_ratio_is_clipped_and_infinities_stay_finite() -> None:
    tokens = torch.arange(4)
    logits = torch.zeros(4, 5)
    logits[1, 1] = logits[3, 3] = float("-inf")
    logits.requires_grad_()
    batch = TokenBatch(
        token_ids_N=tokens,
        loss_mask_N=torch.tensor([1.0, 1, 1, 0]),
        sample_N=tokens,
        position_N=tokens,
        student_logprobs_N=torch.tensor([-1.0, float("-inf"), float("-inf"), float("nan")]),
        teacher_logprobs_N=torch.tensor([float("-inf"), float("-inf"), -1.0, float("nan")]),
    )
    config = PolicyGradientConfig()
    objective = make_objective(config)
    out = objective(batch, PlainHead()(logits, nn.Identity(), batch, objective.needs.student))
    (grad,) = torch.autograd.grad(out.per_token_N.sum(), logits)
    assert out.per_token_N.isfinite().all() and grad.isfinite().all() and not grad[3].any()
    assert out.per_token_N[3] == 0
    rho = torch.tensor([0.2]).log().add(1).exp()
    torch.testing.assert_close(out.per_token_N[:1].detach(), config.log_ratio_clip * rho)
    assert all(value.isfinite().all() for value in out.metrics.values())
