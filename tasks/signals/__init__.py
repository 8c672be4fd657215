"""Signals of supervision, one registered class each. The class holds all that planning, scoring, storage and training need to
know about its signal. Importing this package registers the built-in signals; a plugin registers its own. No torch, no engine."""

from tasks.signals import mask, sampled, student_topk, teacher_topk  # noqa: F401  (they register themselves)
from tasks.signals.signal import SIGNALS, Inputs, Shard, Signal, Written, register, require_usable, signal_named
from tasks.signals.wanted import Ask, Values, Wanted

__all__ = [
    "SIGNALS",
    "Ask",
    "Inputs",
    "Shard",
    "Signal",
    "Values",
    "Wanted",
    "Written",
    "register",
    "require_usable",
    "signal_named",
]
