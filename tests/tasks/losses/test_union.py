"""The union of two stored lists, against a sum over the set of ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import DirectConfig
from tasks.losses.divergences import REGISTRY
from tasks.losses.head import ChunkedHead
from tasks.losses.types import TokenBatch
from tasks.trainer.topk_lists import Rectangle, TopK, UnionTopK, harmless

N, V = 3, 8
every = pytest.mark.parametrize("kind", REGISTRY)
logits = arrays(np.float64, (2, N, V), elements=st.floats(-2, 2))


def stored(log_q_NV: Tensor, of_NV: Tensor, counts_N: Tensor, k: int) -> TopK:
    """The teacher's log-probabilities on the top entries of `of_NV`, as a signal keeps them."""
    order = of_NV.argsort(1, descending=True)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts_N.cumsum(0)[:-1]))
    ids = [order[n, :count] for n, count in enumerate(counts_N.tolist())]
    rest = [order[n, count:] for n, count in enumerate(counts_N.tolist())]
    return TopK(
        k=k,
        starts=starts.numpy(),
        counts=counts_N.numpy(),
        ids=torch.cat(ids).numpy(),
        teacher=torch.cat([log_q_NV[n, i] for n, i in enumerate(ids)]).numpy(),
        student=None,
        teacher_tail=torch.stack([log_q_NV[n, i].logsumexp(0) for n, i in enumerate(rest)]).numpy(),
    )


def batch_of(found: Rectangle) -> TokenBatch:
    return TokenBatch(
        token_ids_N=torch.zeros(N, dtype=torch.int64),
        loss_mask_N=torch.ones(N),
        sample_N=torch.arange(N),
        position_N=torch.zeros(N, dtype=torch.int64),
        support_ids_NK=torch.from_numpy(found.ids_NK),
        support_valid_N=torch.from_numpy(found.valid_N),
        teacher_support_logprobs_NK=torch.from_numpy(found.teacher_NK).double(),
        teacher_tail_logmass_N=torch.from_numpy(found.teacher_tail_N).double(),
        support_teacher_valid_N=None if found.teacher_valid_N is None else torch.from_numpy(found.teacher_valid_N),
    )


def direct(p_NV: Tensor, found: Rectangle, kind: str, outside: str, provider: Any) -> Tensor:
    support = {"kind": "union", "k": 4, "outside": outside}
    objective = make_objective(DirectConfig(divergence={"kind": kind}, support=support, allow_drop=True))
    batch = batch_of(found)
    return objective(batch, provider(p_NV, nn.Identity(), batch, objective.needs.student)).per_token_N


def enumerated(p_V: Tensor, q_V: Tensor, ids: set[int], kind: str, outside: str) -> Tensor:
    """The divergence of probabilities over the ids of a set, by definition."""
    chosen = sorted(ids)
    others = [v for v in range(V) if v not in ids]
    p, q = p_V[chosen], q_V[chosen]
    if outside == "renormalize":
        p, q = p / p.sum(), q / q.sum()
    if outside == "bucket":
        p, q = (torch.cat((x[chosen], x[others].sum()[None])) for x in (p_V, q_V))
    return REGISTRY[kind]().terms(p.log(), q.log()).sum()


@every
@pytest.mark.parametrize("outside", ["renormalize", "bucket", "drop"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_union_is_the_sum_over_the_set(kind: str, outside: str, data: st.DataObject) -> None:
    p, q = torch.from_numpy(data.draw(logits))
    p.requires_grad_()
    log_p, log_q = p.log_softmax(1).detach(), q.log_softmax(1)
    counts = [torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=N, max_size=N))) for _ in range(2)]
    lists = [stored(log_q, of, count, 3) for of, count in zip((log_q, log_p), counts, strict=True)]  # more than is used
    found = direct(p, UnionTopK(*lists).rows(np.arange(N)), kind, outside, ChunkedHead(2))
    tops = [of.argsort(1, descending=True) for of in (log_q, log_p)]
    sets = [{int(v) for of, count in zip(tops, counts, strict=True) for v in of[n, : count[n]][:3]} for n in range(N)]
    wanted = torch.stack(
        [enumerated(p.softmax(1)[n], log_q[n].exp(), ids, kind, outside) for n, ids in enumerate(sets)]
    )
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)  # lists and tails are stored in float32
    grads = [torch.autograd.grad(x.sum(), p)[0] for x in (found, wanted)]
    if kind != "total_variation":  # it has a kink where p = q
        torch.testing.assert_close(grads[0], grads[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("provider", [PlainHead(), ChunkedHead(2)], ids=["plain", "chunked"])
def test_a_union_may_be_wider_than_the_vocabulary(provider: Any) -> None:
    """Two lists of 6 of 8 ids: 12 columns, at most 8 of them valid. Metrics are asked for, and a filler has none."""
    torch.manual_seed(0)
    log_q, p = torch.randn(N, V).double().log_softmax(1), torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    old = (p.detach() + torch.randn(N, V)).log_softmax(1)
    lists = [stored(log_q, of, torch.full((N,), 6), 6) for of in (log_q, old)]
    rectangle = UnionTopK(*lists).rows(np.arange(N))
    assert rectangle.ids_NK.shape[1] == 12 > V
    objective = make_objective(DirectConfig(support={"kind": "union", "k": 6, "outside": "bucket"}))
    for found, counts in ((rectangle, 1.0), (harmless(rectangle), 0.0)):
        batch = replace(batch_of(found), loss_mask_N=torch.full((N,), counts))
        views = [
            provider(p, nn.Identity(), batch, wanted) for wanted in (objective.needs.student, objective.needs.metrics)
        ]
        out = objective(batch, *views)
        out.per_token_N.sum().backward()
        assert out.per_token_N.isfinite().all() and bool(out.per_token_N.any()) == bool(counts)
        live = [set(row.topk(6).indices.tolist()) for row in p]
        wanted = [len(a & set(row.topk(6).indices.tolist())) / 6 * counts for a, row in zip(live, log_q, strict=True)]
        assert out.metrics["overlap_ratio"].tolist() == pytest.approx(wanted)


@every
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_union_tells_more_than_either_list_and_less_than_all(kind: str, data: st.DataObject) -> None:
    p, q = torch.from_numpy(data.draw(logits))
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    counts = torch.full((N,), data.draw(st.integers(1, 4)))
    lists = [stored(log_q, of, counts, 4) for of in (log_q, log_p)]
    index = np.arange(N)
    both = direct(p, UnionTopK(*lists).rows(index), kind, "bucket", PlainHead())
    alone = [direct(p, one.rows(index), kind, "bucket", PlainHead()) for one in lists]
    full = REGISTRY[kind]().terms(log_p, log_q).sum(1)
    slack = 2e-6 * (1 + full)
    assert (both <= full + slack).all()
    assert all((one <= both + slack).all() for one in alone)
