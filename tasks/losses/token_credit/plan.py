"""What is known of a step's tokens before their micro-batches: factors with the means of the whole step in them.

The objective multiplies by these columns. They are computed from stored values of all samples of the step, so that neither ranks
nor micro-batches nor their order change a token's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.losses.token_credit.config import CreditConfig
from tasks.losses.token_credit.routes import Routed
from tasks.losses.token_credit.stored import Stored, Tokens

Columns = dict[str, Tensor]


def plan_step(config: CreditConfig, stored: Stored, returns_N: Tensor | None = None) -> Columns:
    """By name a number per token [N] of the step, finite; see `objective.py`. `returns_N`: the returns of what is added, where
    they reach beyond the step (`returns_of`)."""
    counted_N = stored.counted_N & ~_left_out(config, stored)
    found: Columns = {"scored": stored.scored_N.to(stored.log_p_N.dtype)}
    routed = config.route(stored)
    if config.policy:
        found["a"] = routed.a_N * _factor(config, stored, _own(config, counted_N, routed.a_N))
        advantage_S = stored.advantage_S
        found["advantage"] = (
            found["a"].new_zeros(found["a"].shape) if advantage_S is None else stored.spread(advantage_S)
        )
        found |= config.scale.plan(stored)
        if config.returns.kind != "token":
            returns_N = returns_of(config, stored) if returns_N is None else returns_N
            found["delta"] = returns_N.masked_fill(~stored.written_N, 0)
        else:
            found |= config.add.plan(stored)
    found |= _of_beside(config, stored, counted_N, routed)
    if config.likelihood is not None:
        of_N = _own(config, counted_N, stored.spread(stored.context_S))
        found["likelihood"] = config.likelihood.coef * stored.scored_N * _factor(config, stored, of_N)
    if config.reference is not None:
        rest_N = routed.rest_N
        where_N = counted_N if config.reference.where == "all" or rest_N is None else counted_N & rest_N
        found["reference"] = config.reference.coef * where_N * _factor(config, stored, _own(config, counted_N, where_N))
    return {name: values.masked_fill(~counted_N, 0) for name, values in found.items()}


def returns_of(config: CreditConfig, stored: Stored) -> Tensor:
    """The return of what is added, from stored values, before it is normalised by group."""
    tokens = Tokens(
        log_p_N=stored.log_p_N,
        log_q_N=stored.log_q_N,
        d_N=stored.d_N.clamp(-config.log_ratio_clip, config.log_ratio_clip),
        advantage_N=torch.zeros_like(stored.log_p_N),
        planned=config.add.plan(stored),
    )
    delta_N = config.add(tokens)
    assert delta_N is not None
    return config.returns(delta_N.masked_fill(~stored.scored_N, 0), stored)


def _of_beside(config: CreditConfig, stored: Stored, counted_N: Tensor, routed: Routed) -> Columns:
    beside = config.beside
    if beside is None:
        return {}
    routed_N = counted_N & (routed.b_N > 0)
    weight_N = beside.weight(stored, routed_N)
    b_N = beside.coef * routed.b_N if weight_N is None else beside.coef * routed.b_N * weight_N
    known_N = stored.written_N & stored.valid_N
    if config.route.by_length:
        weight_S = 1 / (len(stored.context_S) * stored.length_S.clamp(min=1))
        trainers_S = _trainers(config, stored)
        factor_N = stored.spread((weight_S / trainers_S).masked_fill(trainers_S == 0, 0))
    else:
        factor_N = _factor(config, stored, _own(config, counted_N, b_N))
    found = {"b": b_N * known_N * factor_N}
    if routed.error_N is not None and beside.on_errors is not None:
        found["error"] = routed.error_N.to(b_N.dtype)
    if (value := beside.target.value(stored.step)) is not None:
        found["target"] = torch.full_like(b_N, value)
    return found


def _left_out(config: CreditConfig, stored: Stored) -> Tensor:
    """bool [N]: tokens that the loss mask has, and this objective leaves out of the loss and of its denominator."""
    out_N = torch.zeros_like(stored.counted_N)
    if config.reward.drops_equal_groups and stored.equal_S is not None:
        out_N = out_N | stored.spread(stored.equal_S)
    if not config.last_token:
        assert stored.ended_S is not None
        last_N = stored.position_N == stored.spread(stored.length_S) - 1
        out_N = out_N | (last_N & stored.spread(stored.ended_S))
    return out_N


def _own(config: CreditConfig, counted_N: Tensor, weight_N: Tensor) -> Tensor:
    """bool [N]: the tokens whose number divides a term."""
    return counted_N & (weight_N > 0) if config.own_denominators else counted_N


def _trainers(config: CreditConfig, stored: Stored) -> Tensor:
    """What the trainer multiplies the loss of each sample's tokens by [S]: one over the tokens of the loss mask."""
    return _weights(config, stored.sums(stored.counted_N))


def _weights(config: CreditConfig, counts_S: Tensor) -> Tensor:
    """One over a number of tokens, as `normalisation` has it; 0 where there are none. `constant` has its own number."""
    if config.normalisation == "token":
        return (
            torch.full_like(counts_S, 1 / float(counts_S.sum())) if counts_S.sum() > 0 else torch.zeros_like(counts_S)
        )
    if config.normalisation == "sequence":
        return (counts_S > 0) / ((counts_S > 0).sum().clamp(min=1) * counts_S.clamp(min=1))
    assert config.normalisation_length is not None
    return torch.full_like(counts_S, 1 / (len(counts_S) * config.normalisation_length))


def _factor(config: CreditConfig, stored: Stored, own_N: Tensor) -> Tensor:
    """What turns the trainer's denominator [N], of all that count, into that of the tokens `own_N`; 0 without any."""
    trainers_S = _trainers(config, stored)
    factor_S = _weights(config, stored.sums(own_N)) / trainers_S
    return stored.spread(factor_S.masked_fill(trainers_S == 0, 0))
