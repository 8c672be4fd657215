"""Merged stop ids: values against float64 numpy over dictionaries of probabilities, gradients by differences and enumeration."""

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
from tasks.losses.config import DirectConfig, PolicyGradientConfig
from tasks.losses.divergences import REGISTRY
from tasks.losses.head import ChunkedHead
from tasks.losses.needs import StudentRequest
from tasks.losses.stop_ids import merge_ids, merge_listed, merge_rows, merge_scores, merged_score
from tasks.losses.types import StudentView, TokenBatch

V, STOPS = 9, (6, 2, 7)
"""The student ends with 6, the teacher with 2 or 7."""
FLOOR = -float("inf")
Probabilities = dict[int, float]


def merged(logits_V: Any) -> Probabilities:
    """id -> probability, the stop ids counted once: sums of a softmax, without a logarithm."""
    x = np.asarray(logits_V, np.float64)
    p = np.exp(x - x.max())
    p = p / p.sum()
    found = {index: float(p[index]) for index in range(len(p)) if index not in STOPS}
    return found | {STOPS[0]: float(sum(p[index] for index in STOPS))}


def kl(p: list[float], q: list[float]) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def compared(p: Probabilities, q: Probabilities, ids: list[int], outside: str) -> tuple[list[float], list[float]]:
    ps, qs = [p[i] for i in ids], [q[i] for i in ids]
    if outside == "renormalize":
        return [x / sum(ps) for x in ps], [x / sum(qs) for x in qs]
    if outside == "bucket" and len(ids) < len(p):
        return [*ps, sum(p[i] for i in p if i not in ids)], [*qs, sum(q[i] for i in q if i not in ids)]
    return ps, qs


def top(p: Probabilities, k: int) -> list[int]:
    return sorted(p, key=lambda index: -p[index])[:k]


