"""Loss and gradients in one pass over the logits equal those of all logits at once, with three matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_head import PlainHead
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tasks.losses.build import make_objective
from tasks.losses.config import DirectConfig, ObjectiveConfig, PolicyGradientConfig, SftConfig
from tasks.losses.credit import CREDITS
from tasks.losses.divergences import REGISTRY
from tasks.losses.head import ChunkedHead
from tasks.losses.needs import StudentRequest
from tasks.losses.products import LARGE
from tasks.losses.types import StudentView, TokenBatch
from tasks.trainer.data import Forward
from tasks.trainer.model import LossHead, TokenStats

D, V, K, N = 5, 23, 3, 12
REQUESTS = {
    "scores": StudentRequest("teacher_topk"),
    "scores without ids": StudentRequest("teacher_topk", exclude_ids=(0, 4)),
    "bucket": StudentRequest("teacher_topk", log_normaliser=True, tail=True),
    "drop": StudentRequest("teacher_topk", log_normaliser=True),
    "sampled": StudentRequest(token_logprobs=True),
    "all": StudentRequest("teacher_topk", True, True, True),
    "all without ids": StudentRequest("teacher_topk", True, True, True, exclude_ids=(0, 4)),
}
FIELDS = ("token_logprobs_N", "log_normaliser_N", "support_tail_logmass_N", "support_logprobs_NK")
BUCKET = DirectConfig.model_validate({"support": {"kind": "teacher_topk", "k": K, "outside": "bucket"}})


def batch_of(seed: int, stops: Sequence[int] = ()) -> TokenBatch:
    """Lists of 0 to K ids, none of them a stop id but the first; a third of the tokens masked."""
    draw = torch.Generator().manual_seed(seed)
    there = torch.tensor([v for v in range(V) if v not in stops[1:]])
    ids = torch.stack([there[torch.randperm(len(there), generator=draw)[:K]] for _ in range(N)])
    valid = torch.randint(0, K + 1, (N,), generator=draw)
    listed = torch.arange(K) < valid[:, None]
    teacher = torch.rand(N, K, generator=draw).log_softmax(-1) - 0.2
    return TokenBatch(
        token_ids_N=torch.randint(0, V, (N,), generator=draw),
        loss_mask_N=(torch.rand(N, generator=draw) > 0.3).float(),
        sample_N=torch.arange(N) // 4,
        position_N=torch.arange(N) % 4,
        student_logprobs_N=-3 * torch.rand(N, generator=draw),
        teacher_logprobs_N=-3 * torch.rand(N, generator=draw),
        support_ids_NK=ids.masked_fill(~listed, 0),
        support_valid_N=valid,
        teacher_support_logprobs_NK=teacher.masked_fill(~listed, -torch.inf),
        teacher_tail_logmass_N=torch.log1p(-(teacher.exp() * listed).sum(-1)),
    )


def some_loss(view: StudentView, batch: TokenBatch, places_C: Tensor) -> Tensor:
    """A sum over tokens of everything that was asked for, each entry with a weight and a curvature of its own."""
    assert batch.support_valid_N is not None
    listed = torch.arange(K) < batch.support_valid_N[:, None]
    total = torch.zeros((), dtype=torch.float64)
    for index, name in enumerate(FIELDS):
        values = getattr(view, name)
        if values is not None:
            if name.endswith("_NK"):  # excluded ids are -inf
                values = (torch.where(listed & (values > -1e30), values, 0.0) * torch.arange(1, K + 1)).sum(-1)
            weights = (places_C * 1.7 + index).sin() + 1.2
            total = total + (batch.loss_mask_N * weights * (values + values.sin())).sum()
    return total


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("stops", [(), (0, 4, 7), (2, V + 1, 5)], ids=str)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), chunk=st.integers(1, N + 2), scale=st.sampled_from([1.0, 30.0]), bias=st.booleans())
def test_one_pass_equals_all_logits_at_once(
    name: str, stops: tuple[int, ...], seed: int, chunk: int, scale: float, bias: bool
) -> None:
    request, batch = replace(REQUESTS[name], stop_ids=stops), batch_of(seed, stops)
    torch.manual_seed(seed)
    head = nn.Linear(D, V, bias=bias, dtype=torch.float64)
    hidden = (torch.randn(N, D, dtype=torch.float64) * scale).requires_grad_()
    provider = ChunkedHead(chunk, rows_from=1000)
    assert provider.fuses(head, batch, request)
    found = provider.loss(hidden, head, batch, request, None, lambda at, view, _: some_loss(view, batch.at(at), at))
    wanted = some_loss(PlainHead()(hidden, head, batch, request), batch, torch.arange(N))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    inputs = [hidden, *head.parameters()]
    grads, wanted_grads = (torch.autograd.grad(2 * loss, inputs, materialize_grads=True) for loss in (found, wanted))
    for a, b in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * (1 + float(b.abs().max())))


LISTED = {
    outside: {"kind": "teacher_topk", "k": K, "outside": outside} for outside in ("bucket", "drop", "renormalize")
}
OBJECTIVES: dict[str, ObjectiveConfig] = {
    f"{kind}, {name}": DirectConfig.model_validate(
        {"divergence": {"kind": kind}, "support": support, "allow_drop": True}
    )
    for kind in REGISTRY
    for name, support in (LISTED | {"full": {"kind": "full", "k": V}}).items()
}
OBJECTIVES |= {
    f"{kind}, {advantage}": PolicyGradientConfig.model_validate(
        {"divergence": {"kind": kind}, "advantage": {"kind": advantage}, "ppo_clip": 0.2}
    )
    for kind in REGISTRY
    for advantage, credit in CREDITS.classes.items()
    if credit.tokenwise
} | {"sft": SftConfig()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_loss_and_gradients_of_all_logits_at_once(name: str) -> None:
    """In float64, and in float32 to the accuracy of float32."""
    config = OBJECTIVES[name]
    torch.manual_seed(8)
    batch = whole_lists(batch_of(8)) if name.endswith("full") else batch_of(8)
    objective, mask_N = make_objective(config), batch.loss_mask_N.double()
    assert objective.tokenwise and mask_N.sum() < N
    values, wanted = torch.randn(N, D), []
    layer = nn.Linear(D, V)
    for dtype, provider in (
        (torch.float64, None),
        (torch.float64, ChunkedHead(4, V)),
        (torch.float32, ChunkedHead(4, V)),
    ):
        hidden, head = values.to(dtype).requires_grad_(), deepcopy(layer).to(dtype)

        def share(places_C: Tensor, view: StudentView, _: StudentView | None = None) -> Tensor:
            return (mask_N[places_C] * objective(batch.at(places_C), view).per_token_N).sum()

        if provider is None:
            loss = share(torch.arange(N), PlainHead()(hidden, head, batch, objective.needs.student))
        else:
            assert provider.fuses(head, batch, objective.needs.student)
            loss = provider.loss(hidden, head, batch, objective.needs.student, None, share)
        found = [loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight, head.bias])]
        wanted = wanted or found
        tolerance = 1e-10 if dtype == torch.float64 else 2e-4
        for a, b in zip(found, wanted, strict=True):
            assert b.any()
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_a_large_head_has_the_gradients_of_all_logits_at_once() -> None:
    """Its products are made by another library (`products.py`)."""
    torch.manual_seed(11)
    hidden, head, batch = torch.randn(N, D), nn.Linear(D, LARGE + 13), batch_of(11)
    found = gradients(head_of(ChunkedHead(4), head), batch, hidden.requires_grad_())
    exact = deepcopy(head).double()
    wanted = gradients(head_of(PlainHead(), exact), batch, hidden.detach().double().requires_grad_())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=2e-6 * float(b.abs().max()))


def whole_lists(batch: TokenBatch) -> TokenBatch:
    """The teacher's whole distribution as the list of every token."""
    teacher = torch.randn(N, V, generator=torch.Generator().manual_seed(9)).log_softmax(-1)
    return replace(
        batch,
        support_ids_NK=torch.arange(V).expand(N, V),
        support_valid_N=torch.full((N,), V),
        teacher_support_logprobs_NK=teacher,
        teacher_tail_logmass_N=torch.full((N,), -torch.inf),
    )


