"""Supervised fine-tuning: the warm-up, and the off-policy baseline on teacher text."""

from __future__ import annotations

from tasks.losses.config import SftConfig
from tasks.losses.metrics import sampled_metrics
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch, lowest, required, working


class SftObjective:
    """per_token = -log p(y): maximum likelihood of the given text."""

    tokenwise = True

    def __init__(self, config: SftConfig) -> None:
        self.config = config
        self.needs = config.needs()

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """Needs the live student's log-probability of each token."""
        out = batch.loss_mask_N <= 0
        live = working(required(student.token_logprobs_N, "student.token_logprobs_N"))
        loss = -live.clamp(min=lowest(live)).masked_fill(out, 0)
        return ObjectiveOutput(loss, sampled_metrics(batch, observed or student))
