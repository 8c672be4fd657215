"""The denominators: what a token weighs in the loss, and by what the sum over the global batch is divided."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.losses.config import DirectConfig, PolicyGradientConfig, SftConfig
from tasks.losses.types import TokenBatch


def reduction_terms(
    batch: TokenBatch, config: DirectConfig | PolicyGradientConfig | SftConfig
) -> tuple[Tensor, Tensor]:
    """(weights_N, this micro-batch's share of the denominator).

    The loss is `sum(weights * per_token) / sum of the shares`, both sums over all micro-batches of all ranks: so
    neither the split into micro-batches nor the world size has any influence. A sample lies whole in one micro-batch.

    token: weight = loss_mask, share = masked-in tokens (the mean over tokens of the global batch);
    sequence: weight = loss_mask / masked-in tokens of its sample, share = samples with any;
    constant: weight = loss_mask, share = samples x normalisation_length."""
    mask = batch.loss_mask_N
    if config.normalisation == "token":
        return mask, mask.sum()
    samples, index = torch.unique(batch.sample_N, return_inverse=True)
    lengths = torch.zeros(samples.shape[0], dtype=mask.dtype, device=mask.device).index_add_(0, index, mask)
    if config.normalisation == "constant":
        return mask, torch.as_tensor(samples.shape[0] * (config.normalisation_length or 1), device=mask.device)
    return torch.where(mask > 0, mask / lengths.clamp(min=1)[index], 0), (lengths > 0).sum()
