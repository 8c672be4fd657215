"""Head providers: chunked and K-row answers equal the plain ones, in values and gradients, and take no more memory."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.head import ChunkedHead
from tasks.losses.needs import StudentRequest
from tasks.losses.types import StudentView, TokenBatch

D, V, K = 5, 23, 3
EVERYTHING = StudentRequest("teacher_topk", True, True, True, True, True)
REQUESTS = {
    "rows": StudentRequest("teacher_topk"),
    "bucket": StudentRequest("teacher_topk", log_normaliser=True, tail=True),
    "sampled": StudentRequest(token_logprobs=True),
    "everything": EVERYTHING,
    "excluded": StudentRequest("teacher_topk", True, True, True, True, True, exclude_ids=(0, 4)),
}


def batch_of(n: int, seed: int = 0, masked: bool = True) -> TokenBatch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(V, generator=draw)[:K] for _ in range(n)]) if n else torch.zeros(0, K).long()
    valid = torch.randint(0, K + 1, (n,), generator=draw)
    return TokenBatch(
        token_ids_N=torch.randint(0, V, (n,), generator=draw),
        loss_mask_N=(torch.rand(n, generator=draw) > 0.3).float() if masked else torch.ones(n),
        sample_N=torch.zeros(n, dtype=torch.int64),
        position_N=torch.arange(n),
        support_ids_NK=ids.masked_fill(torch.arange(K) >= valid[:, None], 0),
        support_valid_N=valid,
    )


def head_of(dtype: torch.dtype = torch.float64, bias: bool = True, size: int = V) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(D, size, bias=bias, dtype=dtype)


def flat(view: StudentView, batch: TokenBatch) -> Tensor:
    """All answers at unmasked tokens and listed entries, in one vector."""
    kept = batch.loss_mask_N > 0
    assert batch.support_valid_N is not None
    listed = torch.arange(K) < batch.support_valid_N[:, None]
    parts = []
    for entry in fields(view):
        value = getattr(view, entry.name)
        if value is not None:
            parts.append((value[kept[:, None] & listed] if entry.name.endswith("_NK") else value[kept]).reshape(-1))
    found = torch.cat(parts)
    return found[found > -1e30]  # excluded ids are -inf


def answers(provider: object, head: nn.Module, n: int, request: StudentRequest) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(8)
    hidden = torch.randn(n, D, dtype=torch.float64, requires_grad=True)
    batch = batch_of(n)
    values = flat(provider(hidden, head, batch, request), batch)
    weights = torch.linspace(1, 2, values.numel(), dtype=torch.float64)
    inputs = [hidden, *head.parameters()]
    return values.detach(), list(torch.autograd.grad((weights * values).sum(), inputs, materialize_grads=True))


@pytest.mark.parametrize("name", REQUESTS)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 12), chunk=st.integers(1, 14), rows_from=st.sampled_from([0, 1000]), bias=st.booleans())
def test_chunked_equals_plain(name: str, n: int, chunk: int, rows_from: int, bias: bool) -> None:
    head, request = head_of(bias=bias), REQUESTS[name]
    wanted, wanted_grads = answers(PlainHead(), head, n, request)
    found, grads = answers(ChunkedHead(chunk, rows_from), head, n, request)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_plain_answers_by_definition() -> None:
    head, batch = head_of(), batch_of(6, masked=False)
    hidden = torch.randn(6, D, dtype=torch.float64)
    view = PlainHead()(hidden, head, batch, EVERYTHING)
    log_p = head(hidden).log_softmax(-1).detach()
    assert batch.support_ids_NK is not None and batch.support_valid_N is not None
    for n in range(6):
        ids = batch.support_ids_NK[n, : batch.support_valid_N[n]]
        rest = torch.tensor([v for v in range(V) if v not in ids.tolist()])
        assert view.support_logprobs_NK is not None and view.support_tail_logmass_N is not None
        assert view.token_logprobs_N is not None and view.entropy_N is not None and view.support_overlap_N is not None
        torch.testing.assert_close(view.support_logprobs_NK[n, : len(ids)], log_p[n, ids])
        torch.testing.assert_close(view.support_tail_logmass_N[n], log_p[n, rest].logsumexp(0))
        torch.testing.assert_close(view.token_logprobs_N[n], log_p[n, batch.token_ids_N[n]])
        torch.testing.assert_close(view.entropy_N[n], -(log_p[n].exp() * log_p[n]).sum())
        top = set(log_p[n].topk(len(ids)).indices.tolist())
        assert view.support_overlap_N[n] == pytest.approx(len(top & set(ids.tolist())) / max(1, len(ids)))


def test_excluded_ids_do_not_exist_where_they_are_listed_but_for_the_sampled_token() -> None:
    head, batch = head_of(), batch_of(6, masked=False)
    ids = torch.tensor([[0, 4, 7], [9, 4, 1], [1, 2, 3], [4, 5, 6], [5, 0, 6], [0, 3, 4]])
    valid = torch.tensor([3, 3, 3, 1, 1, 3])  # what lies past the end of a list is not listed
    batch = replace(batch, token_ids_N=torch.tensor([0, 4, 1, 0, 2, 4]), support_ids_NK=ids, support_valid_N=valid)
    hidden = torch.randn(6, D, dtype=torch.float64)
    view = PlainHead()(hidden, head, batch, REQUESTS["excluded"])
    logits = head(hidden).detach()
    log_p = logits.log_softmax(-1)
    left = logits.clone()
    for n, gone in enumerate([[0, 4], [4], [], [4], [], [0, 4]]):
        left[n, gone] = -torch.inf
    assert view.token_logprobs_N is not None and view.entropy_N is not None and view.log_normaliser_N is not None
    torch.testing.assert_close(view.token_logprobs_N, log_p.gather(1, batch.token_ids_N[:, None])[:, 0])
    torch.testing.assert_close(view.entropy_N, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(view.log_normaliser_N, left.logsumexp(-1))
    assert batch.support_ids_NK is not None and batch.support_valid_N is not None
    assert view.support_logprobs_NK is not None and view.support_tail_logmass_N is not None
    for n in range(6):
        ids = batch.support_ids_NK[n, : batch.support_valid_N[n]]
        rest = torch.tensor([v for v in range(V) if v not in ids.tolist()])
        torch.testing.assert_close(view.support_logprobs_NK[n, : len(ids)], left.log_softmax(-1)[n, ids])
        torch.testing.assert_close(view.support_tail_logmass_N[n], left.log_softmax(-1)[n, rest].logsumexp(0))
        mine = [v for v in ids.tolist() if left[n, v] > -torch.inf]
        top = set(left[n].topk(len(mine)).indices.tolist())
        assert view.support_overlap_N is not None
        assert view.support_overlap_N[n] == pytest.approx(len(top & set(mine)) / max(1, len(mine)))


def test_overlap_is_of_the_teachers_list_whatever_the_support() -> None:
    """Of a union its front; unknown where only the student's list is there, and where a union does not say."""
    head, batch = head_of(), batch_of(6, masked=False)
    hidden = torch.randn(6, D, dtype=torch.float64)
    order = head(hidden).argsort(-1, descending=True)
    ids = torch.stack([order[:, 0], order[:, 22], order[:, 1]], 1)  # the teacher's two, and one of the student's
    batch = replace(batch, support_ids_NK=ids, support_valid_N=torch.full((6,), 3))
    union = replace(batch, support_teacher_valid_N=torch.full((6,), 2))

    def overlap(of: TokenBatch, kind: str, provider: object) -> Tensor | None:
        return provider(hidden, head, of, replace(EVERYTHING, support=kind)).support_overlap_N

    for provider in (PlainHead(), ChunkedHead(4)):
        assert overlap(batch, "teacher_topk", provider).tolist() == [pytest.approx(2 / 3)] * 6
        assert overlap(union, "union", provider).tolist() == [0.5] * 6
        assert overlap(batch, "student_topk", provider) is None and overlap(batch, "union", provider) is None


