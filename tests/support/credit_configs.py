"""The configs that say what the rows of the plain second implementation (`credit_rows`) compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from credit_rows import Clip, Reduction, Toy
from credit_rows.distilled import trace_lambda

from tasks.losses.token_credit.config import CreditConfig

GROUP = {"kind": "group", "success_threshold": 0.5}
PLAIN = {"low": 0.2, "high": 0.2, "dual": 3.0}
DAPO = {"low": 0.2, "high": 0.28, "dual": 3.0}
K, FULL = 4, {"kind": "full", "k": 8}
TOP = {"kind": "student_topk", "k": K, "outside": "bucket"}
OWN = Reduction(denominator="own")


def same(toy: Toy) -> Toy:
    return toy


def reference_is(name: str) -> Callable[[Toy], Toy]:
    return lambda toy: replace(toy, samples=[replace(s, reference=getattr(s, name)) for s in toy.samples])


def all_written(toy: Toy) -> Toy:
    return replace(toy, samples=[replace(s, written=[1] * len(s.tokens)) for s in toy.samples])


def mild(toy: Toy) -> Toy:
    """Teachers closer to the student: at a temperature of 0.2 the floor of log-probabilities would be reached otherwise."""
    return replace(toy, samples=[replace(s, teacher=s.old + 0.4 * (s.teacher - s.old)) for s in toy.samples])


@dataclass
class Row:
    """A config, and the row with the fields that say the same. `of`: what is changed in a toy before."""

    name: str
    config: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    contexts: bool = True
    of: Callable[[Toy], Toy] = same

    @property
    def objective(self) -> CreditConfig:
        return CreditConfig.model_validate(self.config)


def standardised(d: list[float]) -> list[float]:
    x = torch.tensor(d, dtype=torch.float64)
    return ((x - x.mean()) / ((x.std() if len(d) > 1 else 0) + 1e-6)).tolist()


def by_mean_abs(d: list[float]) -> list[float]:
    x = torch.tensor(d, dtype=torch.float64)
    return (x / (x.abs().mean() + 1e-6)).tolist()


SEQUENCE = {"normalisation": "sequence"}
CONSTANT = {"normalisation": "constant", "normalisation_length": 7}
CONFIGURED: list[Row] = [
    Row("grpo", {"reward": GROUP, "clip": DAPO}),
    Row("grpo", {"reward": GROUP | {"std": False}, "clip": PLAIN, **SEQUENCE},
        {"advantage": "mean", "clip": Clip(), "reduction": Reduction("sequence")}),
    Row("grpo", {"reward": GROUP | {"std": False, "center": "leave_one_out"}, "clip": {**DAPO, "dual": None}, **CONSTANT},
        {"advantage": "leave_one_out", "clip": Clip(0.2, 0.28, None), "reduction": Reduction("constant", length=7)}),
    Row("grpo", {"reward": GROUP | {"drop_equal_groups": True}, "clip": DAPO, "reference": {"coef": 0.3}},
        {"kl_ref": 0.3, "reduction": Reduction(drop_equal_groups=True)}, of=reference_is("teacher")),
    Row("grpo", {"reward": GROUP | {"drop_equal_groups": True}, "clip": DAPO, **SEQUENCE},
        {"reduction": Reduction("sequence", drop_equal_groups=True)}),
    Row("sdpo", {"route": "contexts", "beside": {"support": TOP, "is_clip": 2.0}}, {"top_k": K}),
    Row("sdpo", {"route": "contexts", "beside": {"support": TOP, "is_clip": 2.0}, **SEQUENCE},
        {"top_k": K, "reduction": Reduction("sequence", "own")}),
    Row("srpo", {"reward": GROUP | {"std": False}, "route": "srpo", "clip": DAPO,
                 "beside": {"support": TOP, "is_clip": 2.0, "weight": {"kind": "teacher_entropy"}}}, {"top_k": K}),
    Row("srpo", {"reward": GROUP | {"std": False}, "route": {"kind": "srpo", "feedback": True}, "clip": DAPO,
                 "denominator": "own", **SEQUENCE,
                 "beside": {"support": TOP, "weight": {"kind": "teacher_entropy", "beta": 0.5}}},
        {"top_k": K, "feedback": True, "beta": 0.5, "is_clip": None, "reduction": Reduction("sequence", "own")}),
    Row("sdft", {"beside": {"support": TOP | {"outside": "renormalize"}, "is_clip": 2.0}}, {"top_k": K}),
    Row("opsd-script", {"beside": {"support": FULL, "student_temperature": 1.1, "teacher_temperature": 1.1}}),
    Row("opsd-paper", {"beside": {"divergence": {"kind": "forward_kl"}, "support": FULL, "student_temperature": 1.1,
                                  "term_clip": 0.05}}),
    Row("rlrt", {"reward": GROUP, "scale": "rlrt", "clip": DAPO}),
    Row("rlrt", {"reward": GROUP, "scale": {"kind": "rlrt", "eps": 0.2}, "clip": DAPO, "advantage_at": "live"},
        {"eps": 0.2, "at": "live"}),
    Row("rlsd", {"reward": GROUP, "scale": "rlsd", "clip": DAPO}),
    Row("rlsd", {"reward": GROUP, "scale": {"kind": "rlsd", "negative_only": True, "warmup_steps": 10, "decay_steps": 20},
                 "clip": DAPO}, {"negative_only": True, "mix": 0.5 * 0.75}, step=15),
    Row("visd", {"reward": GROUP, "scale": {"kind": "visd", "k": 3}, "clip": DAPO, "advantage_at": "live"},
        {"top_k": 3, "at": "live"}),
    Row("visd", {"reward": GROUP, "scale": {"kind": "visd", "k": 3}, "clip": DAPO, "advantage_at": "live"},
        {"top_k": 3, "at": "live", "mix": 0.0}, step=600),
    Row("dasd", {"reward": GROUP, "clip": PLAIN,
                 "add": {"kind": "dasd", "beta": 0.7, "entropy_of": "teacher", "normalised_by": "std"}},
        {"entropy_of": "q", "beta": 0.7, "normalise": standardised}),
    Row("dasd", {"clip": PLAIN, "add": {"kind": "dasd", "beta": 2.0, "entropy_of": "student", "normalised_by": "mean_abs"}},
        {"entropy_of": "p", "beta": 2.0, "normalise": by_mean_abs, "advantage": "none"}),
    Row("sod", {"reward": GROUP, "add": {"kind": "sod", "segments_of": "judge"}, "clip": PLAIN}, contexts=False),
    Row("trace", {"reward": GROUP, "clip": DAPO, "route": {"kind": "spans", "errors": True},
                  "beside": {"divergence": {"kind": "forward_kl"}, "on_errors": {"kind": "reverse_kl"}, "support": FULL,
                             "term_clip": 0.05}},
        {"lam": trace_lambda(20)}, step=20, of=all_written),
    Row("trace", {"reward": GROUP, "clip": DAPO, "route": "spans",
                  "beside": {"divergence": {"kind": "forward_kl"}, "support": FULL, "term_clip": 0.05}},
        {"lam": 0.5, "weak": False}, of=all_written),
    Row("ptd-po", {"reward": GROUP, "clip": PLAIN, "route": "failed_groups", "beside": {"support": TOP, "coef": 0.5},
                   "reference": {"coef": 1e-2, "where": "unrouted"}}, {"top_k": K}, of=reference_is("teacher")),
    Row("ptd-po", {"reward": GROUP, "clip": PLAIN, "route": {"kind": "failed_groups", "threshold": 0.2},
                   "beside": {"support": TOP, "coef": 0.05}, "reference": {"coef": 1e-2, "where": "unrouted", "to": "rollout"}},
        {"top_k": K, "threshold": 0.2, "coef": 0.05}, of=reference_is("old")),
    Row("resd", {"reward": GROUP, "route": "divergence",
                 "beside": {"divergence": {"kind": "reverse_kl"}, "support": TOP, "target": {"kind": "floor"},
                            "weight": {"kind": "success_rate"}}}, {"top_k": K}),
    Row("distil", {"beside": {"divergence": {"kind": "forward_kl"}, "cross_entropy": True, "support": FULL,
                              "sequence_gradient": {}}}),
    Row("distil", {"beside": {"divergence": {"kind": "reverse_kl"}, "support": TOP, "sequence_gradient": {"gamma": 0.6}}},
        {"kind": "reverse_kl", "top_k": K, "gamma": 0.6}),
    Row("iw-opd", {"add": "iw", "ratio": "none"}, contexts=False),
    Row("vopd", {"add": {"kind": "vopd", "support": "full", "k": 8}, "ratio": "none", "advantage_at": "live"}, contexts=False),
    Row("vopd", {"add": {"kind": "vopd", "k": K}, "ratio": "none", "advantage_at": "live"}, {"top_k": K}, contexts=False),
    Row("vopd", {"add": {"kind": "vopd", "k": K}, "ratio": "none"}, {"top_k": K, "at": "rollout"}, contexts=False),
    Row("power-opd", {"add": "power", "ratio": "none", "advantage_at": "live", "last_token": False}, contexts=False),
    Row("veto", {"beside": {"divergence": {"kind": "reverse_kl"}, "support": FULL, "target": {"kind": "product"},
                            "logprob_min": -80, "teacher_temperature": 0.2, "student_temperature": 0.5}},
        {"beta": 0.9}, step=25, contexts=False, of=mild),
    Row("veto", {"beside": {"divergence": {"kind": "forward_kl"}, "support": TOP | {"outside": "renormalize"},
                            "target": {"kind": "product", "beta": 0.6}, "logprob_min": -80, "teacher_temperature": 0.2,
                            "student_temperature": 0.5}},
        {"beta": 0.6, "kind": "forward_kl", "top_k": K}, contexts=False, of=mild),
    Row("sdar", {"reward": GROUP, "clip": PLAIN, "likelihood": {}}),
    Row("sdpg", {"reward": GROUP, "clip": PLAIN, "reference": {"kind": "squared", "coef": 1e-3, "to": "rollout"},
                 "beside": {"divergence": {"kind": "reverse_kl"}, "support": FULL, "coef": 1e-3}}, of=reference_is("old")),
    Row("top-d", {"add": {"kind": "proximal", "alpha": 0.3}, "returns": "mean_future", "clip": PLAIN}, {"a": 0.3},
        contexts=False),
    Row("opd", {"add": "log_ratio", "returns": {"kind": "discounted", "gamma": 0.7}, "clip": PLAIN},
        {"kind": "discounted", "gamma": 0.7, "ratio": "ppo"}, contexts=False),
    Row("opd", {"add": "log_ratio", "ratio": "none", "advantage_at": "live"}, {"at": "live"}, contexts=False),
]  # fmt: skip


def named(row: Row) -> str:
    """The name of a test."""
    return f"{row.name}-{CONFIGURED.index(row)}"
