"""Values and gradients against numbers made apart from this project; `OPD_REFERENCE=FILE` runs another seed of them.

It has values and gradients of support divergences, advantages and gradients of sampled ones, TrOPD's gradients."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from credit_context import context_of
from places import DATA
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import Objective, make_objective
from tasks.losses.config import DirectConfig, PolicyGradientConfig, TopkSupport
from tasks.losses.divergences import REGISTRY
from tasks.losses.head import ChunkedHead
from tasks.losses.types import StudentView, TokenBatch

PATH = Path(os.environ.get("OPD_REFERENCE", DATA / "objectives.json"))
REFERENCE: dict[str, Any] = json.loads(PATH.read_text())
CASES: list[dict[str, Any]] = REFERENCE["cases"]
TOLERANCE = {torch.float64: {"rtol": 1e-6, "atol": 1e-12}, torch.float32: {"rtol": 2e-4, "atol": 2e-6}}
NAMES = {"chi2": "pearson_chi2", "hellinger2": "squared_hellinger", "tv": "total_variation"}
PROVIDERS = {"plain": PlainHead(), "chunked": ChunkedHead(4), "rows": ChunkedHead(2, rows_from=0)}


def of_kind(*kinds: str) -> Any:
    cases = [case for case in CASES if case["spec"]["kind"] in kinds]
    assert cases, f"{PATH} has no case of kind {kinds}"
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: Any) -> torch.dtype:
    return request.param


def logits(dtype: torch.dtype) -> Tensor:
    return torch.tensor(REFERENCE["student_logits"], dtype=dtype, requires_grad=True)


def batch_for(student_NV: Tensor, support: str | None = None, k: int = 0) -> TokenBatch:
    """The reference's tokens as a batch; the rollout-time student is the live one."""
    p = student_NV.detach().log_softmax(-1)
    q = torch.tensor(REFERENCE["teacher_logits"], dtype=p.dtype).log_softmax(-1)
    tokens = torch.tensor(REFERENCE["sampled_ids"])
    n = tokens.shape[0]
    signals: dict[str, Tensor] = {
        "student_logprobs_N": p.gather(1, tokens[:, None])[:, 0],
        "teacher_logprobs_N": q.gather(1, tokens[:, None])[:, 0],
    }
    if support is not None:
        ids = (q if support == "teacher" else p).topk(k).indices
        outside = torch.ones_like(q, dtype=torch.bool).scatter(1, ids, False)
        signals |= {
            "support_ids_NK": ids,
            "support_valid_N": torch.full((n,), k),
            "teacher_support_logprobs_NK": q.gather(1, ids),
            "teacher_tail_logmass_N": q.masked_fill(~outside, float("-inf")).logsumexp(1),
        }
    return TokenBatch(
        token_ids_N=tokens,
        loss_mask_N=torch.tensor(REFERENCE["loss_mask"], dtype=p.dtype),
        sample_N=torch.zeros(n, dtype=torch.int64),
        position_N=torch.arange(n),
        **signals,
    )


def identity_head(size: int, dtype: torch.dtype) -> nn.Linear:
    """A head that returns the hidden states: gradients reach the logits themselves."""
    head = nn.Linear(size, size, bias=False, dtype=dtype)
    head.weight.data = torch.eye(size, dtype=dtype)
    return head.requires_grad_(False)


def check_value(case: dict[str, Any], per_token_N: Tensor, mask_N: Tensor) -> None:
    values, kept = per_token_N.detach(), mask_N > 0
    expected = torch.tensor(case["per_token"], dtype=values.dtype)
    torch.testing.assert_close(values[kept], expected[kept], **TOLERANCE[values.dtype])
    loss = (mask_N * values).sum() / mask_N.sum()
    torch.testing.assert_close(loss, torch.tensor(case["loss"], dtype=values.dtype), **TOLERANCE[values.dtype])


def check_gradient(case: dict[str, Any], student_NV: Tensor, per_token_N: Tensor, mask_N: Tensor) -> None:
    (grad,) = torch.autograd.grad((mask_N * per_token_N).sum() / mask_N.sum(), student_NV)
    torch.testing.assert_close(grad, torch.tensor(case["grad"], dtype=grad.dtype), **TOLERANCE[grad.dtype])


