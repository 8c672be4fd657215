"""A credit's context from log u, with a value for everything that a credit may need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.losses.credit import CreditContext
from tasks.losses.divergences import Divergence


def context_of(divergence: Divergence, log_u: Tensor, **fields: Any) -> CreditContext:
    """One sample and its tokens, all of which count; log_u [N] is that of the live and of the rollout-time student.
    `fields` replace values."""
    n = log_u.shape[0]
    index, ones = torch.arange(n), torch.ones_like(log_u)
    values = {
        "log_p_live": -1.5 - log_u.clamp(min=0),
        "log_p_rollout": -1.5 - log_u.clamp(min=0),
        "log_q": -1.5 + log_u.clamp(max=0),
        "mask_N": ones,
        "sample_N": torch.zeros_like(index),
        "position_N": index,
        "segment_N": index // 3,
        "teacher_entropy_N": 0.5 * ones,
        "student_entropy_N": 0.25 * ones,
        "reward_N": ones,
        "group_N": torch.zeros_like(index),
        "group_rewards_NG": torch.stack([ones, 0 * ones, ones / 0 - ones / 0], 1),
    }
    return CreditContext(divergence=divergence, log_u=log_u, **(values | fields))
