"""Applies token weights, detached; masked tokens get harmless inputs."""

from __future__ import annotations

from torch import Tensor

from tasks.losses.token_weights import TokenWeight, Weighable
from tasks.losses.types import TokenBatch, working


def weighted(loss_N: Tensor, weight: TokenWeight, batch: TokenBatch, divergence_N: Tensor) -> Tensor:
    """The per-token loss times its token's weight. `divergence_N`: how far apart the models are at each token, nats."""
    out = batch.loss_mask_N <= 0
    entropy = batch.teacher_entropy_N
    found = weight(
        Weighable(
            position_N=batch.position_N.to(working(loss_N).dtype),
            divergence_N=working(divergence_N.detach()).masked_fill(out, 0),
            teacher_entropy_N=None if entropy is None else working(entropy.detach()).masked_fill(out, 0),
            signals={
                name: working(value.detach()).masked_fill(out, 0) for name, value in (batch.signals or {}).items()
            },
        )
    )
    return loss_N if found is None else loss_N * found.detach()
