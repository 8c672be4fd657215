"""Token weights: what they do to a loss, and that they depend on nothing but the token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import DirectConfig, PolicyGradientConfig
from tasks.losses.token_weights import TOKEN_WEIGHTS, Weighable
from tasks.losses.types import TokenBatch

N, V, K = 5, 6, 3


def batch() -> tuple[Tensor, TokenBatch]:
    torch.manual_seed(3)
    student = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    tokens, ids = torch.arange(N), teacher.topk(K).indices
    picked = (x.gather(1, tokens[:, None])[:, 0] for x in (student.detach().log_softmax(-1), teacher))
    old, at_teacher = picked
    return student, TokenBatch(
        token_ids_N=tokens,
        loss_mask_N=torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64),
        sample_N=tokens,
        position_N=torch.tensor([0, 10, 20, 40, 400]),
        student_logprobs_N=old,
        teacher_logprobs_N=at_teacher,
        teacher_entropy_N=torch.tensor([0.0, 0.5, 1, 2, 9], dtype=torch.float64),
        support_ids_NK=ids,
        support_valid_N=torch.full((N,), K),
        teacher_support_logprobs_NK=teacher.gather(1, ids),
    )


def losses(config: Any, student: Tensor, tokens: TokenBatch) -> Tensor:
    objective = make_objective(config)
    return objective(tokens, PlainHead()(student, nn.Identity(), tokens, objective.needs.student)).per_token_N


@pytest.mark.parametrize("estimator", [DirectConfig, PolicyGradientConfig])
@pytest.mark.parametrize("kind", TOKEN_WEIGHTS.classes)
def test_weights_multiply_value_and_gradient(estimator: Any, kind: str) -> None:
    student, tokens = batch()
    plain, found = (
        losses(estimator.model_validate({"token_weight": w, "support": s}), student, tokens)
        for w in ({"kind": "none"}, {"kind": kind})
        for s in [{"kind": "teacher_topk", "k": K} if estimator is DirectConfig else {"kind": "sampled"}]
    )
    kept = tokens.loss_mask_N > 0
    weights = (found / plain)[kept].detach()
    assert (weights > 0).all() and found[~kept].abs().sum() == 0
    for n in kept.nonzero().flatten().tolist():
        grads = [torch.autograd.grad(x[n], student, retain_graph=True)[0] for x in (plain, found)]
        torch.testing.assert_close(grads[1], grads[0] * (found[n] / plain[n]).detach())
    alone = losses(
        estimator.model_validate(
            {"token_weight": {"kind": kind}}
            | ({"support": {"kind": "teacher_topk", "k": K}} if estimator is DirectConfig else {})
        ),
        student[3:4],
        TokenBatch(**{k: v if v is None else v[3:4] for k, v in tokens.__dict__.items()}),
    )
    torch.testing.assert_close(alone[0], found[3])


def test_values() -> None:
    tokens = Weighable(
        position_N=torch.tensor([0.0, 64, 10_000]),
        divergence_N=torch.tensor([0.0, 0.25, 100]),
        teacher_entropy_N=torch.tensor([0.0, 0.5, 50]),
    )
    made = {
        kind: TOKEN_WEIGHTS.classes[kind].model_validate(fields)(tokens)
        for kind, fields in {
            "position": {"half_life": 64, "least": 0.1},
            "divergence": {"scale": 1, "power": 0.5, "largest": 4},
            "teacher_entropy": {"slope": -2, "largest": 8},
        }.items()
    }
    torch.testing.assert_close(made["position"], torch.tensor([1.0, 0.5, 0.1]))
    torch.testing.assert_close(made["divergence"], torch.tensor([0.25, 0.5, 4.0]))
    torch.testing.assert_close(made["teacher_entropy"], torch.tensor([1.0, math.exp(-1), 1 / 8]))


def test_masked_tokens_may_hold_anything() -> None:
    student, tokens = batch()
    broken = replace(tokens, teacher_entropy_N=tokens.teacher_entropy_N.masked_fill(tokens.loss_mask_N == 0, math.nan))
    for kind in TOKEN_WEIGHTS.classes:
        config = PolicyGradientConfig.model_validate({"token_weight": {"kind": kind}})
        found = losses(config, student, broken)
        (grad,) = torch.autograd.grad(found.sum(), student)
        assert found.isfinite().all() and grad.isfinite().all()