def check_fused(case: dict[str, Any], student_NV: Tensor, batch: TokenBatch, objective: Objective) -> None:
    """Value and gradient from one pass over the logits of four tokens at a time."""
    mask_N = batch.loss_mask_N
    per_token_N = torch.zeros_like(mask_N)

    def share(places_C: Tensor, view: StudentView, _: StudentView | None) -> Tensor:
        found_C = objective(batch.at(places_C), view).per_token_N
        per_token_N[places_C] = found_C.detach()
        return (mask_N[places_C] * found_C).sum() / mask_N.sum()

    head, request = identity_head(student_NV.shape[1], student_NV.dtype), objective.needs.student
    loss = ChunkedHead(4, rows_from=1000).loss(student_NV, head, batch, request, None, share)
    check_value(case, per_token_N, mask_N)
    (grad,) = torch.autograd.grad(loss, student_NV)
    torch.testing.assert_close(grad, torch.tensor(case["grad"], dtype=grad.dtype), **TOLERANCE[grad.dtype])


@of_kind("support_divergence")
@pytest.mark.parametrize(
    ("provider", "dtype"),
    [*((name, torch.float64) for name in (*PROVIDERS, "fused")), ("chunked", torch.float32), ("fused", torch.float32)],
    ids=str,
)
def test_support_divergence(case: dict[str, Any], provider: str, dtype: torch.dtype) -> None:
    spec = case["spec"]
    kind = NAMES.get(spec["divergence"], spec["divergence"])
    config = DirectConfig.model_construct(  # configs refuse K=1 renormalised; the function accepts it
        divergence=REGISTRY[kind](**spec["params"]),
        support=TopkSupport(kind=f"{spec['support']}_topk", k=spec["k"], outside=spec["tail"]),
    )
    student = logits(dtype)
    batch = batch_for(student, spec["support"], spec["k"])
    objective = make_objective(config)
    head = identity_head(student.shape[1], dtype)
    if provider == "fused":  # the one that training uses
        check_fused(case, student, batch, objective)
        return
    view = PROVIDERS[provider](student, head, batch, objective.needs.student)
    assert (view.log_normaliser_N is None) == (spec["tail"] == "renormalize")
    per_token = objective(batch, view).per_token_N
    check_value(case, per_token, batch.loss_mask_N)
    check_gradient(case, student, per_token, batch.loss_mask_N)


@of_kind("sampled_policy_gradient")
def test_sampled_policy_gradient(case: dict[str, Any], dtype: torch.dtype) -> None:
    spec = case["spec"]
    kind = NAMES.get(spec["divergence"], spec["divergence"])
    config = PolicyGradientConfig(
        divergence={"kind": kind},
        advantage=spec["advantage"].removesuffix("_centered"),
        center=spec["advantage"].endswith("_centered"),
        log_ratio_clip=30,  # far beyond what any seed draws: the reference is not clipped
    )
    student = logits(dtype)
    batch = batch_for(student)
    assert batch.teacher_logprobs_N is not None and batch.student_logprobs_N is not None
    terms = config.advantage(context_of(config.divergence, batch.teacher_logprobs_N - batch.student_logprobs_N))
    values = terms.advantage(config.advantage.delta_at_one(config.divergence) if config.center else 0.0)
    torch.testing.assert_close(values, torch.tensor(spec["advantage_values"], dtype=dtype), **TOLERANCE[dtype])
    objective = make_objective(config)
    view = PlainHead()(student, nn.Identity(), batch, objective.needs.student)
    check_gradient(case, student, objective(batch, view).per_token_N, batch.loss_mask_N)


@of_kind("tropd")
def test_tropd(case: dict[str, Any], dtype: torch.dtype) -> None:
    """The reference gives the gate: a draw that yields it, or the trust that the expected gate must find (2606.01249)."""
    spec = case["spec"]
    config = PolicyGradientConfig(
        trust_region={"kind": "tropd", "gate": spec["gate"], "k": spec["k"]}, log_ratio_clip=40
    )
    student = logits(dtype)
    given = torch.tensor(spec["M"], dtype=dtype)
    batch = replace(batch_for(student, "teacher", spec["k"]), uniform_N=1 - given)
    objective = make_objective(config)
    view = PlainHead()(student, nn.Identity(), batch, objective.needs.student)
    out = objective(batch, view)
    kept = batch.loss_mask_N > 0
    torch.testing.assert_close(1 - out.metrics["outlier_fraction"][kept], given[kept], **TOLERANCE[dtype])
    check_gradient(case, student, out.per_token_N, batch.loss_mask_N)