@pytest.mark.parametrize("observe", [False, True])
def test_a_batch_without_a_token_that_counts_gives_a_zero_that_back_propagates(observe: bool) -> None:
    batch, head = replace(batch_of(10), loss_mask_N=torch.zeros(N)), nn.Linear(D, V)
    hidden = torch.randn(N, D, requires_grad=True)
    loss_head = head_of(ChunkedHead(4), head)
    assert loss_head.fuses(batch)
    loss = loss_head(hidden, forward_of(batch), observe)
    loss.backward()
    assert loss == 0 and loss_head.stats is not None and len(loss_head.stats.per_token_N) == 0
    for tensor in (hidden, head.weight, head.bias):
        assert tensor.grad is not None and not tensor.grad.any()


def forward_of(batch: TokenBatch) -> Forward:
    return Forward(torch.zeros(1, 1).long(), torch.arange(N), batch, torch.linspace(0.1, 0.2, N), True)


def head_of(provider: object, head: nn.Module, config: object = BUCKET) -> LossHead:
    return LossHead(head, make_objective(config), provider, None)


def gradients(loss_head: LossHead, batch: TokenBatch, hidden: Tensor, observe: bool = False) -> tuple[Tensor, ...]:
    """Loss, then the gradients of hidden states and weight."""
    loss = loss_head(hidden, forward_of(batch), observe)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, loss_head.head.weight])


