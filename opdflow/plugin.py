"""All that a plugin builds on, in one place. A plugin is a module or package on the import path, named in a config as
`plugins: [my_module]`; what it registers when it is imported can be named in configs, and is found by `opd objectives`, the
generated pages, queries, collection and replays.

    from opdflow.plugin import Divergence, register

    @register
    class Mine(Divergence): ...

`register` takes a class of any open axis: a behaviour, divergence, trust region, token weight,
credit, signal, teacher backend or tracker.
`register_role` lets a class of the plugin's serve the jobs of a worker role, `register_schema` adds jobs of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flows import trackers as _trackers
from flows.trackers import Point, Tracked, Tracker, TrackerConfig
from storage.schemas import Column, TableSchema
from tasks import behaviours as _behaviours
from tasks.behaviours import Behaviour, Completion, Draw, Drawn, Score, Scored, Start, Stops
from tasks.engines import teacher as _teacher
from tasks.engines.teacher import Capabilities, Host, Passage, Teacher, TeacherBackend, Vocabulary
from tasks.losses import credit as _credit
from tasks.losses import divergences as _divergences
from tasks.losses import token_weights as _token_weights
from tasks.losses import trust_regions as _trust_regions
from tasks.losses.credit import Credit, CreditContext, CreditTerms
from tasks.losses.divergences import Divergence
from tasks.losses.needs import CreditNeeds, SignalNeed
from tasks.losses.token_weights import TokenWeight, Weighable
from tasks.losses.trust_regions import SideTerm, TrustRegion
from tasks.signals import Ask, Shard, Signal, Values, Wanted, Written
from tasks.signals import register as _register_signal
from tasks.workers.jobs import Schema, register_role, register_schema

__all__ = [
    "Ask", "Behaviour", "Capabilities", "Column", "Completion", "Credit", "CreditContext", "CreditNeeds", "CreditTerms",
    "Divergence", "Draw", "Drawn", "Host", "Passage", "Point", "Schema", "Score", "Scored", "Shard", "SideTerm", "Signal",
    "SignalNeed", "Start", "Stops", "TableSchema", "Teacher", "TeacherBackend", "TokenWeight", "Tracked", "Tracker",
    "TrackerConfig", "TrustRegion", "Values",
    "Vocabulary", "Wanted", "Weighable", "Written", "register", "register_role", "register_schema",
]  # fmt: skip

C = TypeVar("C", bound=type)
_AXES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (Behaviour, _behaviours.register),
    (Divergence, _divergences.register),
    (TrustRegion, _trust_regions.register),
    (TokenWeight, _token_weights.register),
    (Credit, _credit.register),
    (Signal, _register_signal),
    (TeacherBackend, _teacher.register),
    (TrackerConfig, _trackers.register),
)


def register(cls: C) -> C:
    """Class decorator: adds a class to the registry of its axis. TypeError for a class of none of them, ConfigError for a kind
    that is taken."""
    for base, add in _AXES:
        if issubclass(cls, base):
            return add(cls)  # type: ignore[no-any-return]  # each registry returns the class that it was given
    raise TypeError(f"{cls.__name__}: subclass one of {', '.join(base.__name__ for base, _ in _AXES)}")
