"""The direct JSD against TRL's: values and gradients that TRL made itself (`tests/data/make_trl_jsd.py`).

TRL's convention is ours: beta = 0 is forward KL KL(q||p), beta = 1 reverse KL KL(p||q), q the teacher."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from places import DATA
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import DirectConfig
from tasks.losses.head import ChunkedHead
from tasks.losses.types import TokenBatch

MADE: dict[str, Any] = json.loads((DATA / "trl_jsd.json").read_text())
CASES: list[dict[str, Any]] = MADE["cases"]


def name_of(case: dict[str, Any]) -> str:
    shown = {key: value for key, value in case["arguments"].items() if key != "labels"}
    return "-".join(f"{key}={value}" for key, value in shown.items())


def masked(arguments: dict[str, Any], tokens: int) -> Tensor:
    """TRL drops positions whose label is -100, and none without labels."""
    labels = arguments["labels"]
    return torch.ones(tokens).double() if labels is None else (torch.tensor(labels).reshape(-1) != -100).double()


def denominator(arguments: dict[str, Any], mask_N: Tensor) -> float:
    """What TRL divides the sum over tokens and vocabulary by.

    `num_items_in_batch` where it is given; else, for `batchmean`, the number of labelled positions, and without labels
    the number of sequences (not of tokens)."""
    if "num_items_in_batch" in arguments:
        return float(arguments["num_items_in_batch"])
    assert arguments["reduction"] == "batchmean"
    return float(mask_N.sum()) if arguments["labels"] is not None else float(len(MADE["student_logits"]))


def ours(student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor, divergence: dict[str, Any], provider: Any) -> Tensor:
    """Per-token values of the direct objective with every id in its support."""
    n, v = student_NV.shape
    top = teacher_NV.log_softmax(-1).topk(v)
    batch = TokenBatch(
        token_ids_N=torch.zeros(n, dtype=torch.int64),
        loss_mask_N=mask_N,
        sample_N=torch.zeros(n, dtype=torch.int64),
        position_N=torch.arange(n),
        support_ids_NK=top.indices,
        support_valid_N=torch.full((n,), v),
        teacher_support_logprobs_NK=top.values,
        teacher_tail_logmass_N=torch.full((n,), -torch.inf, dtype=torch.float64),
    )
    objective = make_objective(DirectConfig(divergence=divergence, support={"kind": "full", "k": v}))
    return objective(batch, provider(student_NV, nn.Identity(), batch, objective.needs.student)).per_token_N


@pytest.mark.parametrize("provider", [PlainHead(), ChunkedHead(3)], ids=["plain", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_direct_jsd_is_trls(case: dict[str, Any], provider: Any) -> None:
    arguments, beta = case["arguments"], case["arguments"]["beta"]
    student = torch.tensor(MADE["student_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(MADE["teacher_logits"], dtype=torch.float64)
    heat = arguments.get("temperature", 1.0)  # both models' logits are divided by it, the loss is not scaled back
    flat, q = (logits.reshape(-1, logits.shape[-1]) / heat for logits in (student, teacher))
    mask = masked(arguments, flat.shape[0])
    ends = {0.0: [{"kind": "forward_kl"}], 1.0: [{"kind": "reverse_kl"}]}
    for divergence in [{"kind": "jsd", "beta": beta}, *ends.get(beta, [])]:
        per_token = ours(flat, q, mask, divergence, provider)
        loss = (mask * per_token).sum() / denominator(arguments, mask)
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
        torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_cases_cover_the_betas_and_ways_to_reduce() -> None:
    """The ends are told apart by direction: forward and reverse KL of these logits differ."""
    assert {case["arguments"]["beta"] for case in CASES} == {0.0, 0.1, 0.5, 1.0}
    by_beta = {case["arguments"]["beta"]: case["loss"] for case in CASES if case["arguments"]["labels"] is None}
    assert abs(by_beta[0.0] - by_beta[1.0]) > 0.1
