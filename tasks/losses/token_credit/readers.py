"""Which term reads which field of `estimator: credit`, so that a field without effect is refused. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from tasks.losses.token_credit.config import CreditConfig


@dataclass(frozen=True)
class Reader:
    """What reads a field, and in which objectives it is there. Fields below a section (`beside`, a choice with fields of its own)
    are read with it, unless they have a reader of their own."""

    field: str
    by: str
    there: Callable[[CreditConfig], bool] = lambda c: True


def _adds(c: CreditConfig) -> bool:
    return c.policy and c.add.kind != "none"


def _divides(c: CreditConfig) -> bool:
    return c.policy and bool(getattr(c.reward, "std", True))


def _success(c: CreditConfig) -> bool:
    return c.route.success or c.scale.success or (c.beside is not None and c.beside.weight.success)


def _segmented(c: CreditConfig) -> bool:
    return c.add.judged_segments or bool(c.add.segments)


def _bucket(c: CreditConfig) -> bool:
    return c.beside is not None and c.beside.support.outside == "bucket"


def _bounded(c: CreditConfig) -> bool:
    return (c.policy and c.ratio == "ppo") or (c.beside is not None and c.beside.is_clip is not None)


POLICY = "the policy gradient"
READERS: tuple[Reader, ...] = (
    Reader("reward", f"{POLICY}, and what asks which samples are correct", lambda c: c.policy or _success(c)),
    Reader("reward.center", POLICY, lambda c: c.policy),
    Reader("reward.std", POLICY, lambda c: c.policy),
    Reader("reward.eps", f"{POLICY}, where reward.std divides", _divides),
    Reader("reward.success_threshold", "routes, scales and weights that ask which samples are correct", _success),
    Reader("scale", POLICY, lambda c: c.policy),
    Reader("add", POLICY, lambda c: c.policy),
    Reader("add.eps", "an addition; of sod where it has segments", lambda c: c.add.kind != "sod" or _segmented(c)),
    Reader("add.rise", "an addition; of sod where it has segments", lambda c: c.add.kind != "sod" or _segmented(c)),
    Reader("returns", "add, in the policy gradient", _adds),
    Reader("returns.eps", "returns.standardise", lambda c: bool(getattr(c.returns, "standardise", True))),
    Reader("route", "the policy gradient (a) and the divergence (b)"),
    Reader("beside", "the divergence"),
    Reader("beside.tail_logmass_min", "the divergence's bucket (beside.support.outside: bucket)", _bucket),
    Reader("likelihood", "the likelihood term"),
    Reader("reference", "the penalty"),
    Reader("ratio", POLICY, lambda c: c.policy),
    Reader("clip", f"{POLICY} with ratio: ppo", lambda c: c.policy and c.ratio == "ppo"),
    Reader("advantage_at", "scale and add", lambda c: c.policy and (c.scale.kind != "none" or c.add.kind != "none")),
    Reader("log_ratio_clip", "scale, add, the penalty and the metric reverse_kl"),
    Reader("log_rho_clip", f"{POLICY} with ratio: ppo, and beside.is_clip", _bounded),
    Reader("last_token", "every term"),
    Reader("denominator", "every term"),
    Reader("normalisation", "every term"),
    Reader("normalisation_length", "every term"),
)
"""Every field of `CreditConfig`, and those below that are not always read with their section."""


def without_effect(config: CreditConfig) -> Iterator[str]:
    """One sentence for each field that differs from its default and that no term of this objective reads."""
    for reader in READERS:
        *sections, name = reader.field.split(".")
        holder: object = config
        for section in sections:
            holder = getattr(holder, section)
        if not isinstance(holder, BaseModel) or name not in type(holder).model_fields or reader.there(config):
            continue
        value, default = getattr(holder, name), type(holder).model_fields[name].get_default(call_default_factory=True)
        if value != default:
            yield (
                f"objective.{reader.field}: {_shown(value)} has no effect in this objective, because it is read by {reader.by}"
                f" alone{_why(config)}; leave it out, or set it to {_shown(default)}"
            )


def _why(c: CreditConfig) -> str:
    if not c.route.policy:
        return f", and route {c.route.kind} has no policy gradient"
    return "" if c.policy else ", and without reward and add there is no policy gradient"


def _shown(value: object) -> str:
    """A value as a config writes it; of a section the kind, or its name for what it is."""
    if isinstance(value, BaseModel):
        return str(getattr(value, "kind", "this section"))
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
