"""What the papers watch beside the figures of an evaluation: overlap of both models' likeliest tokens, entropies by position, and
length by verdict. Where a run has not stored what one of them needs, the page says what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.page.completions import SECONDS, rounds_with_tokens
from flows.page.curves import by_round, number
from flows.page.facts import RunFacts
from flows.run.figures import DIAGNOSED
from storage.errors import Evicted
from storage.query.catalog import Catalog
from storage.query.questions import question
from storage.runs import Run
from storage.store import Store

FIGURES = tuple(figure for figure in DIAGNOSED if not figure.metric.startswith("judge_"))
HEADINGS = ("run", "round", "k", "overlap", "student's mass", "teacher's mass", "advantage", "overlap in training")
NOT_STORED = {
    "student_topk": "the student's likeliest tokens (student_topk) are not stored",
    "teacher_topk": "the teacher's likeliest tokens (teacher_topk) are not stored",
}
UNFINISHED = {
    "supervise": "its completions are not scored yet, so there is no overlap",
    "train": "its training is not finished, so there is no overlap in training",
}
NO_STUDENT = "the student did not score (supervise.student: none)"


def diagnostics(store: Store, runs: Sequence[Run], facts: Sequence[RunFacts]) -> dict[str, Any]:
    """`charts`: curves by round; `positions`: entropies by position in the last round with tokens; `lengths`: by round and
    verdict; `overlap`: rows of `HEADINGS` for the first and the last round with tokens; `notes`: what is missing, and why."""
    several = len(runs) > 1
    found: dict[str, Any] = {"charts": by_round({fact.name: fact.state for fact in facts}, FIGURES)}
    entropies: dict[str, list[list[Any]]] = {}
    lengths: dict[str, list[list[Any]]] = {}
    rows: list[list[str]] = []
    notes: dict[str, None] = {}
    for run, fact in zip(runs, facts, strict=True):
        catalog, rounds = Catalog(store, run), rounds_with_tokens(fact.state)
        label = f"{run.name} " if several else ""
        lengths |= {f"{label}{name}": points for name, points in _lengths(catalog, run).items()}
        if not rounds:
            continue
        for name, points in _entropies(catalog, run, rounds[-1], notes).items():
            entropies[f"{label}{name}"] = points
        for number_ in dict.fromkeys((rounds[0], rounds[-1])):
            rows += _overlap(catalog, run, number_, notes)
    found["positions"] = _chart("entropy by position, last round (nats)", entropies, "from token", log=True)
    found["lengths"] = _chart("length of right and wrong held-out answers (tokens)", lengths, "round")
    return found | {"overlap": rows, "notes": list(notes)}


def _chart(title: str, lines: Mapping[str, Any], x: str, log: bool = False) -> list[dict[str, Any]]:
    """One chart with a curve per line; none without lines."""
    return [{"title": title, "percent": False, "runs": dict(lines), "lines": list(lines), "x": x, "log": log}][
        : bool(lines)
    ]


def _asked(catalog: Catalog, run: Run, name: str, **given: str) -> list[dict[str, Any]]:
    return list(catalog.query(question(name).sql(run.state, given), limit_seconds=SECONDS).to_pylist())


def _lengths(catalog: Catalog, run: Run) -> dict[str, list[list[Any]]]:
    """By verdict the points (round, length, error): of greedy completions where there are any."""
    rows = _asked(catalog, run, "lengths")
    mode = min((row["mode"] for row in rows), default="")
    found: dict[str, list[list[Any]]] = {}
    for row in rows:
        if row["mode"] == mode:
            found.setdefault(row["verdict"], []).append([row["round"], number(row["mean_length"]), number(row["se"])])
    return dict(sorted(found.items()))


def _entropies(catalog: Catalog, run: Run, round: int, notes: dict[str, None]) -> dict[str, list[list[Any]]]:
    """By model the points (first token of the range, entropy)."""
    try:
        rows = _asked(catalog, run, "entropy-by-position", round=str(round))
    except Evicted:
        notes[f"{run.name}, round {round}: the rollouts or their signals were removed"] = None
        return {}
    found = {
        name: [[row["from_position"] + 1, number(row[f"{name}_entropy"])] for row in rows]
        for name in ("student", "teacher")
    }
    if rows and all(value is None for _, value in found["student"]):
        notes[f"{run.name}: no entropy of the student: {NO_STUDENT}"] = None
    known = {name: [point for point in points if point[1] is not None] for name, points in found.items()}
    return {name: points for name, points in known.items() if points}


def _overlap(catalog: Catalog, run: Run, round: int, notes: dict[str, None]) -> list[list[str]]:
    try:
        (row,) = _asked(catalog, run, "overlap", round=str(round))
    except Evicted:
        notes[f"{run.name}, round {round}: the rollouts or their signals were removed"] = None
        return []
    if row["unfinished"] is not None:
        notes[f"{run.name}, round {round}: {UNFINISHED[row['unfinished']]}"] = None
        if row["overlap_ratio"] is None:
            return []
    elif row["not_stored"] is not None:
        lists = " and ".join(NOT_STORED[name] for name in row["not_stored"].split(", "))
        without = f"; {NO_STUDENT}" if _without_student(run) and "student_topk" in row["not_stored"] else ""
        notes[f"{run.name}: no overlap of the rollouts' lists: {lists}{without}. The support union stores both"] = None
        if row["trained_overlap_ratio"] is None:
            return []
    forms = {"k": "{:.4g}", "overlap_ratio": "{:.3f}", "student_mass": "{:.1%}", "teacher_mass": "{:.1%}"}
    forms |= {"advantage": "{:.4f}", "trained_overlap_ratio": "{:.3f}"}
    return [
        [run.name, str(round), *("" if row[name] is None else form.format(row[name]) for name, form in forms.items())]
    ]


def _without_student(run: Run) -> bool:
    return (run.experiment.get("supervise") or {}).get("student") == "none"
