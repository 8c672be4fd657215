"""Every registered divergence: its terms, f and advantage agree with each other and with the definition."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from tasks.losses.config import DirectConfig, PolicyGradientConfig
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


@pytest.mark.parametrize("alpha", [-2.0, -1e-3, 1e-3, 0.02, 0.5, 0.98, 0.999, 1.001, 3.0])
@pytest.mark.parametrize("apart", [0.1, 1.0])
def test_alpha_loses_no_digits_in_float32(alpha: float, apart: float) -> None:
    """Against the defining formula in sixty digits; near 0 and 1 its terms cancel by factors of 1000 and more."""
    torch.manual_seed(0)
    raw = torch.randn(12, dtype=torch.float64)
    p, q = (x.log_softmax(0).float() for x in (raw, raw + apart * torch.randn(12, dtype=torch.float64)))
    with localcontext() as context:
        context.prec = 60
        a = Decimal(alpha)
        pairs = [(Decimal(float(x)), Decimal(float(y))) for x, y in zip(p, q, strict=True)]
        terms = [(a * y + (1 - a) * x).exp() - a * y.exp() - (1 - a) * x.exp() for x, y in pairs]
        exact = [float(term / (a * (a - 1))) for term in terms]
        by_f = [float(term / (a * (a - 1)) / x.exp()) for term, (x, _) in zip(terms, pairs, strict=True)]
    divergence = REGISTRY["alpha"](alpha=alpha)
    assert float(divergence.terms(p, q).sum()) == pytest.approx(math.fsum(exact), rel=3e-5)
    assert divergence.f(q - p).tolist() == pytest.approx(by_f, rel=3e-4, abs=1e-7)


def parameters(cls: type[Divergence]) -> st.SearchStrategy[Divergence]:
    """What the schema of a divergence admits, its ends included; what its validators refuse is not drawn."""
    ranges = {}
    for name, info in cls.model_json_schema()["properties"].items():
        if info["type"] == "number":
            low, high = (info.get(key, info.get(f"exclusive{key.title()}")) for key in ("minimum", "maximum"))
            edges = {
                f"exclude_{end}": f"exclusive{key.title()}" in info
                for end, key in (("min", "minimum"), ("max", "maximum"))
            }
            ranges[name] = st.floats(low, high, **edges)

    def admitted(values: dict[str, float]) -> Divergence | None:
        try:
            return cls.model_validate(values)
        except ValidationError:
            return None

    return st.fixed_dictionaries(ranges).map(admitted).filter(lambda found: found is not None)


@pytest.mark.parametrize("kind", REGISTRY)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_a_config_admits_fits_float32(kind: str, data: st.DataObject) -> None:
    """At the corners that its clips and floors leave: values and gradients are finite."""
    divergence = data.draw(parameters(REGISTRY[kind]))
    floor = data.draw(st.sampled_from([-80.0, -40.0, -1.0]) | st.floats(-80, -0.1))
    clip, rho = (data.draw(st.sampled_from([40.0, 6.0]) | st.floats(0.1, 40)) for _ in range(2))
    try:
        DirectConfig(divergence=divergence, logprob_min=floor)
    except ValidationError:
        pass
    else:
        log_p = torch.tensor([floor, floor, 0.0, 0.0], requires_grad=True)
        terms = divergence.terms(log_p, torch.tensor([floor, 0.0, floor, 0.0]))
        assert terms.isfinite().all() and torch.autograd.grad(terms.sum(), log_p)[0].isfinite().all()
    for advantage in ("opd_plus", "stop_gradient"):
        try:
            PolicyGradientConfig(divergence=divergence, advantage=advantage, log_ratio_clip=clip, log_rho_clip=rho)
        except ValidationError:
            continue
        log_u = torch.tensor([-clip, clip])
        a = divergence.w(log_u) if advantage == "opd_plus" else divergence.f(log_u)
        assert (a * torch.tensor(rho).exp()).isfinite().all()


def test_the_defaults_admit_every_divergence() -> None:
    for divergence in [*EVERY, *(REGISTRY["alpha"](alpha=a) for a in (-2, 3))]:
        assert DirectConfig(divergence=divergence) and PolicyGradientConfig(divergence=divergence)


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
