"""Signals of supervision: one registered class each, which says everything that planning, scoring, storing and training must
know of it. Importing this package registers those of this program; a plugin registers its own. No torch, no engine."""

from tasks.signals import mask, sampled, student_topk, teacher_topk  # noqa: F401  (they register themselves)
from tasks.signals.signal import SIGNALS, Inputs, Shard, Signal, Written, register, signal_named
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
    "signal_named",
]
