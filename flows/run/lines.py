"""A round as one line that fits a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from flows.run.shown import NOT_EVALUATED, with_error
from storage.runs import RoundState

SHOWN = (
    ("accuracy_greedy", "accuracy", "{:.1%}"),
    ("accuracy_sampled", "sampled", "{:.1%}"),
    ("reverse_kl", "KL", "{:.4f}"),
    ("mean_length", "length", "{:.0f}"),
    ("clipped_ratio", "clipped", "{:.0%}"),
)
"""Metric, its short label, form. `sampled` is shown where there is no greedy accuracy."""


def short_line(state: RoundState, goal: int | None, width: int, in_store: bool = False) -> str:
    """`round 7/25  accuracy 24.5% ± 3.0%  KL 0.0512 ± 0.0030  n 200  length 18  clipped 9%  41 s`: as many parts as fit in
    `width`, the last ones first to go. The errors of accuracy and KL stay; n is theirs, where it is one number."""
    name = f"round {state.round}" + (f"/{goal}" if goal else "")
    parts = [*([NOT_EVALUATED] if state.unevaluated else [])]
    for metric, label, form in SHOWN:
        if metric == "accuracy_sampled" and state.metrics.get("accuracy_greedy") is not None:
            continue
        if metric in ("mean_length", "clipped_ratio"):
            value = state.metrics.get(metric)
            parts += [] if value is None else [f"{label} {form.format(value)}"]
        elif text := with_error(state.metrics, metric, form):
            parts.append(f"{label} {text}")
        if metric == "reverse_kl" and (size := _n(state)):
            parts.append(size)
    seconds = sum(stage.seconds or 0 for stage in state.stages.values() if stage.state == "done")
    parts += ["in the store"] if in_store else [f"{seconds:.0f} s"] if seconds else []
    return _fitting(name, parts, width)


def _n(state: RoundState) -> str:
    sizes = {state.metrics.get(f"{name}_n") for name in ("accuracy_greedy", "reverse_kl")} - {None}
    return f"n {next(iter(sizes)):,.0f}" if len(sizes) == 1 else ""


def _fitting(name: str, parts: Sequence[str], width: int) -> str:
    line = name
    for part in parts:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line
