"""Named questions: each a file of this folder's `questions/`, which begins with what it answers and the parameters that it takes.

    -- The tokens that ...
    -- $round = last: the round whose rollouts are looked at
    -- $limit = 20: rows

A parameter without a default must be given. `last` is the last round with rollouts, `last_evaluated` and `first_evaluated` are
those of the run's evaluations; a default `a | b` lists what is accepted, the first unless another is given. `$run` is the run
that is asked. Values enter the SQL as literals, so that filters on a round keep the other rounds' files closed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from storage.errors import InputError, did_you_mean
from storage.runs import RunState

FOLDER = Path(__file__).with_name("questions")
_PARAMETER = re.compile(r"\$(\w+)(?: = (.+?))?: (.+)")
_ROUNDS = ("last", "first_evaluated", "last_evaluated")


@dataclass(frozen=True)
class Parameter:
    """A parameter as its file declares it; `default` is text, `choices` are empty where any value is accepted."""

    name: str
    doc: str
    default: str | None = None
    choices: tuple[str, ...] = ()

    def literal(self, value: str, states: Mapping[str, RunState], run: str) -> str:
        """A value as SQL. InputError for one that is not of the parameter's kind."""
        if self.choices:
            if value not in self.choices:
                hint = did_you_mean(value, self.choices, f"one of {', '.join(self.choices)}")
                raise InputError(f"{self.name}={value}: {hint}")
            return _text(value)
        if self.default in _ROUNDS:
            return str(_round(self.name, value, states[run]))
        if self.default is None:
            return _text(value)
        kind = float if "." in self.default else int
        try:
            return repr(kind(value))
        except ValueError:
            wanted = "a number" if kind is float else "a whole number"
            raise InputError(f"{self.name}={value}: {wanted} is needed, as {self.name}={self.default}") from None


@dataclass(frozen=True)
class Question:
    """One file. `notes`: what its heading says after the first line."""

    name: str
    doc: str
    notes: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    statement: str

    @property
    def usage(self) -> str:
        """Its parameters as they are typed: `other=... round=last`."""
        return " ".join(f"{p.name}={'|'.join(p.choices) or p.default or '...'}" for p in self.parameters)

    def sql(self, run: RunState, given: Mapping[str, str], others: Mapping[str, RunState] | None = None) -> str:
        """The SELECT for a run. `given`: parameter -> value; `others`: states of the runs that they name.

        InputError for an unknown or missing parameter, a value of another kind, or a round that the run has not."""
        names = [parameter.name for parameter in self.parameters]
        for name in given:
            if name not in names:
                takes = f"{self.name} takes {self.usage}" if names else f"{self.name} takes no parameters"
                raise InputError(f"{name}={given[name]}: {did_you_mean(name, names, 'no such parameter')}\n{takes}")
        states = {run.name: run, **(others or {})}
        literals = {"run": _text(run.name)}
        for parameter in self.parameters:
            value = given.get(parameter.name, parameter.choices[0] if parameter.choices else parameter.default)
            if value is None:
                raise InputError(f"{self.name} needs {parameter.name}=...: {parameter.doc}")
            about = given.get("other", run.name) if parameter.name.startswith("other_") else run.name
            literals[parameter.name] = parameter.literal(value, states, about)
        return re.sub(r"\$(\w+)", lambda found: literals[found[1]], self.statement)


@cache
def questions() -> dict[str, Question]:
    """All of them, by name."""
    return {path.stem: parse(path.stem, path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.sql"))}


def question(name: str) -> Question:
    """The question of that name. InputError, with the nearest and the list, if there is none."""
    known = questions()
    if name not in known:
        near = did_you_mean(name, known)
        raise InputError(f"no question {name!r}{'; ' + near if near else ''}\nquestions: {', '.join(known)}")
    return known[name]


def parse(name: str, text: str) -> Question:
    """A file's content."""
    lines = text.splitlines()
    count = next(number for number, line in enumerate(lines) if not line.startswith("--"))
    heading = [line.removeprefix("--").strip() for line in lines[:count]]
    found = [(line, _PARAMETER.fullmatch(line)) for line in heading]
    doc, *notes = [line for line, parameter in found if parameter is None]
    parameters = []
    for _, match in found:
        if match is not None:
            default, choices = match[2], tuple(match[2].split(" | ")) if match[2] and "|" in match[2] else ()
            parameters.append(Parameter(match[1], match[3], None if choices else default, choices))
    return Question(name, doc, tuple(notes), tuple(parameters), "\n".join(lines[count:]) + "\n")


def _round(name: str, value: str, run: RunState) -> int:
    """The number of a round: as given, or one of `_ROUNDS`."""
    rounds = sorted(run.rounds, key=lambda round: round.round)
    evaluated = [round.round for round in rounds if round.evaluated]
    if value in _ROUNDS:
        if value == "last":
            return last_written(run)
        if not evaluated:
            raise InputError(f"run {run.name!r} has no evaluated round yet; see: opd status {run.name}")
        return evaluated[0] if value.startswith("first") else evaluated[-1]
    numbers = [round.round for round in rounds]
    if not value.isdigit() or int(value) not in numbers:
        raise InputError(
            f"{name}={value}: run {run.name!r} has the rounds {', '.join(map(str, numbers)) or 'none'}; or {', '.join(_ROUNDS)}"
        )
    return int(value)


def last_written(run: RunState) -> int:
    """The last round with finished rollouts. InputError where there is none."""
    return max(_written(run))


def with_rollouts(run: RunState, number: int) -> int:
    """The number of a round, if its rollouts are finished. InputError, naming the rounds whose are, if not."""
    if number not in (known := _written(run)):
        raise InputError(
            f"run {run.name!r} has no finished rollouts of round {number}; of {', '.join(map(str, known))} it has"
        )
    return number


def _written(run: RunState) -> list[int]:
    stages = {round.round: round.stages.get("rollout") for round in run.rounds}
    found = [number for number, stage in stages.items() if stage is not None and stage.state in ("done", "cached")]
    if not found:
        raise InputError(f"run {run.name!r} has no finished rollouts yet; see: opd status {run.name}")
    return sorted(found)


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