def logs(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def listed(p: Probabilities, q: Probabilities, old: Probabilities, ids: list[int], y: int, width: int) -> TokenBatch:
    """One token with a stored list: what the scorer writes for it, padded."""
    pad = width - len(ids)
    rest = sum(q[i] for i in q if i not in ids)

    def padded(values: Tensor) -> Tensor:
        return torch.cat((values, torch.full((pad,), FLOOR, dtype=torch.float64)))[None]

    return TokenBatch(
        token_ids_N=torch.tensor([y]),
        loss_mask_N=torch.ones(1),
        sample_N=torch.zeros(1, dtype=torch.int64),
        position_N=torch.zeros(1, dtype=torch.int64),
        student_logprobs_N=logs([old[STOPS[0] if y in STOPS else y]]),
        teacher_logprobs_N=logs([q[STOPS[0] if y in STOPS else y]]),
        support_ids_NK=torch.tensor([[*ids, *[0] * pad]]),
        support_valid_N=torch.tensor([len(ids)]),
        teacher_support_logprobs_NK=padded(logs([q[i] for i in ids])),
        student_support_logprobs_NK=padded(logs([old[i] for i in ids])),
        teacher_tail_logmass_N=logs([rest]) if rest > 0 else torch.tensor([FLOOR]).double(),
    )


def per_token(config: Any, logits_V: Tensor, batch: TokenBatch, provider: Any = None) -> Tensor:
    objective = make_objective(config)
    request = replace(objective.needs.student, stop_ids=STOPS)
    view = (provider or PlainHead())(logits_V[None], nn.Identity(), batch, request)
    return objective(batch, view).per_token_N[0]


def pair(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student, teacher and rollout-time student; both stop, each mostly with its own ids."""
    draw = torch.Generator().manual_seed(seed)
    p, q, old = (1.5 * torch.randn(V, generator=draw, dtype=torch.float64) for _ in range(3))
    for logits, own in ((p, [6]), (old, [6]), (q, [2, 7])):
        logits[own] += 3
    return p, q, old


def differences(value: Any, at: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of `value` by central differences."""
    units = torch.eye(len(at), dtype=torch.float64) * step
    return torch.tensor([(float(value(at + unit)) - float(value(at - unit))) / (2 * step) for unit in units]).double()


CASES = [
    (support, k, outside)
    for support, k in (("teacher_topk", 3), ("student_topk", 3), ("union", 2), ("full", V))
    for outside in ("renormalize", "bucket", "drop")
]


@pytest.mark.parametrize("provider", [PlainHead(), ChunkedHead(2, 1000)], ids=["plain", "chunked"])
@pytest.mark.parametrize(("support", "k", "outside"), CASES)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_direct_values_and_gradients(kind: str, support: str, k: int, outside: str, provider: Any) -> None:
    for seed in range(3):
        p, q, _ = pair(seed)
        ours, theirs = merged(p), merged(q)
        ids = {
            "teacher_topk": top(theirs, k),
            "student_topk": top(ours, k),
            "union": list(dict.fromkeys(top(theirs, k) + top(ours, k))),
            "full": list(theirs),
        }[support]
        if support == "full" and outside != "renormalize":
            continue  # nothing is outside
        batch = listed(ours, theirs, ours, ids, y=2, width=len(ids) + 1)
        fields: dict[str, Any] = {"kind": support, "k": k} | ({} if support == "full" else {"outside": outside})
        config = DirectConfig(divergence={"kind": kind}, support=fields, allow_drop=True)

        def wanted(logits: Tensor, theirs=theirs, ids=ids, kind=kind) -> float:
            ps, qs = compared(merged(logits), theirs, ids, outside)
            return kl(ps, qs) if kind == "reverse_kl" else kl(qs, ps)

        live = p.clone().requires_grad_()
        value = per_token(config, live, batch, provider)
        assert float(value.detach()) == pytest.approx(wanted(p), abs=1e-9)
        (gradient,) = torch.autograd.grad(value, live)
        torch.testing.assert_close(gradient, differences(wanted, p), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", REGISTRY)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_merged_is_never_above_full(kind: str, data: st.DataObject) -> None:
    p, q = (torch.from_numpy(data.draw(arrays(np.float64, V, elements=st.floats(-4, 4)))) for _ in range(2))
    divergence = REGISTRY[kind]()

    def value(log_p: Tensor, log_q: Tensor) -> float:
        here = log_p > FLOOR
        return float(divergence.terms(log_p[here], log_q[here]).sum())

    full = value(p.log_softmax(-1), q.log_softmax(-1))
    whole = value(merge_scores(p[None], STOPS)[0].log_softmax(-1), merge_scores(q[None], STOPS)[0].log_softmax(-1))
    assert -1e-12 <= whole <= full + 1e-9 * (1 + abs(full))


OBJECTIVES: dict[str, Any] = {
    "direct": DirectConfig(support={"kind": "teacher_topk", "k": 3, "outside": "bucket"}),
    "renormalized": DirectConfig(support={"kind": "student_topk", "k": 3, "outside": "renormalize"}),
    "sampled": PolicyGradientConfig(),
    "rollout advantage": PolicyGradientConfig(advantage_at="rollout"),
    "candidates": PolicyGradientConfig(support={"kind": "student_topk", "k": 3}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("y", [6, 2, 7, 0])
def test_how_stop_mass_is_divided_gets_no_gradient(name: str, y: int) -> None:
    """Along a direction that moves mass between stop ids and keeps their sum, no loss changes."""
    p, q, old = pair(1)
    batch = listed(merged(p), merged(q), merged(old), top(merged(q), 3), y, 3)
    live = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(per_token(OBJECTIVES[name], live, batch), live)
    shares = p[list(STOPS)].softmax(-1)
    directions = torch.eye(3, dtype=torch.float64) - shares  # d z_stop along e_i is share_i: these keep it
    assert gradient.abs().max() > 1e-3
    for index in range(3):
        split = torch.zeros(V, dtype=torch.float64)
        split[list(STOPS)] = directions[index] - (directions[index] * shares).sum()
        assert abs(float((gradient * split).sum())) < 1e-12
    assert (gradient[list(STOPS)] / gradient[list(STOPS)].sum() - shares).abs().max() < 1e-9


def test_whichever_stop_id_was_emitted_has_the_category_s_loss() -> None:
    p, q, old = pair(2)
    for config in OBJECTIVES.values():
        values = [
            per_token(config, p, listed(merged(p), merged(q), merged(old), top(merged(q), 3), y, 3)) for y in STOPS
        ]
        assert values[0] == values[1] == values[2]


def test_sampled_gradient_in_expectation_is_that_of_the_merged_reverse_kl() -> None:
    """Enumerated over single ids, each drawn with its own probability."""
    p, q, _ = pair(3)
    theirs = merged(q)
    config = PolicyGradientConfig(log_ratio_clip=40)
    chances = p.softmax(-1)
    total = torch.zeros(V, dtype=torch.float64)
    for y in range(V):
        live = p.clone().requires_grad_()
        batch = listed(merged(p), theirs, merged(p), [0], y, 1)
        (gradient,) = torch.autograd.grad(per_token(config, live, batch), live)
        total += chances[y] * gradient

    def reverse_kl(logits: Tensor) -> float:
        ours = merged(logits)
        return kl([ours[i] for i in ours], [theirs[i] for i in ours])

    torch.testing.assert_close(total, differences(reverse_kl, p), rtol=1e-6, atol=1e-8)


def test_sampled_and_candidate_values_by_numpy() -> None:
    p, q, old = pair(4)
    ours, theirs, before = merged(p), merged(q), merged(old)
    for y in range(V):
        category = STOPS[0] if y in STOPS else y
        log_u = np.clip(np.log(theirs[category] / ours[category]), -6, 6)
        wanted = -log_u * ours[category] / before[category]
        value = per_token(PolicyGradientConfig(), p, listed(ours, theirs, before, [0], y, 1))
        assert float(value) == pytest.approx(wanted, abs=1e-9)
    ids = top(before, 3)
    weights = np.array([before[i] for i in ids])
    advantages = np.array([np.clip(np.log(theirs[i] / ours[i]), -6, 6) for i in ids])
    ratios = np.array([ours[i] / before[i] for i in ids])
    config = PolicyGradientConfig(support={"kind": "student_topk", "k": 3, "weights_at": "rollout"})
    wanted = -(weights / weights.sum() * advantages * ratios).sum()
    value = per_token(config, p, listed(ours, theirs, before, ids, 0, 3))
    assert float(value) == pytest.approx(wanted, abs=1e-9)


def test_entropy_overlap_and_tail_count_the_category_once() -> None:
    p, q, _ = pair(5)
    ours, theirs = merged(p), merged(q)
    ids = top(theirs, 3)
    request = StudentRequest("teacher_topk", True, True, True, True, True, stop_ids=STOPS)
    view: StudentView = PlainHead()(p[None], nn.Identity(), listed(ours, theirs, ours, ids, 7, 3), request)
    assert float(view.entropy_N) == pytest.approx(-sum(x * np.log(x) for x in ours.values()), abs=1e-12)
    assert float(view.support_overlap_N) == pytest.approx(len(set(ids) & set(top(ours, 3))) / 3)
    assert float(view.support_tail_logmass_N.exp()) == pytest.approx(sum(ours[i] for i in ours if i not in ids))
    assert float(view.token_logprobs_N.exp()) == pytest.approx(ours[6])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), chunk=st.integers(1, 10), bias=st.booleans(), own=st.booleans())
def test_rows_of_the_head_suffice(n: int, chunk: int, bias: bool, own: bool) -> None:
    """K rows and those of the stop ids give values and gradients of the whole product."""
    torch.manual_seed(n)
    head = nn.Linear(5, 23, bias=bias, dtype=torch.float64)
    ids = torch.stack([torch.randperm(20)[:3] + 3 for _ in range(n)])
    ids = torch.where((ids == 7) | (ids == 5), 4, ids)  # a stored list has no other id of the category
    ids[:, 1] = 9 if own else 4
    request = StudentRequest("teacher_topk", stop_ids=(9, 5, 7, 40))  # the teacher's 40 is past the student's rows
    batch = TokenBatch(
        token_ids_N=torch.zeros(n, dtype=torch.int64),
        loss_mask_N=(torch.rand(n) > 0.3).float(),
        sample_N=torch.zeros(n, dtype=torch.int64),
        position_N=torch.arange(n),
        support_ids_NK=ids,
        support_valid_N=torch.randint(1, 4, (n,)),
    )
    hidden = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for provider in (PlainHead(), ChunkedHead(chunk, rows_from=0), ChunkedHead(chunk, rows_from=1000)):
        scores = provider(hidden, head, batch, request).support_logprobs_NK
        scores = scores[batch.loss_mask_N > 0]
        weights = torch.linspace(1, 2, scores.numel(), dtype=torch.float64).reshape(scores.shape)
        results.append((scores, *torch.autograd.grad((weights * scores).sum(), [hidden, *head.parameters()])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_functions_by_themselves() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert merge_scores(scores, ()) is scores and merge_scores(scores, (1,)) is scores
    found = merge_scores(scores, (1, 3, 9))  # 9 is not among the four ids
    assert found[0].tolist() == pytest.approx([0.0, float(np.logaddexp(1, 3)), 2.0, FLOOR])
    assert scores[0].tolist() == [0, 1, 2, 3]
    assert merge_scores(scores, (1, 9)) is scores
    with pytest.raises(ValueError, match=r"9.*not among the 4 ids"):
        merge_scores(scores, (9, 1))
    assert merge_ids(torch.tensor([0, 3, 1, 9]), (1, 3, 9)).tolist() == [0, 1, 1, 1]
    ids = torch.tensor([[2, 1]])
    rows = merge_rows(ids, (1, 3, 9), 4)
    assert rows.tolist() == [[2, 1, 1, 3]]
    assert merge_listed(scores.gather(-1, rows), ids, (1, 3, 9))[0].tolist() == pytest.approx([2.0, float(found[0, 1])])


def test_no_mass_on_any_stop_id_makes_no_nan() -> None:
    scores = torch.tensor([[FLOOR, 1.0, FLOOR]], requires_grad=True)
    assert merged_score(scores[:, [0, 2]]).tolist() == [FLOOR]
    value = merge_scores(scores, (0, 2)).logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(value, scores)
    assert float(value) == 1.0 and gradient.tolist() == [[0, 1, 0]]