class Recording(nn.Linear):
    """A head that remembers how many rows it was given."""

    seen: list[int]

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(input.shape[0])
        return super().forward(input)


def test_chunks_bound_the_logits_and_masked_tokens_cost_nothing() -> None:
    head = Recording(D, V)
    head.seen = []
    batch = batch_of(40)
    hidden = torch.randn(40, D, requires_grad=True)
    view = ChunkedHead(4)(hidden, head, batch, REQUESTS["sampled"])
    assert max(head.seen) <= 4 and sum(head.seen) == int(batch.loss_mask_N.sum()) < 40
    assert view.token_logprobs_N is not None
    view.token_logprobs_N.sum().backward()
    assert sum(head.seen) == 2 * int(batch.loss_mask_N.sum())  # once more in backward
    assert hidden.grad is not None and not hidden.grad[batch.loss_mask_N == 0].any()


def test_rows_never_make_logits_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of()
    monkeypatch.setattr(head, "forward", lambda hidden: pytest.fail("the whole head was applied"))
    batch = batch_of(6)
    hidden = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    provider = ChunkedHead(2, rows_from=V // K)
    view = provider(hidden, head, batch, REQUESTS["rows"])
    assert view.log_normaliser_N is None and view.support_logprobs_NK is not None
    view.support_logprobs_NK.sum().backward()
    with pytest.raises(pytest.fail.Exception):
        provider(hidden, head, batch, REQUESTS["bucket"])


@pytest.mark.parametrize("reason", ["subclass", "partitioned", "hooked"])
def test_rows_fall_back_to_calling_the_head(reason: str) -> None:
    head = Recording(D, V, dtype=torch.float64)
    head.seen = []
    if reason != "subclass":
        head = head_of()
        head.register_forward_hook(lambda *_: calls.append(1)) if reason == "hooked" else None
        if reason == "partitioned":
            head.weight.ds_id = 0  # how DeepSpeed marks what ZeRO-3 holds in pieces
    calls: list[int] = []
    wanted, wanted_grads = answers(PlainHead(), head, 7, REQUESTS["rows"])
    calls.clear()
    found, grads = answers(ChunkedHead(2, 0), head, 7, REQUESTS["rows"])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads[1], wanted_grads[1])
    assert not ChunkedHead(2, 0)._rows_apply(head, K)
    assert len(calls) > 0 or reason != "hooked"


