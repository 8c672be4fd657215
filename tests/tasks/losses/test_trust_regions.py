"""Trust regions against exact enumeration over a toy vocabulary, where nothing is sampled and nothing approximate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import PolicyGradientConfig
from tasks.losses.divergences import REGISTRY
from tasks.losses.head import ChunkedHead
from tasks.losses.trust_regions import TRUST_REGIONS
from tasks.losses.types import ObjectiveOutput, TokenBatch

V, K = 7, 3
F64 = torch.float64


def models() -> tuple[Tensor, Tensor, Tensor]:
    """Live student (logits, with gradient), teacher and rollout-time student (log-probabilities)."""
    torch.manual_seed(1)
    p, q, old = torch.randn(V, dtype=F64), 2 * torch.randn(V, dtype=F64), torch.randn(V, dtype=F64)
    return p.requires_grad_(), q.log_softmax(0), old.log_softmax(0)


def batch_of(q_V: Tensor, old_V: Tensor, k: int = K, of: str = "teacher", **signals: Tensor) -> TokenBatch:
    """Every token of the vocabulary once, as if sampled at the same position."""
    ids = (q_V if of == "teacher" else old_V).topk(k).indices
    rest = torch.ones(V, dtype=torch.bool).scatter(0, ids, False)
    return TokenBatch(
        token_ids_N=torch.arange(V),
        loss_mask_N=torch.ones(V, dtype=F64),
        sample_N=torch.arange(V),
        position_N=torch.zeros(V, dtype=torch.int64),
        student_logprobs_N=old_V,
        teacher_logprobs_N=q_V,
        teacher_entropy_N=-(q_V.exp() * q_V).sum().expand(V),
        support_ids_NK=ids.expand(V, k),
        support_valid_N=torch.full((V,), k),
        teacher_support_logprobs_NK=q_V[ids].expand(V, k),
        student_support_logprobs_NK=old_V[ids].expand(V, k),
        teacher_tail_logmass_N=q_V[rest].logsumexp(0).expand(V) if k < V else torch.full((V,), -80.0, dtype=F64),
        **signals,
    )


def run(p_V: Tensor, batch: TokenBatch, **fields: Any) -> ObjectiveOutput:
    objective = make_objective(PolicyGradientConfig.model_validate({"log_ratio_clip": 30, **fields}))
    view = PlainHead()(p_V.expand(V, V), nn.Identity(), batch, objective.needs.student)
    return objective(batch, view)


def gradient(loss: Tensor, p_V: Tensor) -> Tensor:
    return torch.autograd.grad(loss, p_V)[0]


def same(found: Tensor, wanted: Tensor) -> None:
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# --- TrOPD -----------------------------------------------------------------------------------------------------------


def forward_kl_terms(p_V: Tensor, q_V: Tensor, k: int = K) -> Tensor:
    ids = q_V.topk(k).indices
    return (q_V[ids].exp() * (q_V[ids] - p_V.log_softmax(0)[ids])).sum()


@pytest.mark.parametrize("at", ["rollout", "live"])
def test_expected_gate_is_trust_and_one_minus_trust(at: str) -> None:
    p, q, old = models()
    region = {"kind": "tropd", "gate": "expected", "gate_at": at, "k": K}
    found = run(p, batch_of(q, old), trust_region=region)
    live = p.log_softmax(0)
    trust = (q - (old if at == "rollout" else live.detach())).exp().clamp(max=1)
    policy = -(q - live.detach()) * (live - old).exp()
    wanted = trust * policy + (1 - trust) * forward_kl_terms(p, q)
    same(found.per_token_N, wanted)
    same(gradient(found.per_token_N.sum(), p), gradient(wanted.sum(), p))
    torch.testing.assert_close(found.metrics["outlier_fraction"], 1 - trust)


def test_mean_over_draws_is_the_expected_gate() -> None:
    """Exactly: each token's trust is the length of the interval of draws that trust it."""
    p, q, old = models()
    expected = run(p, batch_of(q, old), trust_region={"kind": "tropd", "gate": "expected", "k": K}).per_token_N
    trust = (q - old).exp().clamp(max=1)
    region = {"kind": "tropd", "k": K}
    just_below = run(p, batch_of(q, old, uniform_N=trust * (1 - 1e-12)), trust_region=region).per_token_N
    just_above = run(p, batch_of(q, old, uniform_N=trust), trust_region=region).per_token_N
    same(trust * just_below + (1 - trust) * just_above, expected)


