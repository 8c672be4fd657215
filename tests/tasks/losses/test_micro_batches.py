"""From stored signals through the trainer's packing to the loss: how a step is cut into micro-batches changes nothing.

The model is a small one whose hidden states look back only, so that padding must not matter; everything after it is
the real thing: `part_of_round`, `forward_batch`, head provider, objective, `LossHead`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_head import PlainHead
from pydantic import TypeAdapter
from torch import Tensor, nn
from whole_round import from_rollouts

from storage.schemas import MaskReason, schema_for
from tasks.losses.build import make_objective
from tasks.losses.config import ObjectiveConfig
from tasks.losses.credit import CREDITS
from tasks.losses.divergences import REGISTRY
from tasks.losses.head import ChunkedHead
from tasks.losses.registry import Registry
from tasks.losses.token_weights import TOKEN_WEIGHTS
from tasks.losses.trust_regions import TRUST_REGIONS
from tasks.trainer.data import Samples, forward_batch, loss_denominators
from tasks.trainer.model import LossHead

V, D, K = 13, 6, 4
LENGTHS = (5, 1, 7, 3, 2, 4)
GONE = 4
"""The sample without a token left to learn from."""
CPU = torch.device("cpu")
Parts = Sequence[tuple[Sequence[int], bool]]
"""Micro-batches: the places of their samples, and whether it is a filler."""

objective_config = TypeAdapter(ObjectiveConfig)
OBJECTIVES: dict[str, dict[str, Any]] = {
    f"{kind}-{outside}": {
        "estimator": "direct",
        "divergence": {"kind": kind},
        "support": {"kind": "union" if outside == "bucket" else "teacher_topk", "k": K, "outside": outside},
        "allow_drop": True,
    }
    for kind in REGISTRY
    for outside in ("renormalize", "bucket", "drop")
}
OBJECTIVES |= {
    f"policy_gradient-{kind}": {"estimator": "policy_gradient", "divergence": {"kind": kind}, "ppo_clip": 0.2}
    for kind in REGISTRY
}


def chosen(registry: Registry, kind: str, **fields: Any) -> dict[str, Any]:
    """A trust region or a credit, with lists as short as those that are stored."""
    return {"kind": kind} | ({"k": K} if "k" in registry.classes[kind].model_fields else {}) | fields


OBJECTIVES |= {
    f"{kind}-{support}": {
        "estimator": "policy_gradient",
        "trust_region": chosen(TRUST_REGIONS, kind),
        "support": {"kind": support} | ({"k": K} if support == "student_topk" else {}),
    }
    for kind, cls in TRUST_REGIONS.classes.items()
    for support in ("sampled", *([] if cls.sampled_only else ["student_topk"]))
}
OBJECTIVES |= {
    f"credit-{kind}": {
        "estimator": "policy_gradient",
        "advantage": chosen(CREDITS, kind),
        "divergence": {"kind": "jsd"},
    }
    for kind in CREDITS.classes
}
OBJECTIVES |= {
    f"{estimator}-weighted-{kind}": {"estimator": estimator, "token_weight": {"kind": kind}, **lists}
    for kind in TOKEN_WEIGHTS.classes
    for estimator, lists in (("direct", {"support": {"kind": "teacher_topk", "k": K}}), ("policy_gradient", {}))
}
OBJECTIVES |= {
    "tropd-expected": {
        "estimator": "policy_gradient",
        "trust_region": chosen(TRUST_REGIONS, "tropd", gate="expected", gate_at="live"),
    },
    "sequence": {"estimator": "direct", "support": {"kind": "student_topk", "k": K}, "normalisation": "sequence"},
    "constant": {"estimator": "policy_gradient", "normalisation": "constant", "normalisation_length": 9},
    "sft": {"estimator": "sft"},
}


@cache
def stored(spoilt: bool) -> tuple[pa.Table, dict[str, pa.Table]]:
    """Rollouts and all signals; `spoilt` has NaN for every value at a masked token."""
    random = np.random.Generator(np.random.PCG64(3))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("rollouts", "sampled", "mask")}
    rows |= {"teacher_topk": [], "student_topk": []}
    for index, length in enumerate(LENGTHS):
        name = {"sample_id": f"p{index}/1/0"}
        masked = np.ones(length, bool) if index == GONE else random.random(length) < 0.3
        masked[0] |= index == 0
        log_p, log_q = (np.log(random.dirichlet(np.full(V, 0.5), size=length)) for _ in range(2))
        tokens = random.integers(0, V, size=length)

        def kept(values: np.ndarray, hidden: np.ndarray = masked) -> list[Any]:
            return np.where(hidden.reshape(-1, *[1] * (values.ndim - 1)) & spoilt, np.nan, values).tolist()

        rows["rollouts"].append(
            name
            | {"prompt_id": f"p{index // 2}", "sample_index": 0, "behaviour": "student", "seed": 0}
            | {"prefix_length": 2 if index == 2 else 0}
            | {"finish_reason": "stop", "completion_text": "", "sampling_logprobs": [-1.0] * length}
            | {"prompt_token_ids": [1 + index] * (1 + index % 3), "completion_token_ids": tokens.tolist()}
        )
        at = np.arange(length), tokens
        entropies = {
            f"{model}_entropy": kept(-(np.exp(x) * x).sum(1)) for model, x in (("student", log_p), ("teacher", log_q))
        }
        rows["sampled"].append(
            name | {"student_logprobs": kept(log_p[at]), "teacher_logprobs": kept(log_q[at])} | entropies
        )
        rows["mask"].append(name | {"mask_reasons": np.where(masked, int(MaskReason.INVALID_VALUE), 0).tolist()})
        for signal, of in (("teacher_topk", log_q), ("student_topk", log_p)):
            order = np.argsort(-of, axis=1)
            ids, rest = order[:, :K], order[:, K:]
            p, q = (np.take_along_axis(values, ids, 1) for values in (log_p, log_q))
            tail_p, tail_q = (np.log(np.exp(np.take_along_axis(x, rest, 1)).sum(1)) for x in (log_p, log_q))
            columns = {"logprobs": q, "tail_logmass": tail_q}
            if signal == "student_topk":
                columns = {"student_logprobs": p, "teacher_logprobs": q}
                columns |= {"student_tail_logmass": tail_p, "teacher_tail_logmass": tail_q}
            values = {column: kept(value) for column, value in columns.items()}
            rows[signal].append(name | {"ids": ids.tolist(), "valid": [K] * length} | values)
    made = {name: pa.Table.from_pylist(found, schema_for(name)) for name, found in rows.items()}
    return made.pop("rollouts"), made


def samples_for(name: str, spoilt: bool = False) -> Samples:
    """What the objective `name` trains on."""
    rollouts, signals = stored(spoilt)
    rows = [{"sample_id": f"p{i}/1/0", "reward": None if i == 1 else i % 3 / 2} for i in range(len(LENGTHS))]
    rewards = pa.Table.from_pylist(rows, schema_for("rewards"))
    needs = objective_config.validate_python(OBJECTIVES[name]).needs()
    return from_rollouts(rollouts, signals, needs, [], rewards=rewards)


class Backwards(nn.Module):
    """Hidden states that are running means of embeddings: causal, so that right padding is never looked at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Parameter(torch.randn(V, D, dtype=torch.float64))
        self.head = nn.Linear(D, V, dtype=torch.float64)

    def hidden(self, input_ids_BT: Tensor) -> Tensor:
        seen = torch.arange(1, input_ids_BT.shape[1] + 1, dtype=torch.float64)[:, None]
        return self.embedding[input_ids_BT].cumsum(1) / seen + self.embedding[input_ids_BT]


