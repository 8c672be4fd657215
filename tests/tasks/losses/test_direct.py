"""The direct estimator: properties for every registered divergence, and what the reference file does not cover."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plain_head import PlainHead
from torch import Tensor, nn

from storage.schemas import schema_for
from tasks.losses.build import make_objective
from tasks.losses.config import DirectConfig
from tasks.losses.divergences import REGISTRY, ReverseKL
from tasks.losses.head import ChunkedHead
from tasks.losses.types import ObjectiveOutput, TokenBatch

every = pytest.mark.parametrize("kind", REGISTRY)
INFINITY = float("inf")


def batch_of(q_NV: Tensor, ids_NK: Tensor, valid_N: Tensor | None = None, mask_N: Tensor | None = None) -> TokenBatch:
    """Teacher logits and a support, as cached signals: log-probabilities, padding, tail."""
    n, k = ids_NK.shape
    log_q = q_NV.float().log_softmax(-1) if q_NV.dtype.itemsize < 4 else q_NV.log_softmax(-1)
    valid = torch.full((n,), k) if valid_N is None else valid_N
    listed = torch.arange(k) < valid[:, None]
    inside = torch.zeros_like(log_q).scatter_add(1, ids_NK, listed.to(log_q.dtype)) > 0
    return TokenBatch(
        token_ids_N=torch.zeros(n, dtype=torch.int64),
        loss_mask_N=torch.ones(n) if mask_N is None else mask_N,
        sample_N=torch.arange(n),
        position_N=torch.zeros(n, dtype=torch.int64),
        student_logprobs_N=torch.full((n,), -1.0),
        support_ids_NK=ids_NK.masked_fill(~listed, 0),
        support_valid_N=valid,
        teacher_support_logprobs_NK=log_q.gather(1, ids_NK).masked_fill(~listed, -INFINITY),
        teacher_tail_logmass_N=log_q.masked_fill(inside, -INFINITY).logsumexp(1),
    )


def run(
    p_NV: Tensor, batch: TokenBatch, kind: str, outside: str, provider: Any = None, **fields: Any
) -> ObjectiveOutput:
    support = {"kind": "teacher_topk", "k": 2, "outside": outside}  # only `outside` matters here: the batch has the ids
    config = DirectConfig(divergence={"kind": kind}, support=support, allow_drop=True, **fields)
    objective = make_objective(config)
    view = (provider or PlainHead())(p_NV, nn.Identity(), batch, objective.needs.student)
    return objective(batch, view)


def logits(data: st.DataObject, n: int = 3, v: int = 7, bound: float = 6) -> Tensor:
    return torch.from_numpy(data.draw(arrays(np.float64, (n, v), elements=st.floats(-bound, bound))))


@every
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_bucket_grows_with_the_support_to_the_full_divergence(kind: str, data: st.DataObject) -> None:
    p, q = logits(data), logits(data)
    by = data.draw(st.sampled_from(["teacher", "student", "anything"]))  # any growing support, not only the teacher's
    order = {"teacher": q, "student": p, "anything": logits(data)}[by].argsort(1, descending=True)
    full = REGISTRY[kind]().terms(p.log_softmax(1), q.log_softmax(1)).sum(1)
    slack = 1e-9 * (1 + full)
    before = torch.full_like(full, -1e-12)
    for k in range(1, p.shape[1] + 1):
        bucketed = run(p, batch_of(q, order[:, :k]), kind, "bucket").per_token_N
        assert (bucketed >= before - slack).all()
        assert (bucketed <= full + slack).all()
        before = bucketed
        if k > 1:
            assert (run(p, batch_of(q, order[:, :k]), kind, "renormalize").per_token_N >= -1e-12).all()
    torch.testing.assert_close(before, full, rtol=1e-9, atol=1e-10)
    for outside in ("renormalize", "drop"):
        whole = run(p, batch_of(q, order), kind, outside).per_token_N
        torch.testing.assert_close(whole, full, rtol=1e-9, atol=1e-10)


@every
@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
def test_nothing_to_learn_from_an_equal_teacher(kind: str, outside: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(4, 9, dtype=torch.float64) * 3
    p = q.clone().requires_grad_()
    batch = batch_of(q, q.topk(4, dim=1).indices)
    assert batch.support_ids_NK is not None
    out = run(p, batch, kind, outside).per_token_N
    assert out.abs().max() < 1e-12
    (grad,) = torch.autograd.grad(out.sum(), p)
    if kind == "total_variation":  # it has a kink here
        return
    if outside != "drop":
        assert grad.abs().max() < 1e-10
        return
    mass = torch.softmax(p, 1).gather(1, batch.support_ids_NK).sum(1)  # unnormalised: -w_f(1) dp, summed over S
    (of_mass,) = torch.autograd.grad(mass.sum(), p)
    torch.testing.assert_close(grad, -REGISTRY[kind]().w_at_one * of_mass, rtol=1e-9, atol=1e-10)


def hostile(dtype: torch.dtype) -> tuple[Tensor, TokenBatch]:
    """Student and teacher logits that break naive code, one trouble per row."""
    v, big = 8, 60.0 if dtype == torch.float16 else 200.0
    ramp = torch.linspace(-2, 2, v)
    only_first = torch.full((v,), -INFINITY)
    only_first[0] = 0
    one_hot = torch.zeros(v)
    one_hot[2] = big
    other_hot = torch.zeros(v)
    other_hot[5] = big
    half = ramp.clone()
    half[4:] = -INFINITY
    p = torch.stack([ramp, only_first, one_hot, one_hot, half, half, ramp, ramp])
    q = torch.stack([half, ramp, other_hot, one_hot, half, ramp.flip(0), ramp, only_first])
    ids = torch.stack([row.nan_to_num(neginf=-1e4).argsort(descending=True) for row in q])[:, :5]
    valid = torch.tensor([4, 5, 5, 5, 3, 1, 0, 1])
    return p.to(dtype).requires_grad_(), batch_of(q.to(dtype), ids, valid)


@every
@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hostile_inputs_have_finite_values_and_gradients(kind: str, outside: str, dtype: torch.dtype) -> None:
    p, batch = hostile(dtype)
    out = run(p, batch, kind, outside).per_token_N
    (grad,) = torch.autograd.grad(out.sum(), p)
    assert out.isfinite().all()
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = torch.finfo(dtype).max
    assert ((grad.isfinite()) | (out.detach()[:, None] > bound)).all()  # float16 cannot hold a chi2 of 1e17
    assert out[3].abs() < 1e-6  # equal one-hot rows


@every
@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
def test_half_precision_logits_are_computed_with_in_float32(kind: str, outside: str) -> None:
    """Nothing is lost but the rounding of the logits themselves; the gradient is rounded once, at the end."""
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(6)
        q, p = 3 * torch.randn(5, 9), (3 * torch.randn(5, 9)).to(dtype).requires_grad_()
        batch, wide = batch_of(q, q.topk(4, dim=1).indices), p.detach().double().requires_grad_()
        found, wanted = run(p, batch, kind, outside).per_token_N, run(wide, batch, kind, outside).per_token_N
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        (grad,), (wanted_grad,) = torch.autograd.grad(found.sum(), p), torch.autograd.grad(wanted.sum(), wide)
        precision = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=precision, atol=precision)


@every
@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
def test_masked_tokens_have_no_influence(kind: str, outside: str) -> None:
    torch.manual_seed(1)
    q, p = torch.randn(5, 9), torch.randn(5, 9)
    ids = q.topk(3, dim=1).indices
    mask = torch.tensor([1.0, 0, 1, 0, 1])
    clean = run(p, batch_of(q, ids, mask_N=mask), kind, outside)
    p2, q2 = p.clone(), q.clone()
    p2[1], q2[1], q2[3] = 50.0, float("nan"), INFINITY
    p2.requires_grad_()
    dirty = run(p2, batch_of(q2, ids, mask_N=mask), kind, outside)
    assert torch.equal(clean.per_token_N, dirty.per_token_N)
    assert clean.per_token_N[1] == clean.per_token_N[3] == 0
    (grad,) = torch.autograd.grad(dirty.per_token_N.sum(), p2)
    assert grad.isfinite().all() and not grad[[1, 3]].any() and grad[[0, 2, 4]].any()
    for name, values in dirty.metrics.items():
        assert torch.equal(values, clean.metrics[name]), name


@every
@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
def test_an_all_masked_batch_gives_a_zero_that_back_propagates(kind: str, outside: str) -> None:
    head = nn.Linear(6, 11, dtype=torch.bfloat16)
    hidden = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(4, 11)
    batch = batch_of(torch.full_like(q, float("nan")), q.topk(2, dim=1).indices, mask_N=torch.zeros(4))
    support = {"kind": "teacher_topk", "k": 2, "outside": outside}
    objective = make_objective(DirectConfig(divergence={"kind": kind}, support=support, allow_drop=True))
    for provider in (PlainHead(), ChunkedHead(2), ChunkedHead(2, rows_from=0)):
        hidden.grad = head.weight.grad = None
        loss = objective(batch, provider(hidden, head, batch, objective.needs.student)).per_token_N.sum()
        loss.backward()
        assert loss == 0
        assert hidden.grad is not None and not hidden.grad.any()
        assert head.weight.grad is not None and not head.weight.grad.any()


@every
@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
def test_padding_and_splitting_change_nothing(kind: str, outside: str) -> None:
    torch.manual_seed(2)
    q, p = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    ids = q.topk(5, dim=1).indices
    valid = torch.tensor([3, 3, 2, 3, 1, 3])
    whole = run(p, batch_of(q, ids[:, :3], valid), kind, outside).per_token_N
    wider = run(p, batch_of(q, ids, valid), kind, outside).per_token_N
    torch.testing.assert_close(wider, whole, rtol=1e-12, atol=1e-14)
    parts = [
        run(p[s], batch_of(q[s], ids[s, :3], valid[s]), kind, outside).per_token_N for s in (slice(2), slice(2, 6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


def test_tails_from_the_mass_agree_with_tails_from_the_complement() -> None:
    torch.manual_seed(3)
    q, p = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    batch = batch_of(q, q.topk(3, dim=1).indices)
    exact = run(p, batch, "reverse_kl", "bucket").per_token_N
    objective = make_objective(DirectConfig(support={"kind": "teacher_topk", "k": 3, "outside": "bucket"}))
    view = PlainHead()(p, nn.Identity(), batch, objective.needs.student)
    bare = TokenBatch(**{k: v for k, v in vars(batch).items() if k != "teacher_tail_logmass_N"})
    without = type(view)(**{k: v for k, v in vars(view).items() if k != "support_tail_logmass_N"})
    by_mass = objective(bare, without).per_token_N
    torch.testing.assert_close(by_mass, exact, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), p, retain_graph=True)[0] for x in (exact, by_mass)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_small_tails_are_not_lost_in_float32(kind: str) -> None:
    """One minus a float32 sum knows nothing of a mass of 1e-9; the tails that are handed over do, of both models."""
    torch.manual_seed(7)
    n, v = 4, 9
    p, q = torch.randn(n, v, dtype=torch.float64), torch.randn(n, v, dtype=torch.float64)
    p[:2, 3:] -= 22  # the student's tail is small in the first two rows, the teacher's in rows 1 and 2
    q[1:3, 3:] -= 22
    ids = torch.arange(3).expand(n, 3)
    wide, narrow = (x.requires_grad_() for x in (p.clone(), p.float()))
    found = run(narrow, batch_of(q.float(), ids), kind, "bucket").per_token_N
    wanted = run(wide, batch_of(q, ids), kind, "bucket").per_token_N
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    grads = [torch.autograd.grad(x.sum(), y)[0].double() for x, y in ((found, narrow), (wanted, wide))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_a_floored_category_keeps_its_value_bounded(outside: str) -> None:
    p, batch = hostile(torch.float32)
    out = run(p, batch, "forward_kl", outside, logprob_min=-10.0, tail_logmass_min=-10.0).per_token_N
    assert (out <= 10 + math.log(6)).all()
    assert out.max() > 9  # the one-hot student against the other one-hot teacher is at the floor


def test_excluded_ids_do_not_exist_for_either_model() -> None:
    """With every excluded id in the support: equal to both models having -inf there."""
    torch.manual_seed(4)
    q, p = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    gone = (2, 7)
    rest = torch.tensor([v for v in range(9) if v not in gone])
    top = q[:, rest].topk(3, dim=1).indices
    small = batch_of(q[:, rest], top)
    ids = torch.cat((rest[top], torch.tensor(gone).expand(4, 2)), 1)
    for outside in ("renormalize", "bucket", "drop"):
        wanted = run(p[:, rest], small, "forward_kl", outside).per_token_N
        found = run(p, batch_of(q, ids), "forward_kl", outside, support_exclude_ids=gone).per_token_N
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
def test_excluded_ids_that_no_list_holds_leave_neither_tail(outside: str) -> None:
    """Nothing to learn from an equal teacher, wherever the excluded ids stand in its order."""
    torch.manual_seed(8)
    q = 2 * torch.randn(4, 9, dtype=torch.float64)
    p, order = q.clone().requires_grad_(), q.argsort(1, descending=True)
    gone = tuple(sorted({int(order[0, 0]), int(order[1, 2]), int(order[2, 3]), int(order[3, 8])}))
    batch = batch_of(q, order[:, :3])
    held = [len(set(gone) & set(row)) for row in order[:, :3].tolist()]
    assert min(held) < len(gone) and max(held) > 0
    for kind in ("reverse_kl", "forward_kl"):
        if outside == "drop" and kind == "reverse_kl":
            continue
        out = run(p, batch, kind, outside, support_exclude_ids=gone).per_token_N
        assert out.abs().max() < 1e-12
        if outside != "drop":
            assert torch.autograd.grad(out.sum(), p)[0].abs().max() < 1e-10


def test_metrics_are_columns_and_mean_what_they_say() -> None:
    torch.manual_seed(5)
    q, p = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    batch = batch_of(q, q.topk(3, dim=1).indices)
    objective = make_objective(DirectConfig(support={"kind": "teacher_topk", "k": 3, "outside": "renormalize"}))
    view = PlainHead()(p, nn.Identity(), batch, objective.needs.student)
    assert set(objective(batch, view).metrics) == {"teacher_mass"}
    observed = PlainHead()(p, nn.Identity(), batch, objective.needs.metrics)
    metrics = objective(batch, view, observed).metrics
    assert set(metrics) <= set(schema_for("training_steps").names)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    ids = batch.support_ids_NK
    assert ids is not None

    def bucketed(x: Tensor) -> Tensor:
        kept = x.exp().gather(1, ids)
        return torch.cat((kept, 1 - kept.sum(1, keepdim=True)), 1).log()

    shared = [len(set(a) & set(b)) / 3 for a, b in zip(p.topk(3, dim=1).indices.tolist(), ids.tolist(), strict=True)]
    expected = {
        "teacher_mass": log_q.exp().gather(1, ids).sum(1),
        "student_mass": log_p.exp().gather(1, ids).sum(1),
        "overlap_ratio": torch.tensor(shared),
        "student_entropy": -(log_p.exp() * log_p).sum(1),
        "reverse_kl": ReverseKL().terms(bucketed(log_p), bucketed(log_q)).sum(1),
        "log_ratio_mean": log_p[:, 0] + 1,
    }
    assert set(metrics) == set(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(metrics[name], wanted, check_dtype=False, rtol=1e-6, atol=1e-9)
