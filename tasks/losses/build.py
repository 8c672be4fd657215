"""From a config, which loads no torch, to the objective that computes it."""

from __future__ import annotations

from typing import Protocol

from tasks.losses.config import (
    AnyObjective,
    CreditConfig,
    DirectConfig,
    Needs,
    PairsConfig,
    PolicyGradientConfig,
    SftConfig,
)
from tasks.losses.direct import DirectObjective
from tasks.losses.pairs import PairsObjective
from tasks.losses.policy_gradient import PolicyGradientObjective
from tasks.losses.sft import SftObjective
from tasks.losses.token_credit.objective import CreditObjective
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch


class Objective(Protocol):
    """Per-token values and metrics of a micro-batch; stateless."""

    needs: Needs
    tokenwise: bool
    """whether a token's loss depends on no other token: the loss of part of a batch is then part of the loss"""

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """`student` answers `needs.student`, with gradient; `observed`, if given, answers `needs.metrics`."""


def make_objective(config: AnyObjective) -> Objective:
    """The objective that a config describes."""
    match config:
        case DirectConfig():
            return DirectObjective(config)
        case PolicyGradientConfig():
            return PolicyGradientObjective(config)
        case CreditConfig():
            return CreditObjective(config)
        case PairsConfig():
            return PairsObjective(config)
        case SftConfig():
            return SftObjective(config)