def test_mean_over_many_draws() -> None:
    p, q, old = models()
    n, region = 400, {"kind": "tropd", "k": K}
    drawn = torch.rand(n, V, dtype=F64, generator=torch.Generator().manual_seed(0))
    trust = (q - old).exp().clamp(max=1)
    outs = [run(p, batch_of(q, old, uniform_N=row), trust_region=region) for row in drawn]
    share = 1 - torch.stack([out.metrics["outlier_fraction"] for out in outs]).mean(0)
    assert ((share - trust).abs() <= 4 * (trust * (1 - trust) / n).sqrt() + 1e-12).all()


def test_fraction_trusted_is_one_minus_total_variation() -> None:
    """For y drawn from p: E[min(q/p, 1)] = 1 - TV(p, q)."""
    p, q, old = models()
    out = run(p, batch_of(q, old), trust_region={"kind": "tropd", "gate": "expected", "k": K})
    trusted = (old.exp() * (1 - out.metrics["outlier_fraction"])).sum()
    torch.testing.assert_close(trusted, 1 - (old.exp() - q.exp()).abs().sum() / 2, rtol=1e-12, atol=0)


def test_masked_outliers_get_nothing() -> None:
    p, q, old = models()
    batch = batch_of(q, old, uniform_N=torch.full((V,), 0.5, dtype=F64))
    out = run(p, batch, trust_region={"kind": "tropd", "outliers": "mask"})
    trusted = (q - old).exp() > 0.5
    assert trusted.any() and not trusted.all()
    assert (out.per_token_N[~trusted] == 0).all() and (out.per_token_N[trusted] != 0).all()


def test_clipped_outliers_have_a_bounded_advantage() -> None:
    p, q, old = models()
    batch = batch_of(q, old, uniform_N=torch.full((V,), 0.999, dtype=F64))
    out = run(p, batch, trust_region={"kind": "tropd", "outliers": "clip", "clip_at": -0.5})
    live = p.log_softmax(0)
    a = q - live.detach()
    outlier = (q - old).exp() <= 0.999
    a = torch.where(outlier, a.clamp(min=-0.5), a)
    assert (outlier & (q - live < -0.5)).any()
    same(out.per_token_N, -a * (live - old).exp())


def test_teacher_prefix_has_its_own_term_alone() -> None:
    p, q, old = models()
    prefix = torch.tensor([1.0, 0, 1, 0, 0, 1, 0], dtype=F64)
    region = {"kind": "tropd", "gate": "expected", "k": K, "prefix_beta": 0.01}
    with_, without = (run(p, batch_of(q, old, **x), trust_region=region) for x in ({"teacher_prefix_N": prefix}, {}))
    there = prefix > 0
    same(with_.per_token_N[there], -0.01 * p.log_softmax(0)[there])
    same(with_.per_token_N[~there], without.per_token_N[~there])
    assert (with_.metrics["outlier_fraction"][there] == 0).all()


def test_outlier_term_is_bounded_where_the_student_has_no_mass() -> None:
    p, q, _ = models()
    dead = q.argmax()
    gone = p.detach().clone()
    gone[dead] = float("-inf")
    gone.requires_grad_()
    region = {"kind": "tropd", "gate": "expected", "k": K, "logprob_min": -20.0}
    batch = batch_of(q, gone.detach().log_softmax(0))
    out = run(gone, batch, trust_region=region)
    assert out.per_token_N.isfinite().all() and gradient(out.per_token_N.sum(), gone).isfinite().all()
    assert out.per_token_N.max() <= 20 * math.exp(1) * 7


