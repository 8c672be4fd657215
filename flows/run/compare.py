"""`opd compare`: paired differences between the evaluations of two rounds, of one run or of two; where configs differ."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.errors import CorruptArtifact, InputError
from storage.query.figures import Figure, difference, evaluation_of, read_sums
from storage.runs import RoundState, Run
from storage.store import Store


@dataclass(frozen=True)
class Point:
    """An evaluated round of a run."""

    run: str
    round: RoundState

    def __str__(self) -> str:
        return f"{self.run}@{self.round.round}"


@dataclass(frozen=True)
class Compared:
    """`one` minus `other`, by metric that both have."""

    one: Point
    other: Point
    figures: Mapping[str, Figure]

    @property
    def prompts(self) -> str:
        """How many prompts both have, by metric where they differ."""
        counts = dict.fromkeys(found.prompts for found in self.figures.values())
        return " / ".join(f"{count:,}" for count in counts)

    def as_json(self) -> dict[str, Any]:
        """Plain values: per metric difference, se, low, high, prompts, told_apart."""
        metrics = {}
        for name, found in self.figures.items():
            low, high = found.interval or (None, None)
            metrics[name] = {"difference": found.value, "se": found.se, "low": low, "high": high}
            metrics[name] |= {"prompts": found.prompts, "told_apart": found.told_apart}
        return {"run": str(self.one), "other": str(self.other), "metrics": metrics}


def point(root: Path, text: str) -> Point:
    """`NAME@ROUND`, or NAME at its last evaluated round. InputError where that was not evaluated."""
    name, at, number = text.rpartition("@")
    rounds = evaluated_rounds(root, name if at else text)
    if not at:
        return rounds[-1]
    chosen = [round for round in rounds if number.isdigit() and round.round.round == int(number)]
    if not chosen:
        there = ", ".join(str(round.round.round) for round in rounds)
        raise InputError(
            f"{text!r}: run {name!r} has no evaluated round {number or 'without a number'}; evaluated are {there}"
            f" (to evaluate one: opd evaluate {name} --round N)"
        )
    return chosen[0]


def evaluated_rounds(root: Path, name: str) -> list[Point]:
    """The evaluated rounds of a run, in order. InputError where there is none."""
    rounds = sorted((r for r in Run.open(root, name).state.rounds if r.evaluated), key=lambda r: r.round)
    if not rounds:
        raise InputError(f"run {name!r} has no evaluated round yet; see: opd status {name}")
    return [Point(name, round) for round in rounds]


def compared(store: Store, one: Point, other: Point) -> Compared:
    """The paired differences. CorruptArtifact, with the command that rebuilds, where an evaluation cannot be read."""
    sums = []
    for at in (one, other):
        evaluation = evaluation_of(store, at.round)
        if evaluation is None:
            raise CorruptArtifact(f"the evaluation of {at} is damaged or gone; to rebuild it: opd resume {at.run}")
        try:
            sums.append(read_sums(store, evaluation))
        except (OSError, pa.ArrowException) as error:
            raise CorruptArtifact(f"the evaluation of {at}: {error}; to rebuild it: opd resume {at.run}") from error
    mine, theirs = sums
    return Compared(one, other, {name: difference([(mine[name], theirs[name])]) for name in mine if name in theirs})


def config_differences(root: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Fields of the runs' resolved configs that are not equal in all: `field`, and by run its value (None: not set)."""
    return differing({name: Run.open(root, name).experiment for name in names})


def differing(experiments: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of any experiments, by name."""
    configs = {name: dict(_leaves(_own(experiment))) for name, experiment in experiments.items()}
    fields = sorted(set(itertools.chain(*configs.values())))
    rows = [{"field": field} | {name: config.get(field) for name, config in configs.items()} for field in fields]
    return [row for row in rows if len({json.dumps(row[name], default=str) for name in configs}) > 1]


def _own(experiment: dict[str, Any]) -> dict[str, Any]:
    """The config; of a fork the run and round that it was forked from, without the config of that run."""
    fork = experiment.get("fork")
    return experiment | ({"fork": f"{fork['run']}@{fork['round']}"} if fork else {})


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
