"""What the `objective:` part refuses, with which reason, and what it asks for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

import pytest
from places import CHECKOUT
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from storage.identity import canonical_json
from tasks.losses.config import DirectConfig, ObjectiveConfig, SignalNeed
from tasks.losses.divergences import REGISTRY, Divergence, register

objective = TypeAdapter(ObjectiveConfig)


def direct(**fields: Any) -> dict[str, Any]:
    return {"estimator": "direct", **fields}


def policy(**fields: Any) -> dict[str, Any]:
    return {"estimator": "policy_gradient", **fields}


def support(**fields: Any) -> dict[str, Any]:
    return {"kind": "teacher_topk", "k": 4, **fields}


@pytest.mark.parametrize(
    ("config", "field", "reason"),
    [
        (direct(support=support(k=1, outside="renormalize")), "support.k", "identically zero"),
        (direct(support=support(outside="drop")), "support.outside", "no divergence"),
        (direct(support=support(outside="drop"), divergence={"kind": "skewed_reverse_kl"}), "support", "no divergence"),
        (direct(support={"kind": "full", "k": 151936}), "support", "max_bytes_per_token"),
        (direct(support=support(k=0)), "support", "greater than or equal to 1"),
        (direct(divergence={"kind": "alpha", "alpha": 1}), "divergence", "forward_kl"),
        (direct(divergence={"kind": "jsd", "beta": 1.5}), "divergence", "less than or equal to 1"),
        (direct(divergence={"kind": "rkl"}), "divergence", "reverse_kl"),
        (direct(normalisation="constant"), "normalisation_length", "required with normalisation: constant"),
        (direct(support_exclude_ids=[-1]), "support_exclude_ids", "negative"),
        ({"estimator": "policy_gradient", "support": support()}, "support", "expected gradient is zero"),
        (policy(support={"kind": "full", "k": 24}), "support", "expected gradient is zero"),
        (policy(support={"kind": "union", "k": 4}), "support", "expected gradient is zero"),
        (policy(support={"kind": "student_topk", "k": 0}), "support", "greater than or equal to 1"),
        (policy(dual_clip=3), "dual_clip", "ppo_clip"),
        (policy(trust_region={"kind": "tropdd"}), "trust_region", "tropd"),
        (policy(trust_region={"kind": "tropd", "outliers": "clip", "clip_at": 0.5}), "clip_at", "less than 0"),
        (policy(trust_region={"kind": "proximal_teacher", "alpha": 1}), "alpha", "less than 1"),
        (policy(trust_region={"kind": "advantage_floor", "floor": 0.1}), "floor", "less than 0"),
        (policy(trust_region={"kind": "entropy_gate", "k": 1, "outside": "renormalize"}), "k", "identically zero"),
        (
            policy(trust_region={"kind": "tropd"}, support={"kind": "student_topk"}),
            "trust_region",
            "is defined for the sampled",
        ),
        (policy(token_weight={"kind": "position", "half_life": 0}), "half_life", "greater than 0"),
        (direct(token_weight={"kind": "entropy"}), "token_weight", "teacher_entropy"),
        (direct(trust_region={"kind": "tropd"}), "trust_region", "Extra inputs"),
        (policy(support={"kind": "student_topk", "k": 1, "baseline": "list"}), "baseline", "identically zero"),
        (policy(support={"kind": "student_topk"}, center=False), "center", "regardless of the teacher"),
        (
            policy(support={"kind": "student_topk"}, center=False, divergence={"kind": "jsd", "beta": 1}),
            "center",
            "the advantage -1",
        ),
        (direct(divergence={"kind": "alpha", "alpha": 1e-6}), "divergence", "reverse_kl"),
        (policy(divergence={"kind": "alpha", "alpha": 0.9999}), "divergence", "forward_kl"),
        (direct(divergence={"kind": "alpha", "alpha": 3}, logprob_min=-80), "logprob_min", "use -40 or more"),
        (direct(divergence={"kind": "alpha", "alpha": -2}, logprob_min=-41), "logprob_min", "kind alpha, alpha -2.0"),
        (direct(divergence={"kind": "alpha", "alpha": 3}, tail_logmass_min=-80), "tail_logmass_min", "float32"),
        (policy(divergence={"kind": "alpha", "alpha": 3}, log_ratio_clip=40), "log_ratio_clip", "use 20 or less"),
        (policy(divergence={"kind": "pearson_chi2"}, log_ratio_clip=31), "log_ratio_clip", "use 30 or less"),
    ],
)
def test_refused_with_the_reason(config: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        objective.validate_python(config)
    text = str(caught.value)
    assert field in text and reason in text


@pytest.mark.parametrize(
    "config",
    [
        direct(support=support(k=1, outside="bucket")),
        direct(support=support(outside="drop"), divergence={"kind": "forward_kl"}),
        direct(support=support(outside="drop"), allow_drop=True),
        direct(support={"kind": "full", "k": 24}),
        direct(support=support(kind="union", k=1, outside="renormalize")),
        policy(ppo_clip=0.2, dual_clip=3),
        policy(
            support={"kind": "student_topk", "k": 1, "weights_at": "live"}, trust_region={"kind": "advantage_floor"}
        ),
        policy(trust_region={"kind": "tropd", "gate": "expected", "gate_at": "live", "outliers": "mask"}),
        policy(trust_region={"kind": "entropy_gate", "k": 1, "outside": "bucket"}, token_weight={"kind": "position"}),
        direct(token_weight={"kind": "divergence", "power": -1}),
        policy(support={"kind": "student_topk", "k": 2, "baseline": "list"}, center=False),
        policy(support={"kind": "student_topk"}, center=False, divergence={"kind": "jsd"}),
        policy(support={"kind": "student_topk"}, center=False, advantage="stop_gradient"),
        policy(center=False),
        direct(divergence={"kind": "alpha", "alpha": 1e-3}),
        direct(divergence={"kind": "alpha", "alpha": 3}, support=support(outside="renormalize"), tail_logmass_min=-80),
        direct(divergence={"kind": "alpha", "alpha": 2}, logprob_min=-80),
        policy(divergence={"kind": "forward_kl"}, log_ratio_clip=40, log_rho_clip=40),
    ],
)
def test_accepted_and_the_same_after_a_round_trip(config: dict[str, Any]) -> None:
    found = objective.validate_python(config)
    again = objective.validate_json(found.model_dump_json())
    assert again == found and canonical_json(again) == canonical_json(found)


def test_identity_sees_the_parameters_of_the_divergence() -> None:
    keys = {
        canonical_json(objective.validate_python(direct(divergence=d)))
        for d in ({"kind": "jsd", "beta": 0.1}, {"kind": "jsd", "beta": 0.5}, {"kind": "jsd"}, {"kind": "forward_kl"})
    }
    assert len(keys) == 3


def test_only_sampled_estimators_need_exact_samples() -> None:
    needed = {
        name: objective.validate_python({"estimator": name}).requires_untruncated_sampling
        for name in ("direct", "policy_gradient", "sft")
    }
    assert needed == {"direct": False, "policy_gradient": True, "sft": False}
    listed = objective.validate_python(policy(support={"kind": "student_topk"}))
    assert not listed.requires_untruncated_sampling


def test_what_does_nothing_changes_no_identity() -> None:
    """Keys made before these axes existed stay what they were."""
    said = policy(support={"kind": "sampled"}, trust_region={"kind": "none"}, token_weight={"kind": "none"})
    text = canonical_json(objective.validate_python(said))
    assert text == canonical_json(objective.validate_python(policy()))
    assert not any(name in text for name in ("support", "trust_region", "token_weight"))


@pytest.mark.parametrize(
    ("config", "lists", "draws", "prefixes"),
    [
        (policy(), [], False, False),
        (policy(support={"kind": "student_topk", "k": 5}), [SignalNeed("student_topk", 5)], False, False),
        (policy(trust_region={"kind": "tropd", "k": 7}), [SignalNeed("teacher_topk", 7)], True, True),
        (policy(trust_region={"kind": "tropd", "outliers": "mask", "gate": "expected"}), [], False, True),
        (policy(trust_region={"kind": "entropy_gate", "k": 6}), [SignalNeed("teacher_topk", 6)], False, False),
    ],
)
def test_needs_follow_the_trust_region(
    config: dict[str, Any], lists: list[SignalNeed], draws: bool, prefixes: bool
) -> None:
    needs = objective.validate_python(config).needs()
    assert [need for need in needs.signals if need.k] == lists
    assert (needs.draws, needs.takes_prefixes) == (draws, prefixes)


@pytest.mark.parametrize(
    ("kind", "lists"),
    [
        ("teacher_topk", ["teacher_topk"]),
        ("student_topk", ["student_topk"]),
        ("union", ["teacher_topk", "student_topk"]),
    ],
)
def test_needs_follow_the_support(kind: str, lists: list[str]) -> None:
    needs = DirectConfig(support=support(kind=kind, outside="renormalize")).needs()
    assert [need for need in needs.signals if need.k] == [SignalNeed(name, 4) for name in lists]
    assert not needs.student.whole_vocabulary and needs.metrics.whole_vocabulary
    bucketed = DirectConfig(support=support(kind=kind, outside="bucket")).needs().student
    assert bucketed.log_normaliser and bucketed.tail


def test_a_plugin_registers_a_divergence_and_configs_accept_it() -> None:
    class Cubed(Divergence):
        kind: Literal["cubed"] = "cubed"
        scale: float = 1.0

        def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            return self.scale * log_p.exp() * self.f(log_q - log_p)

        def f(self, log_u: Tensor) -> Tensor:
            return log_u.expm1().abs() ** 3

        def w(self, log_u: Tensor) -> Tensor:
            u = log_u.exp()
            return -self.f(log_u) + 3 * u * (u - 1).abs() * (u - 1)

    register(Cubed)
    try:
        found = objective.validate_python(direct(divergence={"kind": "cubed", "scale": 2}))
        assert isinstance(found.divergence, Cubed) and '"scale":2.0' in canonical_json(found)
        with pytest.raises(ValidationError, match=r"divergence\.skale"):
            objective.validate_python(direct(divergence={"kind": "cubed", "skale": 2}))
        with pytest.raises(ValueError, match="already"):
            register(Cubed)
    finally:
        del REGISTRY["cubed"]


def test_configs_load_no_torch() -> None:
    code = "import sys, tasks.losses.config; sys.exit('torch' in sys.modules)"
    root = CHECKOUT
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
