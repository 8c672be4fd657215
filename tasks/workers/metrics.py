"""Step metrics: what the trainer reports, and how terminal and logs format it. Imports no engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

Metrics = Mapping[str, float | None]
"""Column of `training_steps` -> latest value. Null and absent both mean: not computed."""


class Progress(Protocol):
    """Callback for a job's progress. Metrics are optional; the latest of each counts. A note is shown to the user at once, so
    that it is not lost if the worker dies later."""

    def __call__(self, done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None: ...


def silent(done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
    """Ignores progress."""


class StageProgress(Protocol):
    """The same for a stage, with the unit of what is counted."""

    def __call__(self, done: int, total: int, unit: str, metrics: Metrics | None = None) -> None: ...


_LOG_RATIO = ("log_ratio_p05", "log_ratio_p50", "log_ratio_p95")
_Words = tuple[str, tuple[str, ...], str]
"""Label, the metrics shown together under it, and the format of each."""
_LONG: tuple[_Words, ...] = (
    ("loss", ("loss",), "{:.4g}"),
    ("grad norm", ("grad_norm",), "{:.3g}"),
    ("teacher mass", ("teacher_mass",), "{:.1%}"),
    ("student mass", ("student_mass",), "{:.1%}"),
    ("overlap", ("overlap_ratio",), "{:.2f}"),
    ("entropy", ("student_entropy",), "{:.2f}"),
    ("teacher entropy", ("teacher_entropy",), "{:.2f}"),
    ("outliers", ("outlier_fraction",), "{:.1%}"),
    ("clipped", ("clip_fraction",), "{:.1%}"),
    ("log-ratio p5/50/95", _LOG_RATIO, "{:z.2f}"),
    ("drift", ("drift",), "{:.3g}"),
)
_SHORT: tuple[_Words, ...] = (
    ("loss", ("loss",), "{:.4g}"),
    ("grad", ("grad_norm",), "{:.3g}"),
    ("mass", ("teacher_mass", "student_mass"), "{:.0%}"),
    ("H", ("student_entropy", "teacher_entropy"), "{:.2f}"),
    ("clip", ("clip_fraction",), "{:.0%}"),
    ("out", ("outlier_fraction",), "{:.0%}"),
    ("overlap", ("overlap_ratio",), "{:.2f}"),
)
SHOWN = tuple(name for _, names, _ in _LONG for name in names)
"""The columns of `training_steps` that are shown, in this order."""
_AFTER = SHOWN[2:]
"""All but loss and gradient norm, whose summary shows more than the last value."""


def words(metrics: Metrics) -> str:
    """One line with every known metric; entropy without a name is that of the model in training."""
    return "  ".join(_parts(metrics, _LONG))


def short_words(metrics: Metrics, width: int) -> str:
    """As many metrics as fit in `width` characters, the most important first. mass is the teacher's / the student's on the
    support, H the entropy of the student / the teacher."""
    text = ""
    for part in _parts(metrics, _SHORT):
        longer = f"{text} {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text


def summary(metrics: Metrics) -> str:
    """One line that summarises a job's steps, from `summarised` metrics; empty without metrics."""
    first, last, norm = (metrics.get(name) for name in ("loss_first", "loss_last", "grad_norm_max"))
    later = {name: metrics.get(f"{name}_last") for name in _AFTER}
    loss = [] if first is None or last is None else [f"loss {first:.4g} → {last:.4g}"]
    steps = [] if norm is None else [*loss, f"grad norm ≤ {norm:.3g}", *_parts(later, _LONG)]
    return "  ".join([*steps, *left_out(metrics)])


def left_out(metrics: Metrics) -> list[str]:
    """What of a training's data did not count: tokens that were masked, steps that had no other tokens, pairs of completions one
    of which had no other token."""
    masked, tokens, empty = (metrics.get(name) or 0 for name in ("masked_tokens", "tokens", "empty_steps"))
    found = [f"masked {masked:,.0f} of {masked + tokens:,.0f} tokens"] if masked else []
    found += [f"{empty:,.0f} steps without a counted token"] if empty else []
    if pairs := metrics.get("pairs_left_out"):
        found.append(f"left out {pairs:,.0f} of {metrics.get('pairs') or 0:,.0f} pairs")
    return found


def summarised(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Summary of rows of `training_steps`: first and last loss (of steps with a counted token), the largest gradient norm, and
    for every other metric its last computed value as `NAME_last`."""
    known, losses = latest(rows), [row["loss"] for row in rows if row.get("tokens") != 0]
    ends = {f"{name}_last": known.get(name) for name in ("loss", *_AFTER, "log_ratio_mean")}
    first = losses[0] if losses else None
    return {"loss_first": first, "grad_norm_max": max(row["grad_norm"] for row in rows)} | ends


def latest(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The last computed value of every metric that is shown; steps without a counted token have none."""
    shown, counted = (*SHOWN, "log_ratio_mean"), [row for row in rows if row.get("tokens") != 0]
    return {name: row[name] for row in counted for name in shown if row.get(name) is not None}


def _parts(metrics: Metrics, table: tuple[_Words, ...]) -> list[str]:
    parts = []
    for label, names, form in table:
        values = [metrics.get(name) for name in names]
        if any(value is not None for value in values):
            parts.append(f"{label} " + "/".join("-" if value is None else form.format(value) for value in values))
    return parts