# --- the others ------------------------------------------------------------------------------------------------------


def test_proximal_teacher_is_top_d_reward() -> None:
    p, q, old = models()
    out = run(p, batch_of(q, old), trust_region={"kind": "proximal_teacher", "alpha": 0.3})
    u = (q - p.detach().log_softmax(0)).exp()
    same(out.per_token_N, -(0.3 * u + 0.7).log() * (p.log_softmax(0) - old).exp())
    assert (out.per_token_N / (p.log_softmax(0) - old).exp() <= -math.log(0.7) + 1e-12).all()


@pytest.mark.parametrize("kind", REGISTRY)
def test_proximal_teacher_is_the_divergence_to_the_mixture(kind: str) -> None:
    """On-policy, in expectation: the gradient of D(p || a q + (1-a) p_fixed), for every divergence."""
    p, q, _ = models()
    old = p.detach().log_softmax(0)
    out = run(p, batch_of(q, old), divergence={"kind": kind}, trust_region={"kind": "proximal_teacher", "alpha": 0.3})
    mixture = (0.3 * q.exp() + 0.7 * old.exp()).log()
    wanted = gradient(REGISTRY[kind]().terms(p.log_softmax(0), mixture).sum(), p)
    found = gradient((old.exp() * out.per_token_N).sum(), p)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("below", ["clip", "mask"])
def test_advantage_floor(below: str) -> None:
    p, q, old = models()
    out = run(p, batch_of(q, old), trust_region={"kind": "advantage_floor", "floor": -0.7, "below": below})
    a = q - p.detach().log_softmax(0)
    low = a < -0.7
    assert low.any() and not low.all()
    same(out.per_token_N, -a.masked_fill(low, -0.7 if below == "clip" else 0) * (p.log_softmax(0) - old).exp())
    assert torch.equal(out.metrics["outlier_fraction"], low.double())


@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
def test_entropy_gate_adds_forward_kl_where_the_teacher_is_unsure(outside: str) -> None:
    p, q, old = models()
    entropies = torch.tensor([0.0, 0.79, 0.81, 2, 0.1, 1, 0.8], dtype=F64)
    batch = replace(batch_of(q, old), teacher_entropy_N=entropies)
    region = {"kind": "entropy_gate", "k": K, "weight": 0.5, "outside": outside}
    found, plain = run(p, batch, trust_region=region), run(p, batch)
    ids = q.topk(K).indices
    live, teacher = p.log_softmax(0)[ids], q[ids]
    if outside == "renormalize":
        live, teacher = live.log_softmax(0), teacher.log_softmax(0)
    term = (teacher.exp() * (teacher - live)).sum()
    if outside == "bucket":
        tail_p, tail_q = 1 - live.exp().sum(), 1 - teacher.exp().sum()
        term = term + tail_q * (tail_q.log() - tail_p.log())
    open_ = (entropies >= 0.8).double()
    assert 0 < open_.sum() < V
    wanted = plain.per_token_N + open_ * 0.5 * term
    torch.testing.assert_close(found.per_token_N, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient(found.per_token_N.sum(), p), gradient(wanted.sum(), p), rtol=1e-9, atol=1e-11)


# --- candidates instead of the sampled token -------------------------------------------------------------------------


def candidates(k: int, **fields: Any) -> dict[str, Any]:
    return {"support": {"kind": "student_topk", "k": k, **fields}}