def step(name: str, samples: Samples, rows: Sequence[int], parts: Parts, provider: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one step over `rows`, cut into `parts`."""
    config = objective_config.validate_python(OBJECTIVES[name])
    model = Backwards()
    loss_head = LossHead(model.head, make_objective(config), provider, None)
    weights = loss_denominators(samples, rows, config.normalisation, config.normalisation_length)
    total = torch.zeros(())
    for places, filler in parts:
        batch = forward_batch(samples, rows, weights, places, filler, CPU)
        hidden_ND = model.hidden(batch.input_ids_BT).reshape(-1, D)[batch.hidden_index_N]
        loss = loss_head(hidden_ND, batch, True)
        loss.backward()
        assert loss_head.stats is not None
        assert all(value.isfinite().all() for value in loss_head.stats.metrics.values())
        total = total + loss.detach()
    found = [parameter.grad for parameter in model.parameters()]
    return total, [grad for grad in found if grad is not None]


def assert_same(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-5, atol=2e-6)
    assert len(found[1]) == len(wanted[1]) == 3
    scale = max(float(grad.abs().max()) for grad in wanted[1])
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6 * (1 + scale))


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_cutting_a_step_and_padding_change_nothing(name: str, data: st.DataObject) -> None:
    samples = samples_for(name)
    rows = data.draw(st.permutations(range(len(LENGTHS))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))))
    edges = [0, *cuts, len(rows)]
    parts: list[tuple[Sequence[int], bool]] = [(range(a, b), False) for a, b in itertools.pairwise(edges)]
    parts.insert(data.draw(st.integers(0, len(parts))), (range(edges[1]), True))  # a filler counts for nothing
    whole = step(name, samples, range(len(LENGTHS)), [(range(len(LENGTHS)), False)], PlainHead())
    assert any(grad.any() for grad in whole[1])
    assert_same(step(name, samples, rows, parts, ChunkedHead(data.draw(st.integers(1, 5)), rows_from=0)), whole)


@pytest.mark.parametrize("name", ["reverse_kl-renormalize", "policy_gradient-jsd", "sft"])
def test_the_loss_of_a_step_is_the_mean_over_its_tokens_that_count(name: str) -> None:
    config, samples, rows = objective_config.validate_python(OBJECTIVES[name]), samples_for(name), range(len(LENGTHS))
    model = Backwards()
    batch = forward_batch(samples, rows, loss_denominators(samples, rows, "token", None), rows, False, CPU)
    hidden_ND = model.hidden(batch.input_ids_BT).reshape(-1, D)[batch.hidden_index_N]
    objective = make_objective(config)
    per_token = objective(batch.tokens, PlainHead()(hidden_ND, model.head, batch.tokens, objective.needs.student))
    assert len(per_token.per_token_N) == samples.keep.sum() < sum(LENGTHS)
    loss, _ = step(name, samples, rows, [(rows, False)], PlainHead())
    torch.testing.assert_close(loss, per_token.per_token_N.detach().float().mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_at_masked_tokens_never_arrive(name: str) -> None:
    rows, parts = range(len(LENGTHS)), [((0, 2, 4), False), ((1, 3, 5), False)]
    clean, spoilt = (step(name, samples_for(name, nan), rows, parts, ChunkedHead(3)) for nan in (False, True))
    assert torch.equal(clean[0], spoilt[0])
    assert all(torch.equal(a, b) for a, b in zip(clean[1], spoilt[1], strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_left_is_a_zero_that_back_propagates(name: str) -> None:
    samples = samples_for(name, spoilt=True)
    providers = (PlainHead(), ChunkedHead(2), ChunkedHead(2, rows_from=0))
    for provider, (place, filler) in itertools.product(providers, ((GONE, False), (2, True))):
        loss, grads = step(name, samples, range(len(LENGTHS)), [([place], filler)], provider)
        assert loss == 0 and len(grads) == 3, "every parameter takes part, as ZeRO and DDP want it"
        assert not any(grad.any() for grad in grads)