@pytest.mark.parametrize("config", [BUCKET, PolicyGradientConfig(), SftConfig()], ids=["bucket", "sampled", "sft"])
def test_three_products_of_the_tokens_that_count(config: object) -> None:
    batch, head = batch_of(1), nn.Linear(D, V)
    counted = int(batch.loss_mask_N.sum())
    assert counted < N
    hidden = torch.randn(N, D, requires_grad=True)
    for provider, products in ((ChunkedHead(4), 3), (PlainHead(), 3 * N / counted)):
        loss_head = head_of(provider, head, config)
        assert loss_head.note is None
        with FlopCounterMode(display=False) as flops:
            loss_head(hidden, forward_of(batch), False).backward()
        assert flops.get_total_flops() == pytest.approx(products * 2 * counted * V * D)


def test_metrics_change_no_bit_of_the_loss_and_cost_no_product() -> None:
    batch, head, provider = batch_of(2), nn.Linear(D, V), ChunkedHead(5)
    hidden = torch.randn(N, D, requires_grad=True)
    silent, observed = (gradients(head_of(provider, head), batch, hidden, observe) for observe in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(silent, observed, strict=True))
    loss_head, plain = head_of(provider, head), head_of(PlainHead(), head)
    with FlopCounterMode(display=False) as flops:
        loss_head(hidden, forward_of(batch), True)
    assert flops.get_total_flops() == 3 * 2 * int(batch.loss_mask_N.sum()) * V * D
    plain(hidden, forward_of(batch), True)
    assert loss_head.stats is not None and plain.stats is not None
    kept = batch.loss_mask_N > 0
    assert loss_head.stats.metrics.keys() == plain.stats.metrics.keys() >= {"student_entropy", "overlap_ratio", "drift"}
    for name, values in loss_head.stats.metrics.items():
        torch.testing.assert_close(values, plain.stats.metrics[name][kept], rtol=1e-5, atol=1e-6)
    assert torch.equal(loss_head.stats.sample_N, batch.sample_N[kept])


def counted(stats: TokenStats, metric: str) -> Tensor:
    """bool: the tokens over which a metric has its mean."""
    kept, seen = stats.mask_N > 0, stats.seen(metric)
    return kept if seen is None else kept & seen


@pytest.mark.parametrize("outside", ["bucket", "renormalize"])
def test_metrics_of_a_share_of_the_tokens(outside: str) -> None:
    """What the loss yields itself is of all tokens, the rest of the share; no bit of the loss changes."""
    config = DirectConfig.model_validate({"support": {"kind": "teacher_topk", "k": K, "outside": outside}})
    batch, head, hidden = batch_of(7), nn.Linear(D, V), torch.randn(N, D, requires_grad=True)
    whole, some = (
        LossHead(head, make_objective(config), ChunkedHead(5, rows_from=1), None, metrics_share=share)
        for share in (1.0, 0.5)
    )
    wanted, found = (gradients(loss_head, batch, hidden, True) for loss_head in (whole, some))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert whole.stats is not None and some.stats is not None and some.stats.seen_N is not None
    free = {"teacher_mass"} | ({"student_mass", "reverse_kl"} if outside == "bucket" else set())
    assert some.stats.metrics.keys() == whole.stats.metrics.keys()
    assert some.stats.of_seen == whole.stats.metrics.keys() - free >= {"student_entropy", "drift"}
    for name, values in some.stats.metrics.items():
        at = counted(some.stats, name)
        assert 0 < int(at.sum()) <= int(batch.loss_mask_N.sum()) and (name in free) == bool(
            at[whole.stats.mask_N > 0].all()
        )
        # logits of fewer tokens are rounded otherwise, and drift is a small difference of these in float64
        torch.testing.assert_close(values[at], whole.stats.metrics[name][at], rtol=1e-5, atol=1e-6)
    if outside == "renormalize":
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            some(hidden, forward_of(batch), True)
        assert flops.get_total_flops() == pytest.approx(
            2 * int(counted(some.stats, "drift").sum()) * V * D, abs=2 * N * K * D
        )