@pytest.mark.parametrize("kind", REGISTRY)
def test_candidates_over_the_whole_vocabulary_are_the_divergence(kind: str) -> None:
    """With K = V nothing is left to chance: the loss's gradient is that of the divergence, also off-policy."""
    p, q, old = models()
    out = run(p, batch_of(q, old, V, "student"), divergence={"kind": kind}, **candidates(V))
    wanted = gradient(REGISTRY[kind]().terms(p.log_softmax(0), q).sum(), p)
    torch.testing.assert_close(gradient(out.per_token_N[0], p), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("weights_at", ["rollout", "live"])
def test_candidates_by_hand(weights_at: str) -> None:
    """-sum_v sg(w_v) rho_v sg(log q_v - log p_v), w renormalised on the list, the log-ratio not (TRB, 2605.31159)."""
    p, q, old = models()
    ids = old.topk(K).indices
    out = run(p, batch_of(q, old, K, "student"), ppo_clip=0.2, **candidates(K, weights_at=weights_at))
    live = p.log_softmax(0)[ids]
    weigher = old[ids] if weights_at == "rollout" else live.detach()
    a, rho = (q[ids] - live).detach(), (live - old[ids]).exp()
    terms = torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a)
    wanted = -(weigher.softmax(0) * terms).sum()
    same(out.per_token_N, wanted.expand(V))
    same(gradient(out.per_token_N[0], p), gradient(wanted, p))


def test_with_the_lists_mean_as_baseline_it_is_the_renormalised_reverse_kl() -> None:
    """On-policy: Revisiting OPD's gradient on the student's list, and no push on mass outside of it. Without it the push
    has the sign of the mean advantage, log(q(S) / p(S)) - KL(p^ || q^): off the list or onto it."""
    p, q, _ = models()
    old = p.detach().log_softmax(0)
    ids = old.topk(K).indices
    log_p, log_q = p.log_softmax(0)[ids].log_softmax(0), q[ids].log_softmax(0)
    wanted = gradient((log_p.exp() * (log_p - log_q)).sum(), p)
    found, plain = (
        gradient(run(p, batch_of(q, old, K, "student"), **candidates(K, baseline=b)).per_token_N[0], p)
        for b in ("list", "none")
    )
    same(found, wanted)
    outside = torch.ones(V, dtype=torch.bool).scatter(0, ids, False)
    assert found[outside].abs().max() < 1e-12 and (plain[outside] < -1e-3).all()  # descent raises what it should not
    q = torch.full((V,), -8.0, dtype=F64).scatter(0, ids, old[ids] + 0.1).log_softmax(0)  # nearly all of it is listed
    onto = gradient(run(p, batch_of(q, old, K, "student"), **candidates(K)).per_token_N[0], p)
    log_q = q[ids].log_softmax(0)
    kl = (log_p.exp() * (log_p - log_q)).sum().detach()
    mean = q[ids].logsumexp(0) - old[ids].logsumexp(0) - kl
    assert mean > 0.1 and (onto[outside] > 1e-3).all()
    same(onto[outside], (mean * old.exp())[outside])


