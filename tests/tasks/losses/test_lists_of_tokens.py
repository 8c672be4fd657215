"""Policy gradients with lists (candidates, side terms): what masked, empty and teacher-written tokens get, and weights
that depend on how far apart the models are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import PolicyGradientConfig
from tasks.losses.types import ObjectiveOutput, TokenBatch

N, V, K = 5, 7, 3
NAN = float("nan")
CANDIDATES = {"support": {"kind": "student_topk", "k": K}}


def given() -> tuple[Tensor, TokenBatch]:
    """The live student, and a batch with the rollout-time student's top K."""
    torch.manual_seed(4)
    logits, noise, teacher = torch.randn(3, N, V, dtype=torch.float64)
    live, old, teacher = (logits + 0.3 * noise).requires_grad_(), logits.log_softmax(1), teacher.log_softmax(1)
    tokens, ids = torch.arange(N), old.topk(K).indices
    return live, TokenBatch(
        token_ids_N=tokens,
        loss_mask_N=torch.ones(N, dtype=torch.float64),
        sample_N=tokens,
        position_N=tokens,
        student_logprobs_N=old.diagonal(),
        teacher_logprobs_N=teacher.diagonal(),
        teacher_entropy_N=-(teacher.exp() * teacher).sum(1),
        support_ids_NK=ids,
        support_valid_N=torch.full((N,), K),
        student_support_logprobs_NK=old.gather(1, ids),
        teacher_support_logprobs_NK=teacher.gather(1, ids),
    )


def run(live: Tensor, batch: TokenBatch, **fields: Any) -> ObjectiveOutput:
    objective = make_objective(PolicyGradientConfig.model_validate(fields))
    return objective(batch, PlainHead()(live, nn.Identity(), batch, objective.needs.student))


@pytest.mark.parametrize(
    "fields",
    [
        {**CANDIDATES, "divergence": {"kind": "jsd"}},
        {"center": False, "trust_region": {"kind": "entropy_gate", "threshold": 0.0, "k": K}},
        {"trust_region": {"kind": "tropd", "gate": "expected", "k": K}},
        {**CANDIDATES, "token_weight": {"kind": "divergence"}},
    ],
    ids=["candidates", "entropy_gate", "tropd", "weighted"],
)
def test_masked_tokens_have_no_influence(fields: dict[str, Any]) -> None:
    live, batch = given()
    mask = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64)
    spoilt = {
        name: value.masked_fill((mask == 0).reshape(-1, *[1] * (value.dim() - 1)), NAN)
        for name, value in vars(batch).items()
        if value is not None and value.is_floating_point() and name != "loss_mask_N"
    }
    clean, dirty = (run(live, replace(batch, loss_mask_N=mask, **x), **fields) for x in ({}, spoilt))
    assert torch.equal(clean.per_token_N, dirty.per_token_N) and not dirty.per_token_N[mask == 0].any()
    grads = [torch.autograd.grad(x.per_token_N.sum(), live)[0] for x in (clean, dirty)]
    assert torch.equal(*grads) and not grads[0][mask == 0].any() and grads[0][mask > 0].any()
    for name, values in dirty.metrics.items():
        assert torch.equal(values, clean.metrics[name]) and not values[mask == 0].any(), name


def test_a_token_without_candidates_has_no_loss() -> None:
    live, batch = given()
    out = run(live, replace(batch, support_valid_N=torch.tensor([K, 0, 1, 2, K])), **CANDIDATES)
    assert out.per_token_N[1] == 0 and out.per_token_N[[0, 2, 3, 4]].all()


@pytest.mark.parametrize("outliers", ["forward_kl", "mask", "clip"])
def test_a_teachers_prefix_is_likelihood_whether_trusted_or_not(outliers: str) -> None:
    live, batch = given()
    log_u = batch.teacher_logprobs_N - batch.student_logprobs_N
    assert log_u.min() < -0.1 and log_u.max() > 0.1
    region = {"kind": "tropd", "gate": "expected", "k": K, "prefix_beta": 0.25, "outliers": outliers}
    out = run(live, replace(batch, teacher_prefix_N=torch.ones(N)), trust_region=region)
    torch.testing.assert_close(out.per_token_N, -0.25 * live.log_softmax(1).diagonal())
    assert not out.metrics["outlier_fraction"].any()


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_divergence_weights_of_the_sampled_token_and_of_candidates(scale: float) -> None:
    """u - 1 - log u for the sampled token, KL over the list for candidates; their root is the default weight."""
    live, batch = given()
    fields = {"token_weight": {"kind": "divergence", "scale": scale, "largest": 1e9}, "log_ratio_clip": 6}
    log_p = live.detach().log_softmax(1)
    log_u = batch.teacher_logprobs_N - log_p.diagonal()
    found, plain = run(live, batch, **fields).per_token_N, run(live, batch).per_token_N
    torch.testing.assert_close(found, plain * ((log_u.exp() - 1 - log_u) / scale).sqrt())
    found, plain = (run(live, batch, **CANDIDATES, **x).per_token_N for x in (fields, {}))
    log_w = batch.student_support_logprobs_NK.log_softmax(1)
    apart = (log_w.exp() * (log_w - batch.teacher_support_logprobs_NK.log_softmax(1))).sum(1)
    assert apart.max() > 0.1
    torch.testing.assert_close(found, plain * (apart.clamp(min=1e-12) / scale).sqrt().clamp(min=1e-9))