@pytest.mark.parametrize("request_name", ["rows", "bucket"])
def test_bfloat16_is_summed_in_float32(request_name: str) -> None:
    """Many equal contributions to one head row: in bfloat16 sums a running total would stall at 256."""
    n = 2000
    head = nn.Linear(1, V, bias=False, dtype=torch.bfloat16)
    batch = TokenBatch(
        token_ids_N=torch.zeros(n, dtype=torch.int64),
        loss_mask_N=torch.ones(n),
        sample_N=torch.zeros(n, dtype=torch.int64),
        position_N=torch.arange(n),
        support_ids_NK=torch.tensor([[3, 5]]).expand(n, 2),
        support_valid_N=torch.full((n,), 2),
    )
    hidden = torch.ones(n, 1, dtype=torch.bfloat16, requires_grad=True)
    view = ChunkedHead(n, 0)(hidden, head, batch, REQUESTS[request_name])
    assert view.support_logprobs_NK is not None and view.support_logprobs_NK.dtype == torch.float32
    if request_name == "rows":
        view.support_logprobs_NK[:, 0].sum().backward()
        assert head.weight.grad is not None and head.weight.grad.dtype == torch.bfloat16
        assert float(head.weight.grad[3]) == pytest.approx(n, rel=0.01)
    else:
        assert view.log_normaliser_N is not None and view.log_normaliser_N.dtype == torch.float32


def test_repeated_and_shared_ids_add_up() -> None:
    head = head_of(bias=True)
    hidden = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2], [2, 1], [1, 9]])
    batch = TokenBatch(
        token_ids_N=torch.zeros(3, dtype=torch.int64),
        loss_mask_N=torch.ones(3),
        sample_N=torch.zeros(3, dtype=torch.int64),
        position_N=torch.arange(3),
        support_ids_NK=ids,
        support_valid_N=torch.tensor([2, 2, 1]),
    )

    def scores(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        head_ = nn.Linear(D, V, dtype=torch.float64)
        del head_.weight, head_.bias
        head_.weight, head_.bias = w, b
        out = ChunkedHead(2, 0)(h, head_, batch, REQUESTS["rows"]).support_logprobs_NK
        assert out is not None
        return out

    assert torch.autograd.gradcheck(scores, (hidden, head.weight, head.bias))