def test_candidates_take_a_floor_and_a_proximal_teacher() -> None:
    p, q, old = models()
    batch = batch_of(q, old, V, "student")
    floored = run(p, batch, trust_region={"kind": "advantage_floor", "floor": -0.7}, **candidates(V))
    a = (q - p.detach().log_softmax(0)).clamp(min=-0.7)
    same(floored.per_token_N, -(old.exp() * a * (p.log_softmax(0) - old).exp()).sum().expand(V))
    assert 0 < floored.metrics["outlier_fraction"][0] < 1


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRUST_REGIONS.classes)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_tokens_and_infinities_do_no_harm(kind: str, dtype: torch.dtype) -> None:
    """A masked token has no influence whatever stands there; -inf and near-one-hot give finite values and gradients."""
    torch.manual_seed(0)
    n, k = 6, 3
    logits = (8 * torch.randn(n, V)).to(dtype)
    logits[0, 2] = float("-inf")
    logits[1] = torch.tensor([60.0] + [-60.0] * (V - 1))
    logits.requires_grad_()
    teacher = (8 * torch.randn(n, V)).log_softmax(-1)
    teacher[0, 1] = float("-inf")
    ids = teacher.topk(k).indices
    mask = torch.tensor([1.0, 1, 1, 0, 1, 0])
    nan = torch.where(mask > 0, 0.0, float("nan"))
    tokens = torch.tensor([1, 3, 0, 5, 6, 2])
    p_old = logits.detach().float().log_softmax(-1)
    batch = TokenBatch(
        token_ids_N=tokens,
        loss_mask_N=mask,
        sample_N=torch.arange(n),
        position_N=torch.arange(n),
        student_logprobs_N=p_old.gather(1, tokens[:, None])[:, 0] + nan,
        teacher_logprobs_N=teacher.gather(1, tokens[:, None])[:, 0] + nan,
        teacher_entropy_N=torch.linspace(0, 2, n) + nan,
        uniform_N=torch.linspace(0, 0.9, n) + nan,
        teacher_prefix_N=torch.zeros(n),
        support_ids_NK=ids,
        support_valid_N=torch.tensor([3, 2, 3, 3, 1, 3]),
        teacher_support_logprobs_NK=teacher.gather(1, ids) + nan[:, None],
    )
    cls = TRUST_REGIONS.classes[kind]
    region = {"kind": kind} | ({"k": k} if "k" in cls.model_fields else {})
    objective = make_objective(PolicyGradientConfig.model_validate({"trust_region": region, "ppo_clip": 0.2}))
    found = {}
    for name, head in (("plain", PlainHead()), ("chunked", ChunkedHead(2))):
        head_layer = nn.Linear(V, V, bias=False, dtype=dtype)
        head_layer.weight.data = torch.eye(V, dtype=dtype)
        layer = nn.Identity() if name == "plain" else head_layer
        source = logits if name == "plain" else logits.detach().clamp(min=-1e4).requires_grad_()
        out = objective(batch, head(source, layer, batch, objective.needs.student))
        (grad,) = torch.autograd.grad((mask * out.per_token_N).sum(), source)
        assert out.per_token_N.isfinite().all() and grad.isfinite().all()
        assert (out.per_token_N[mask == 0] == 0).all() and (grad[mask == 0] == 0).all()
        assert all(value.isfinite().all() for value in out.metrics.values())
        found[name] = out.per_token_N.detach()
    torch.testing.assert_close(found["plain"], found["chunked"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", TRUST_REGIONS.classes)
def test_equal_models_on_policy_give_no_pull(kind: str) -> None:
    """q = p = p_old: the expected gradient is zero (lists hold every id: a forward KL that drops the rest pulls mass in)."""
    p, _, _ = models()
    old = p.detach().log_softmax(0)
    cls = TRUST_REGIONS.classes[kind]
    region = {"kind": kind} | ({"k": V} if "k" in cls.model_fields else {})
    batch = batch_of(old, old, V, uniform_N=torch.full((V,), 0.5, dtype=F64))
    out = run(p, batch, trust_region=region)
    assert gradient((old.exp() * out.per_token_N).sum(), p).abs().max() < 1e-12


PLACES = [(kind, "sampled") for kind in TRUST_REGIONS.classes]
PLACES += [(kind, "student_topk") for kind, cls in TRUST_REGIONS.classes.items() if not cls.sampled_only]


@pytest.mark.parametrize(("region", "support"), PLACES)
def test_a_batch_without_a_token_that_counts_is_a_zero_that_back_propagates(region: str, support: str) -> None:
    cls = TRUST_REGIONS.classes[region]
    p, q, old = models()
    nothing = torch.zeros(V, dtype=F64)
    batch = batch_of(q, old, of="student" if support == "student_topk" else "teacher", uniform_N=nothing)
    batch = replace(batch, loss_mask_N=nothing, teacher_logprobs_N=q * float("nan"))
    choice = {"kind": region} | ({"k": K} if "k" in cls.model_fields else {})
    listed = {"support": {"kind": support} | ({"k": K} if support == "student_topk" else {})}
    out = run(p, batch, trust_region=choice, **listed)
    assert out.per_token_N.requires_grad and (out.per_token_N == 0).all()
    assert (gradient(out.per_token_N.sum(), p) == 0).all()
