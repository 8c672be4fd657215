"""What an objective of `estimator: credit` does, in a sentence for people. Imports no torch."""

from __future__ import annotations

from tasks.losses.token_credit.config import CreditConfig

_WHERE = {
    "all": "at every token",
    "divergence": "at every token",
    "contexts": "on samples with a context",
    "srpo": "on wrong samples with a context, which the rewards leave alone",
    "failed_groups": "on wrong samples of prompts that mostly fail",
    "spans": "on the spans that the judge marks",
}
"""Of routes: where the divergence counts."""


def sentence(c: CreditConfig) -> str:
    """The terms of the loss, one after another."""
    terms = []
    if c.policy:
        by = []
        if c.reward.uses_rewards:
            centre = (
                "the others'" if getattr(c.reward, "center", "mean") == "leave_one_out" else "its prompt's samples'"
            )
            by.append(f"the reward of its sample relative to {centre} mean")
        if c.add.kind != "none":
            by.append(f"what the teacher says of it ({c.add.kind})")
        scaled = "" if c.scale.kind == "none" else f", scaled by the teacher ({c.scale.kind})"
        clipped = "" if c.clip is None else f", with the ratio clipped to 1 - {c.clip.low:g} .. 1 + {c.clip.high:g}"
        terms.append(f"each token becomes likelier or less likely by {' and by '.join(by)}{scaled}{clipped}")
    if c.beside is not None:
        support = c.beside.support
        over = "the whole vocabulary" if support.kind == "full" else f"{support.kind} {support.k}"
        where = _WHERE.get(c.route.kind, f"where route {c.route.kind} sends it")
        terms.append(f"the student is drawn to the teacher by {c.beside.divergence.kind} over {over} {where}")
    if c.likelihood is not None:
        terms.append("tokens that the teacher prefers become likelier")
    if c.reference is not None:
        whom = "the teacher" if c.reference.to == "teacher" else "the student that wrote the rollouts"
        terms.append(f"leaving {whom} is penalised ({c.reference.kind}, {c.reference.coef:g})")
    return "; ".join(terms)
