"""Inputs and outputs of an objective. Shapes: see `tasks.losses`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Packed completion tokens of a micro-batch with their cached signals; null where a signal was not asked for.

    Rows of a support list with fewer than K valid entries are padded with id 0 and -inf. All log-probabilities are at
    temperature 1 over the whole vocabulary, in nats. Raises ValueError when lengths disagree."""

    token_ids_N: Tensor
    loss_mask_N: Tensor
    """1 where the token counts, 0 where it does not; floating."""
    sample_N: Tensor
    """index of the sample that a token belongs to, within the global batch"""
    position_N: Tensor
    """index of the token in its completion"""
    student_logprobs_N: Tensor | None = None
    """log p_old of the sampled token: the rollout-time student, scored by transformers"""
    teacher_logprobs_N: Tensor | None = None
    teacher_entropy_N: Tensor | None = None
    student_entropy_N: Tensor | None = None
    sampling_logprobs_N: Tensor | None = None
    behaviour_logprobs_N: Tensor | None = None
    uniform_N: Tensor | None = None
    """counter-based draws in [0, 1)"""
    teacher_prefix_N: Tensor | None = None
    """1 where the teacher wrote the token"""
    reward_N: Tensor | None = None
    """reward of the token's sample; NaN where its judge failed"""
    group_N: Tensor | None = None
    """index of the sample's prompt in the round"""
    group_rewards_NG: Tensor | None = None
    """rewards of all samples of that prompt in the round, NaN where a judge failed; padded with NaN on the right"""
    segment_N: Tensor | None = None
    """index of the token's segment in its completion"""
    support_ids_NK: Tensor | None = None
    support_valid_N: Tensor | None = None
    """number of valid entries, at the front of each row"""
    support_teacher_valid_N: Tensor | None = None
    """of a union: how many of these, at the front, are the teacher's own list"""
    teacher_support_logprobs_NK: Tensor | None = None
    student_support_logprobs_NK: Tensor | None = None
    """rollout-time student on the support"""
    teacher_tail_logmass_N: Tensor | None = None
    """log of the teacher's mass outside the support"""
    signals: Mapping[str, Tensor] | None = None
    """further numbers per token (N), of signals that plugins bring: `<signal>_<column>`"""
    planned: Mapping[str, Tensor] | None = None
    """numbers per token (N) that the step's plan has computed from the whole step (`losses/token_credit/plan.py`)"""

    def __post_init__(self) -> None:
        n = self.token_ids_N.shape[0]
        widths = {
            axis: None if first is None else first.shape[-1]
            for axis, first in (("K", self.support_ids_NK), ("G", self.group_rewards_NG))
        }
        tensors = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in ("signals", "planned")
        }
        for name, value in {**tensors, **(self.signals or {}), **(self.planned or {})}.items():
            wanted = (n, *(widths[axis] for axis in name.rpartition("_N")[2] if name in tensors))
            if value is not None and tuple(value.shape) != wanted:
                raise ValueError(f"TokenBatch.{name}: shape {tuple(value.shape)}, expected {wanted}")

    def at(self, places_C: Tensor) -> TokenBatch:
        """The batch of C of the tokens."""

        def taken(values: Any) -> Any:
            if isinstance(values, Mapping):
                return {name: taken(value) for name, value in values.items()}
            return None if values is None else values.index_select(0, places_C)

        return replace(self, **{entry.name: taken(getattr(self, entry.name)) for entry in fields(self)})


@dataclass(frozen=True, kw_only=True)
class StudentView:
    """What a head provider computed of the live student; null if it was not requested."""

    token_logprobs_N: Tensor | None = None
    support_logprobs_NK: Tensor | None = None
    """normalised over the vocabulary where the log-normaliser was asked for, else logits on the support"""
    log_normaliser_N: Tensor | None = None
    support_tail_logmass_N: Tensor | None = None
    """log of the student's mass outside the support, never NaN: a very low number where nothing lies outside"""
    entropy_N: Tensor | None = None
    support_overlap_N: Tensor | None = None
    """share of the teacher's list that is among as many top entries of the student; null without the teacher's list"""


@dataclass(frozen=True)
class ObjectiveOutput:
    """Per-token loss (exactly 0 where masked out) and per-token metrics, named as columns of `training_steps`.

    The trainer weighs and sums `per_token_N`, and takes masked global means of the metrics."""

    per_token_N: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def required(value: Tensor | None, what: str) -> Tensor:
    """`value`, or ValueError naming what is missing."""
    if value is None:
        raise ValueError(
            f"the objective needs {what}, which is missing; its `needs` must declare it, and the caller provide it"
        )
    return value


def working(tensor: Tensor) -> Tensor:
    """In float32 at least: half-precision inputs are never subtracted or exponentiated as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def lowest(tensor: Tensor) -> float:
    """A finite stand-in for -inf that can be added to another without overflow."""
    return torch.finfo(tensor.dtype).min / 4
