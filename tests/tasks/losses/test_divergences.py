"""Every registered divergence: its terms, f and advantage agree with each other and with the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.losses.divergences import REGISTRY, Divergence, ForwardKL, ReverseKL

OTHER_PARAMETERS = {
    "jsd": [{"beta": 0.0}, {"beta": 0.1}, {"beta": 0.9}, {"beta": 1.0}],
    "skewed_forward_kl": [{"alpha": 0.5}],
    "skewed_reverse_kl": [{"alpha": 0.5}],
    "alpha": [{"alpha": -1.0}, {"alpha": 2.0}, {"alpha": 0.01}],
}
EVERY = [cls(**p) for kind, cls in REGISTRY.items() for p in [{}, *OTHER_PARAMETERS.get(kind, [])]]
every = pytest.mark.parametrize("divergence", EVERY, ids=str)
scores = st.lists(st.floats(-8, 8), min_size=2, max_size=9)


def distributions(data: st.DataObject) -> tuple[Tensor, Tensor]:
    p = data.draw(scores)
    q = data.draw(st.lists(st.floats(-8, 8), min_size=len(p), max_size=len(p)))
    return tuple(torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (p, q))


@every
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_is_its_f_divergence_and_a_divergence(divergence: Divergence, data: st.DataObject) -> None:
    log_p, log_q = distributions(data)
    value = divergence.terms(log_p, log_q).sum()
    by_f = (log_p.exp() * divergence.f(log_q - log_p)).sum()
    torch.testing.assert_close(value, by_f, rtol=1e-9, atol=1e-11)
    assert value >= -1e-12
    assert divergence.terms(log_p, log_p).sum().abs() < 1e-12


@every
def test_advantage_is_minus_f_plus_u_times_derivative(divergence: Divergence) -> None:
    u = torch.tensor([0.003, 0.2, 0.7, 1.3, 4.0, 50.0], dtype=torch.float64, requires_grad=True)
    f = divergence.f(u.log())
    (slope,) = torch.autograd.grad(f.sum(), u)
    torch.testing.assert_close(divergence.w(u.detach().log()), (-f + u * slope).detach(), rtol=1e-9, atol=1e-11)
    one = torch.zeros((), dtype=torch.float64)
    assert divergence.f(one) == 0
    assert math.isclose(float(divergence.w(one)), divergence.w_at_one, abs_tol=1e-12)


def test_definitions_over_three_categories() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    def value(kind: str, **parameters: float) -> Tensor:
        return REGISTRY[kind](**parameters).terms(p.log(), q.log()).sum()

    m = 0.2 * q + 0.8 * p
    expected = {
        ("jsd", ("beta", 0.2)): 0.2 * kl(q, m) + 0.8 * kl(p, m),
        ("skewed_forward_kl", ("alpha", 0.2)): kl(q, 0.2 * q + 0.8 * p),
        ("skewed_reverse_kl", ("alpha", 0.2)): kl(p, 0.8 * q + 0.2 * p),
        ("alpha", ("alpha", 2.0)): ((q - p) ** 2 / p).sum() / 2,
        ("neyman_chi2", None): ((q - p) ** 2 / q).sum(),
        ("total_variation", None): (p - q).abs().sum() / 2,
    }
    for (kind, parameter), wanted in expected.items():
        torch.testing.assert_close(value(kind, **dict([parameter] if parameter else [])), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("beta", "end"), [(0.0, ForwardKL()), (1.0, ReverseKL())])
def test_jsd_ends_in_the_two_kls(beta: float, end: Divergence) -> None:
    log_p, log_q = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in ([1.0, 0, -2], [0.0, 3, 1]))
    jsd = REGISTRY["jsd"](beta=beta)
    assert torch.equal(jsd.terms(log_p, log_q), end.terms(log_p, log_q))
    assert torch.equal(jsd.w(log_q - log_p), end.w(log_q - log_p))


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_skewed_kls_are_bounded_by_the_share_of_their_own_side(alpha: float, data: st.DataObject) -> None:
    """The mixture holds the share alpha of what stands outside, so the log of their ratio is at most -log alpha."""
    log_p, log_q = distributions(data)
    for kind, end in (("skewed_forward_kl", ForwardKL()), ("skewed_reverse_kl", ReverseKL())):
        found = REGISTRY[kind](alpha=alpha).terms(log_p, log_q).sum()
        assert found <= -math.log(alpha) + 1e-12
        unskewed = end.terms(log_p, log_q).sum()
        assert found <= (1 - alpha) * unskewed + 1e-12  # convexity in the second argument
        almost = REGISTRY[kind](alpha=1e-12).terms(log_p, log_q).sum()
        torch.testing.assert_close(almost, unskewed, rtol=1e-4, atol=1e-9)
