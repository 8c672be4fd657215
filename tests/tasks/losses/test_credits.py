"""What every credit must hold to, and that the objective computes the expression whose factors a credit gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal

import pytest
import torch
from credit_context import context_of
from plain_head import PlainHead
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from storage.identity import canonical_json
from tasks.losses.build import make_objective
from tasks.losses.config import ObjectiveConfig, PolicyGradientConfig
from tasks.losses.credit import CREDITS, Credit, CreditContext, CreditTerms
from tasks.losses.direct import DirectObjective
from tasks.losses.divergences import REGISTRY
from tasks.losses.needs import CreditNeeds, SignalNeed
from tasks.losses.types import TokenBatch

every = pytest.mark.parametrize("kind", CREDITS.classes)
V = 9
LENGTHS = (3, 4, 2, 3)
"""Samples 0 and 1 have one prompt, 2 and 3 another."""
N = sum(LENGTHS)
MASKED = (1, 6)


def config(kind: str, **more: Any) -> PolicyGradientConfig:
    return PolicyGradientConfig.model_validate({"advantage": {"kind": kind}, **more})


def batch(kind: str, seed: int = 0) -> tuple[Tensor, TokenBatch]:
    """Logits of the live student, and a batch that has everything, with the lists that the credit's divergence wants."""
    torch.manual_seed(seed)
    live, old, teacher = torch.randn(3, N, V, dtype=torch.float64)
    log_q, tokens = teacher.log_softmax(1), torch.randint(V, (N,))
    at = torch.arange(N), tokens
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    lists: dict[str, Tensor] = {}
    side = config(kind).side
    if side is not None:
        ids = log_q.topk(side.support.k).indices
        lists = {"support_ids_NK": ids, "support_valid_N": torch.full((N,), side.support.k)}
        lists["teacher_support_logprobs_NK"] = log_q.gather(1, ids)
    mask = torch.ones(N, dtype=torch.float64)
    mask[list(MASKED)] = 0
    padding = torch.full((N, 1), float("nan"), dtype=torch.float64)
    made = TokenBatch(
        token_ids_N=tokens,
        loss_mask_N=mask,
        sample_N=sample,
        position_N=torch.cat([torch.arange(length) for length in LENGTHS]),
        student_logprobs_N=old.log_softmax(1)[at],
        teacher_logprobs_N=log_q[at],
        teacher_entropy_N=-(log_q.exp() * log_q).sum(1),
        student_entropy_N=torch.rand(N, dtype=torch.float64),
        reward_N=rewards[sample],
        group_N=sample // 2,
        group_rewards_NG=torch.cat([rewards.view(2, 2)[sample // 2], padding], 1),
        segment_N=torch.cat([torch.arange(length) // 2 for length in LENGTHS]),
        **lists,
    )
    return live.requires_grad_(), made


def losses(settings: PolicyGradientConfig, live: Tensor, tokens: TokenBatch) -> Tensor:
    objective = make_objective(settings)
    return objective(tokens, PlainHead()(live, nn.Identity(), tokens, objective.needs.student)).per_token_N


def gradient(settings: PolicyGradientConfig, live: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    found = losses(settings, live, tokens)
    return found.detach(), torch.autograd.grad(found.sum(), live)[0]


def context(settings: PolicyGradientConfig, live: Tensor, tokens: TokenBatch) -> CreditContext:
    """By its definitions, where nothing is clipped; zeros at masked tokens."""
    assert tokens.student_logprobs_N is not None and tokens.teacher_logprobs_N is not None
    log_p = tokens.loss_mask_N * live.detach().log_softmax(1)[torch.arange(N), tokens.token_ids_N]
    old, log_q = (tokens.loss_mask_N * values for values in (tokens.student_logprobs_N, tokens.teacher_logprobs_N))
    shared = {entry.name for entry in fields(CreditContext)} & {entry.name for entry in fields(TokenBatch)} - {
        "signals"
    }
    return CreditContext(
        divergence=settings.divergence,
        log_u=log_q - (log_p if settings.advantage_at == "live" else old),
        log_p_live=log_p,
        log_p_rollout=old,
        log_q=log_q,
        mask_N=tokens.loss_mask_N,
        **{name: getattr(tokens, name) for name in shared},
    )


@every
@pytest.mark.parametrize("at", ["live", "rollout"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_loss_is_the_expression_with_every_factor_held_constant(
    kind: str, at: str, center: bool, divergence: str
) -> None:
    """a PPO(rho, m A_r + delta) + b w D without a ratio clip: only rho and D have a gradient."""
    settings = config(kind, advantage_at=at, center=center, divergence={"kind": divergence}, log_ratio_clip=30)
    live, tokens = batch(kind)
    found = gradient(settings, live, tokens)
    terms, zero, one = settings.advantage(context(settings, live, tokens)), torch.zeros(N), torch.ones(N)
    f = {name: getattr(terms, name) for name in ("delta", "A_r", "m", "a", "b", "w")}
    default = {"delta": zero, "A_r": zero, "m": one, "a": one, "b": zero, "w": one}
    delta, reward, m, a, b, w = (default[name] if value is None else value for name, value in f.items())
    if terms.delta is not None and center:
        delta = delta - settings.advantage.delta_at_one(settings.divergence)
    log_p = live.log_softmax(1)[torch.arange(N), tokens.token_ids_N]
    rho = (log_p - tokens.student_logprobs_N).exp()
    loss = -a * (m * reward + delta) * rho
    if settings.side is not None:
        view = PlainHead()(live, nn.Identity(), tokens, make_objective(settings).needs.student)
        loss = loss + b * w * DirectObjective(settings.side)(tokens, view).per_token_N
    kept = tokens.loss_mask_N > 0
    wanted = torch.where(kept, loss, 0)
    torch.testing.assert_close(found[0], wanted.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], torch.autograd.grad(wanted.sum(), live)[0], rtol=1e-10, atol=1e-12)
    assert found[1][kept].any(1).all() or terms.a is not None


@every
def test_hostile_values_have_finite_losses_and_gradients(kind: str) -> None:
    live, tokens = batch(kind)
    logits = live.detach().clone()
    logits[0, tokens.token_ids_N[0]] = logits[2, tokens.token_ids_N[2]] = -torch.inf
    old, teacher = tokens.student_logprobs_N, tokens.teacher_logprobs_N
    assert old is not None and teacher is not None
    old[2], old[3], teacher[3], teacher[4] = -torch.inf, -torch.inf, -torch.inf, 0.0
    hostile = replace(
        tokens,
        reward_N=1e4 * tokens.reward_N,
        teacher_entropy_N=torch.zeros(N, dtype=torch.float64),
        student_entropy_N=torch.full((N,), 12.0, dtype=torch.float64),
    )
    for dtype in (torch.float64, torch.float32):
        found, grad = gradient(config(kind, ppo_clip=0.2), logits.to(dtype).requires_grad_(), hostile)
        assert found.isfinite().all() and grad.isfinite().all()


@every
def test_a_masked_token_has_no_effect_and_no_loss(kind: str) -> None:
    live, tokens = batch(kind)
    spoilt = {
        entry.name: torch.where(
            (tokens.loss_mask_N > 0).view(N, *[1] * (value.dim() - 1)), value, torch.full_like(value, torch.nan)
        )
        for entry in fields(tokens)
        if entry.name not in ("loss_mask_N", "signals")
        and (value := getattr(tokens, entry.name)) is not None
        and value.is_floating_point()
    }
    clean, found = (gradient(config(kind), live, t) for t in (tokens, replace(tokens, **spoilt)))
    assert torch.equal(clean[0], found[0]) and torch.equal(clean[1], found[1])
    assert not found[0][list(MASKED)].any() and not found[1][list(MASKED)].any()


@every
def test_a_tokens_loss_does_not_depend_on_the_batch_that_it_is_in(kind: str) -> None:
    """The order of tokens, and which samples share a micro-batch, change no value: groups are known by their rewards."""
    live, tokens = batch(kind)
    whole = losses(config(kind), live, tokens)
    cuts = [torch.randperm(N), *(torch.nonzero(tokens.sample_N == s).flatten() for s in range(4))]
    if CREDITS.classes[kind].tokenwise:  # then not even a sample's other tokens matter
        cuts += torch.arange(N).split(1)
    for index in cuts:
        torch.testing.assert_close(losses(config(kind), live[index], tokens.at(index)), whole[index])


@every
@pytest.mark.parametrize("divergence", REGISTRY)
def test_centring_subtracts_delta_where_the_models_agree(kind: str, divergence: str) -> None:
    credit, chosen = CREDITS.classes[kind](), REGISTRY[divergence]()
    terms = credit(context_of(chosen, torch.zeros(4, dtype=torch.float64)))
    if terms.delta is not None:
        at_one = torch.full((4,), credit.delta_at_one(chosen), dtype=torch.float64)
        torch.testing.assert_close(terms.delta, at_one, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("divergence", REGISTRY)
@pytest.mark.parametrize(("clip", "rho"), [(6.0, 20.0), (40.0, 40.0), (20.0, 20.0), (30.0, 20.0), (0.1, 40.0)])
def test_what_a_config_admits_fits_float32(kind: str, divergence: str, clip: float, rho: float) -> None:
    chosen = REGISTRY[divergence]()
    try:
        settings = config(kind, divergence={"kind": divergence}, log_ratio_clip=clip, log_rho_clip=rho)
    except ValidationError:
        assert (clip, rho) != (6.0, 20.0), "the defaults admit every divergence"
        return
    terms = settings.advantage(context_of(chosen, torch.tensor([-clip, 0.0, clip])))
    assert (terms.advantage(0.0) * torch.tensor(rho).exp()).isfinite().all()


@every
def test_an_advantage_depends_on_the_sampled_token(kind: str) -> None:
    """By log u or the reward: a function of the prefix alone has an expected gradient of zero."""
    context = context_of(REGISTRY["reverse_kl"](), torch.tensor([1.0, -1.0]), reward_N=torch.tensor([1.0, 0.0]))
    better, worse = CREDITS.classes[kind]()(context).advantage(0.0)
    assert better > worse


@every
def test_what_a_credit_needs_and_misses_is_named(kind: str) -> None:
    live, tokens = batch(kind)
    needs = make_objective(config(kind)).needs.credit
    named = {
        "reward_N": needs.reward,
        "group_N": needs.groups,
        "group_rewards_NG": needs.reward and needs.groups,
        "teacher_entropy_N": needs.teacher_entropy,
        "student_entropy_N": needs.student_entropy,
        "segment_N": bool(needs.segment_ends),
    }
    losses(config(kind), live, replace(tokens, **{name: None for name, needed in named.items() if not needed}))
    for name in (name for name, needed in named.items() if needed):
        with pytest.raises(ValueError, match=name):
            losses(config(kind), live, replace(tokens, **{name: None}))


def test_a_credit_reads_the_signals_that_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Given(Credit):
        kind: Literal["given"] = "given"

        @property
        def needs(self) -> CreditNeeds:
            return CreditNeeds(signals=(SignalNeed("mine"),))

        def __call__(self, context: CreditContext) -> CreditTerms:
            return CreditTerms(delta=context.signals["mine_gain"])

    monkeypatch.setitem(CREDITS.classes, "given", Given)
    settings, (live, tokens) = config("given", center=False), batch("given")
    assert [need.name for need in settings.needs().signals] == ["sampled", "mask", "mine"]
    gain = torch.rand(N, dtype=torch.float64)
    found = losses(settings, live, replace(tokens, signals={"mine_gain": gain}))
    rho = (live.log_softmax(1)[torch.arange(N), tokens.token_ids_N] - tokens.student_logprobs_N).exp()
    torch.testing.assert_close(found, torch.where(tokens.loss_mask_N > 0, -gain * rho, 0))
    with pytest.raises(ValueError, match="mine_gain"):
        replace(tokens, signals={"mine_gain": gain[:-1]})


@pytest.mark.parametrize(
    ("terms", "found"),
    [
        (lambda log_u: CreditTerms(delta=log_u.mean()), r"shape \[\] for log u of shape \[12\]"),
        (lambda log_u: CreditTerms(delta=log_u, A_r=log_u.mean()), r"A_r of shape \[\] for"),
        (lambda log_u: CreditTerms(delta=log_u, a=log_u[:, None]), r"a of shape \[12, 1\] for"),
        (lambda log_u: CreditTerms(A_r=log_u, m=log_u[:5]), r"m of shape \[5\] for"),
        (lambda log_u: CreditTerms(delta=log_u.masked_fill(log_u == log_u[3], float("nan"))), "of the 12 .* its delta"),
        (lambda log_u: CreditTerms(delta=log_u, a=log_u / 0), "12 of the 12 numbers of its a are not finite"),
        (lambda log_u: CreditTerms(delta=log_u, b=log_u), "names no divergence"),
        (lambda log_u: CreditTerms(m=log_u), "give delta, A_r, or both"),
    ],
)
def test_terms_that_do_not_fit_are_refused_by_name(
    terms: Callable[[Tensor], CreditTerms], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Credit):
        kind: Literal["odd"] = "odd"

        def __call__(self, context: CreditContext) -> CreditTerms:
            return terms(context.log_u)

    monkeypatch.setitem(CREDITS.classes, "odd", Odd)
    live, tokens = batch("odd")
    with pytest.raises(ValueError, match=found):
        losses(config("odd"), live, tokens)


def test_a_name_and_its_mapping_are_one_config() -> None:
    objective = TypeAdapter(ObjectiveConfig)
    for kind in ("opd_plus", "stop_gradient"):
        named, mapped = (
            objective.validate_python({"estimator": "policy_gradient", "advantage": a}) for a in (kind, {"kind": kind})
        )
        assert named == mapped and f'"advantage":"{kind}"' in canonical_json(named)
        assert named.model_dump()["advantage"] == named.model_dump(mode="json")["advantage"] == kind
        assert objective.validate_json(named.model_dump_json()) == named
    with pytest.raises(ValidationError, match="'opd_plus', 'stop_gradient'"):
        objective.validate_python({"estimator": "policy_gradient", "advantage": "opd"})
    with pytest.raises(ValidationError, match=r"advantage\.opd_plus\.clip"):
        objective.validate_python({"estimator": "policy_gradient", "advantage": {"kind": "opd_plus", "clip": 1}})
