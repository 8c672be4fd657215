"""AntiSD: away from the privileged teacher, behind a gate that remembers. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from tasks.losses.token_credit.additions import Addition, Memory, register
from tasks.losses.token_credit.stored import Stored, Tokens

if TYPE_CHECKING:
    from torch import Tensor

WAITS = "waits"
"""In a memory without any scored token: the warm-up goes on until there is one. Versions before this rule let it end after
`warm_steps` steps, with the gate shut for ever, and wrote no such mark: their states go on as they began. The mark is in the
state's content, and so in the key of the next round; a memory with a scored token means the same under both rules."""


@register
class AntiSD(Addition):
    """AntiSD (2605.11609): climbs the Jensen-Shannon divergence from the teacher that knows the answer, while H_q is high enough.

    The gate g is 0 during the first `warm_steps` steps, whose tokens' entropies are kept: H_warm is their median. Where none of
    these steps has a scored token, the warm-up goes on to the first step that has one (ours). From then on, by the median of the
    current step: g = 0 below `close_below` x H_warm, 1 from H_warm on, unchanged between. The memory is part of the trainer's
    state. Entropies are those of the scored tokens, whatever the loss mask."""

    kind: Literal["anti_sd"] = "anti_sd"
    equation = "delta = -coef g phi, phi = 1/2 (softplus(d) - log 2)"
    paper = "2605.11609"
    remembers = True
    contexts = True

    coef: float = Field(0.5, gt=0, description="weight of phi")
    warm_steps: int = Field(5, ge=1, description="first optimizer steps, with g = 0, whose entropies give H_warm")
    close_below: float = Field(0.93, gt=0, lt=1, description="g becomes 0 below this share of H_warm")

    @property
    def entropy(self) -> Literal["teacher"]:
        return "teacher"

    def remember(self, memory: Memory, stored: Stored) -> tuple[float, Memory]:
        assert stored.teacher_entropy_N is not None
        entropies = stored.teacher_entropy_N[stored.scored_N].numpy()
        nothing = np.empty(0)
        steps = int(memory["steps"][0]) if "steps" in memory else 0
        kept, warm = memory.get("entropies", nothing), memory.get("warm", nothing)
        gate = float(memory["gate"][0]) if "gate" in memory else 0.0
        none_yet = not len(kept) and not len(warm)
        earlier = (
            none_yet and steps > 0 and WAITS not in memory
        )  # of a version whose warm-up ended here, without H_warm
        if not len(warm) and (steps < self.warm_steps or not earlier):
            kept = np.concatenate([kept, entropies])
            if steps + 1 >= self.warm_steps and len(kept):
                kept, warm = nothing, np.array([np.median(kept)])
        elif len(warm) and len(entropies):
            now = float(np.median(entropies))
            gate = 0.0 if now < self.close_below * warm[0] else 1.0 if now >= warm[0] else gate
        after = {"steps": np.array([steps + 1.0]), "entropies": kept, "warm": warm, "gate": np.array([gate])}
        if not len(kept) and not len(warm) and not earlier:
            after[WAITS] = np.array([1.0])
        return gate, after

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        assert stored.remembered is not None
        return {"gate": stored.log_p_N.new_full(stored.log_p_N.shape, stored.remembered)}

    def __call__(self, tokens: Tokens) -> Tensor:
        d = tokens.d_N
        softplus = d.clamp(min=0) + (-d.abs()).exp().log1p()
        return -self.coef * tokens.planned["gate"] * (softplus - math.log(2)) / 2