@pytest.mark.parametrize("reason", ["subclass", "partitioned", "hooked", "credit"])
def test_falls_back_to_logits_made_twice(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    head = (Other if reason == "subclass" else nn.Linear)(D, V)
    config = PolicyGradientConfig() if reason == "credit" else BUCKET
    if reason == "partitioned":
        head.weight.ds_id = 0  # how DeepSpeed marks what ZeRO-3 holds in pieces
    elif reason == "hooked":
        head.register_forward_hook(lambda *_: None)
    elif reason == "credit":
        monkeypatch.setattr(type(config.advantage), "tokenwise", False)
    batch, hidden = batch_of(3), torch.randn(N, D, requires_grad=True)
    loss_head = head_of(ChunkedHead(4), head, config)
    assert not loss_head.fuses(batch)
    words = {"subclass": "is a Other", "partitioned": "ZeRO-3", "hooked": "has hooks", "credit": "not tokenwise"}
    assert loss_head.note is not None and words[reason] in loss_head.note
    wanted = gradients(head_of(PlainHead(), head, config), batch, hidden)
    torch.testing.assert_close(gradients(loss_head, batch, hidden), wanted)


def test_a_frozen_head_costs_two_products_and_a_tied_one_adds_up() -> None:
    batch, tokens = batch_of(4), torch.arange(N)
    embedding = nn.Embedding(V, D)
    head = nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    found = []
    for provider in (ChunkedHead(4), PlainHead()):
        embedding.weight.grad = None
        head_of(provider, head)(embedding(tokens).tanh(), forward_of(batch), False).backward()
        assert embedding.weight.grad is not None
        found.append(embedding.weight.grad)
    torch.testing.assert_close(found[0], found[1])
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    hidden = torch.randn(N, D, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        head_of(ChunkedHead(4), head)(hidden, forward_of(batch), False).backward()
    assert flops.get_total_flops() == 2 * 2 * int(batch.loss_mask_N.sum()) * V * D
    assert hidden.grad is not None and hidden.grad.any() and head.weight.grad is None


def test_the_heads_gradient_is_handed_over_without_a_copy_and_once() -> None:
    batch, head, seen = batch_of(5), nn.Linear(D, V, bias=False), []
    loss = head_of(ChunkedHead(4), head)(torch.randn(N, D, requires_grad=True), forward_of(batch), False)
    head.weight.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss.backward(retain_graph=True)
    assert head.weight.grad is not None and seen == [head.weight.grad.data_ptr()]
    with pytest.raises(RuntimeError, match="back-propagated already; compute it again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bucket_that_holds_almost_nothing_has_an_exact_gradient(dtype: torch.dtype) -> None:
    """Outside of its list the student has a mass of e^-60, far below the resolution of 1 - mass; the teacher has a tenth."""
    batch = replace(batch_of(6), loss_mask_N=torch.ones(N), support_valid_N=torch.full((N,), K))
    assert batch.support_ids_NK is not None
    batch = replace(
        batch,
        support_ids_NK=torch.arange(K).expand(N, K),
        teacher_support_logprobs_NK=torch.full((N, K), 0.3).log(),
        teacher_tail_logmass_N=torch.full((N,), 0.1).log(),
    )
    config = DirectConfig.model_validate(
        {
            "divergence": {"kind": "forward_kl"},
            "support": {"kind": "teacher_topk", "k": K, "outside": "bucket"},
            "tail_logmass_min": -80,
            "logprob_min": -80,
        }
    )
    head = nn.Linear(V, V, bias=False, dtype=dtype)
    head.weight.data = torch.eye(V, dtype=dtype)
    logits = torch.randn(N, V).to(dtype)
    logits[:, :K] += 64
    exact = nn.Linear(V, V, bias=False, dtype=torch.float64)
    exact.weight.data = torch.eye(V, dtype=torch.float64)
    wide = logits.double().requires_grad_()
    wanted = gradients(head_of(PlainHead(), exact, config), batch, wide)
    found = gradients(head_of(ChunkedHead(5), head, config), batch, logits.requires_grad_())
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)  # a logit of 64 is rounded by 4e-6 in float32
    assert float(wanted[1][:, K:].abs().min()) > 1e-7
    torch.testing.assert_close(found[0].double(), wanted[0].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][:, K:].double(), wanted[1][:, K:], rtol=tolerance, atol=0)
    # of listed ids it is a difference of probabilities, times a weight of 0.2 at most
    torch.testing.assert_close(found[1][:, :K].double(), wanted[1][:, :K], rtol=tolerance, atol=1e-5)
