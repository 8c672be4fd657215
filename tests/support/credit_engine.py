"""The product under the identities of rewards and token credit: rows with their fields, as configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from credit_configs import DAPO, GROUP, PLAIN
from credit_rows import Clip, Gate, Reduction, Toy
from credited import batch_of, planned, stored_of, weights_of
from plain_head import PlainHead
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.token_credit.additions import ADDITIONS, Addition
from tasks.losses.token_credit.config import CreditConfig
from tasks.losses.token_credit.stored import Tokens

Found = tuple[float, list[list[float]], list[Tensor]]
WITHOUT_CONTEXTS = {"sod", "vopd", "opd", "power-opd", "veto", "resd"}
"""Rows of an external teacher, or which count all samples."""


class Given(Addition):
    """A function of d that a test gives."""

    kind: Literal["given"] = "given"
    equation = "delta = r(d)"
    paper = ""

    def __call__(self, tokens: Tokens) -> Tensor:
        found = [_FUNCTION[-1](d) for d in tokens.d_N.tolist()]
        return torch.tensor(found, dtype=tokens.d_N.dtype)


_FUNCTION: list[Callable[[float], float]] = []


def product(row: str, toy: Toy, *, gate: Gate | None = None, **fields: Any) -> Found:
    """Loss, each token's share of it, and its gradient with respect to every sample's live logits."""
    toy = replace(toy, samples=[replace(s, live=s.live.detach().requires_grad_()) for s in toy.samples])
    reduction: Reduction = fields.pop("reduction", Reduction())
    divided: dict[str, Any] = {"normalisation": reduction.normalisation}
    if reduction.normalisation == "constant":
        divided["normalisation_length"] = int(reduction.length)
    _FUNCTION.append(fields.pop("reward", lambda d: d))
    ADDITIONS.classes["given"] = Given
    try:
        config = CreditConfig.model_validate({**config_of(row, toy, **fields), **divided})
        remembered = None
        if gate is not None:
            warm = np.array([] if gate.warm is None else [gate.warm])
            memory = {"steps": [gate.step], "entropies": gate.entropies, "warm": warm, "gate": [gate.g]}
            kept = {name: np.array(values, np.float64) for name, values in memory.items()}
            remembered, _ = config.add.remember(kept, stored_of(toy, config))
        columns = planned(toy, config, contexts=row not in WITHOUT_CONTEXTS, remembered=remembered)
        objective, batch = make_objective(config), batch_of(toy, config, columns, torch.float64)
        logits = torch.cat([sample.live for sample in toy.samples])
        view = PlainHead()(logits, nn.Identity(), batch, objective.needs.student)
        share = weights_of(toy, config).double() * objective(batch, view).per_token_N
    finally:
        del ADDITIONS.classes["given"], _FUNCTION[-1]
    gradients = torch.autograd.grad(share.sum(), [sample.live for sample in toy.samples])
    parts = share.detach().split([len(sample.tokens) for sample in toy.samples])
    return float(share.detach().sum()), [part.tolist() for part in parts], list(gradients)


def config_of(row: str, toy: Toy, **fields: Any) -> dict[str, Any]:
    """The config of a row with these fields of `credit_rows`; other fields have their defaults there and here."""
    clip: Clip | None = fields.pop("clip", None)
    usual = DAPO if row in ("grpo", "rlsd") else PLAIN
    clipped = usual if clip is None else {"low": clip.lo, "high": clip.hi, "dual": clip.dual}
    full = {"kind": "full", "k": toy.vocabulary}
    plain = {"opd": "token", "sdpo": "jsd", "sdft": "jsd", "distil": "cross_entropy"}
    divergence = fields.pop("kind", plain.get(row, "reverse_kl"))

    def support(outside: str) -> dict[str, Any]:
        k = fields.pop("top_k", 100)
        k = None if k is None else min(k, toy.vocabulary)
        return full if k is None else {"kind": "student_topk", "k": k, "outside": outside}

    def reward() -> dict[str, Any]:
        kind = fields.pop("advantage", "std")
        if kind == "none":
            return {"kind": "none"}
        return GROUP | {"std": kind == "std", "center": "leave_one_out" if kind == "leave_one_out" else "mean"}

    at = {"advantage_at": fields.pop("at")} if "at" in fields else {}
    ratio = fields.pop("ratio", "none" if row in ("opd", "vopd", "power-opd") else "ppo")
    policy = {"ratio": ratio, "clip": clipped if ratio == "ppo" else None}
    match row:
        case "grpo":
            found = {"reward": reward(), **policy}
        case "rlsd":
            found = {"reward": reward(), "scale": "rlsd", **policy}
        case "sod":
            found = {"reward": reward(), "add": "sod", **policy}
        case "antisd":
            found = {"reward": reward(), "add": "anti_sd", **policy}
        case "vopd":
            add = {"kind": "vopd", "support": "student_topk", "k": toy.vocabulary}  # its rollout-time values are stored
            found = {"add": add if fields.pop("baseline", True) else "log_ratio", "advantage_at": "live", **policy}
        case "opd":
            returns, gamma = {"kind": divergence}, fields.pop("gamma", 1.0)
            if divergence == "discounted":
                returns = {"kind": divergence, "gamma": gamma} if gamma else {"kind": "token"}
            if divergence == "mean_future":
                returns["standardise"] = False
            found = {"add": "given", "returns": returns, **policy}
        case "power-opd":
            found = {"add": "power", "advantage_at": "live", "last_token": not fields.pop("mask_stop", True), **policy}
        case "veto":
            target = {"kind": "product", "beta": fields.pop("beta")}
            temperatures = {
                name: fields.pop(name, plain)
                for name, plain in (("teacher_temperature", 0.2), ("student_temperature", 0.5))
            }
            found = {"beside": {"divergence": {"kind": divergence}, "support": full, "target": target, **temperatures}}
        case "resd":
            beside = {"support": support("bucket"), "target": {"kind": "floor"}, "weight": {"kind": "success_rate"}}
            found = {"reward": GROUP, "route": "divergence", "beside": {"divergence": {"kind": divergence}, **beside}}
        case "sdpo" | "sdft":
            beside = {
                "support": support("bucket" if row == "sdpo" else "renormalize"),
                "is_clip": fields.pop("is_clip", 2.0),
            }
            route = {"route": "contexts"} if row == "sdpo" else {}
            found = {"beside": {"divergence": {"kind": divergence}, **beside}, **route}
        case "distil":
            crossed = divergence == "cross_entropy"
            later = {"gamma": fields.pop("gamma", 1.0)} if fields.pop("sequence_gradient", True) else None
            beside = {"cross_entropy": crossed, "support": full, "sequence_gradient": later}
            found = {"beside": {"divergence": {"kind": "forward_kl" if crossed else divergence}, **beside}}
        case "ptd-po":
            coef = fields.pop("kl_ref", 1e-2)
            reference = {"coef": coef, "where": "unrouted"} if coef else None
            beside = {"divergence": {"kind": "jsd", "beta": 0.5}, "support": support("bucket"), "coef": 0.5}
            found = {"reward": reward(), "route": "failed_groups", "beside": beside, "reference": reference, **policy}
        case _:
            raise ValueError(f"{row}: no identity asks for it")
    assert not fields, f"{row}: {sorted(fields)} are no fields that an identity asks for"
    return {**found, **at}
