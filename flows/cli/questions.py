"""Named questions on the command line: their list, the SQL of one, its answer on a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flows.cli import tables
from flows.cli.cells import cell, visible
from flows.cli.options import console
from storage.errors import InputError, did_you_mean
from storage.query.questions import question, questions
from storage.runs import Run, RunState

_NAME = re.compile(r"[A-Za-z_][\w-]*")
_SHOWN_ROWS = 50
_TEXT = 12
"""Characters to which a text is cut where there is no room."""
_GAP = 2
_KEYS = ("rollouts", "student", "round")
"""Columns with keys of artifacts, or that name a row."""
_TOKENS = ("token", "other_token")
"""Columns whose white space is shown."""


def names() -> list[str]:
    """The names of all questions. `groups` is also a view: of a run the question is asked, without one the columns are listed."""
    return list(questions())


def is_name(text: str) -> bool:
    """Whether it is one word: the name of a question or view, not SQL."""
    return _NAME.fullmatch(text) is not None


def print_list(as_json: bool, as_csv: bool, file: TextIO) -> None:
    """Every question, what it answers and its parameters with their defaults."""
    known = questions().values()
    if as_json or as_csv:
        table = pa.Table.from_pylist([{"question": q.name, "answers": q.doc, "usage": q.usage} for q in known])
        return (tables.write_json if as_json else tables.write_csv)(table, file)
    out = console()
    for asked in known:
        out.print(Text.assemble((asked.name, "bold"), *(("  ", (asked.usage, "cyan")) if asked.usage else ())))
        out.print(Padding(Text(asked.doc), (0, 0, 0, 2), expand=False))
    out.print(Text("\nto ask: opd query NAME QUESTION [PARAMETER=VALUE ...]   (--sql prints its SQL)"))


def check_run_given(root: Path, first: str | None) -> None:
    """InputError for a question without the run that is asked."""
    names = [run.name for run in Run.list(root)]
    if first in questions() and first not in names:
        raise InputError(
            f"query: {first!r} is a question; give the run first: opd query NAME {first}\nruns: {', '.join(names) or 'none'}"
        )


def statement(
    root: Path, runs: Sequence[Run], name: str, parameters: Sequence[str], views: Iterable[str]
) -> tuple[str, list[Run]]:
    """The SQL of a question to a run, and the runs that it reads. InputError, with the nearest name, for an unknown question or
    run, and for parameters that are not NAME=VALUE or that the question does not take."""
    if name not in questions():
        near = did_you_mean(name, [*questions(), *views])
        raise InputError(
            f"query: {name!r} is no run, no question, no view and no SELECT{'; ' + near if near else ''}\n"
            f"questions: {', '.join(questions())}\nviews: {', '.join(views)}"
        )
    if not runs:
        check_run_given(root, name)
    asked, given = question(name), dict[str, str]()
    for text in parameters:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{text!r}: a parameter is NAME=VALUE\n{asked.name} takes {asked.usage or 'none'}")
        given[key] = value
    others: dict[str, Run] = {}
    if "other" in given and any(parameter.name == "other" for parameter in asked.parameters):
        others[given["other"]] = Run.open(root, given["other"])
    states: dict[str, RunState] = {other: run.state for other, run in others.items()}
    return asked.sql(runs[0].state, given, states), [runs[0], *(r for r in others.values() if r.name != runs[0].name)]


def print_answer(answer: pa.Table, out: Console) -> None:
    """The first rows: a line each; where the terminal is too narrow for their numbers and ids, a block each."""
    if not answer.num_rows:
        return out.print("no rows")
    first = tables.rows(answer.slice(0, _SHOWN_ROWS))
    rows = [{name: visible(value) if name in _TOKENS else cell(value) for name, value in row.items()} for row in first]
    columns = [_Column.of(field, [row[field.name] for row in rows]) for field in answer.schema]
    if sum(column.least for column in columns) + _GAP * (len(columns) - 1) <= out.width:
        out.print(_lines(columns, rows, out.width))
    else:
        for row in rows:
            out.print(_block(columns, row, out.width))
    left = answer.num_rows - _SHOWN_ROWS
    if left > 0:
        out.print(f"{left:,} more rows: --json or --csv prints all of them")


@dataclass(frozen=True)
class _Column:
    name: str
    number: bool
    least: int
    """Characters below which it would be unreadable: numbers and ids are never cut off."""
    widest: int

    @classmethod
    def of(cls, field: pa.Field, cells: list[str]) -> _Column:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        whole = number or field.name.endswith("_id") or field.name in _KEYS
        heading = max(len(word) for word in field.name.split("_"))
        content = max(heading, *(cell_len(cell) for cell in cells))
        return cls(field.name, number, content if whole else min(content, max(heading, _TEXT)), content)


def _lines(columns: Sequence[_Column], rows: Sequence[dict[str, str]], width: int) -> Table:
    """Room that is left goes to the texts, in equal parts."""
    room = width - sum(column.least for column in columns) - _GAP * (len(columns) - 1)
    short = sorted((column for column in columns if column.widest > column.least), key=lambda c: c.widest - c.least)
    widths = {column.name: column.least for column in columns}
    for place, column in enumerate(short):
        more = min(room // (len(short) - place), column.widest - column.least)
        widths[column.name] += more
        room -= more
    shown = Table(box=SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        right = column.number or column.name == "before"
        shown.add_column(
            Text(_heading(column.name, widths[column.name])),
            justify="right" if right else "left",
            width=widths[column.name],
            no_wrap=True,
        )
    for row in rows:
        shown.add_row(*(_cut(column.name, row[column.name], widths[column.name]) for column in columns))
    return shown


def _heading(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(name.replace("_", " "), width, break_long_words=False))


def _cut(name: str, cell: str, width: int) -> Text:
    """The cell, of `before` its end."""
    if cell_len(cell) <= width:
        return Text(cell)
    return Text(f"…{cell[1 - width :]}" if name == "before" else f"{cell[: width - 1]}…")


def _block(columns: Sequence[_Column], row: dict[str, str], width: int) -> Text:
    """The numbers, as many on a line as fit, then a line per text."""
    block, used = Text(), 0
    for column in columns:
        if column.number and row[column.name]:
            pair = Text.assemble((column.name.replace("_", " "), "dim"), " ", row[column.name])
            start = "" if not used else "  " if used + 2 + pair.cell_len <= width else "\n"
            used = pair.cell_len if start == "\n" else used + len(start) + pair.cell_len
            block.append(start).append(pair)
    texts = [column.name for column in columns if not column.number and row[column.name]]
    wide = max(map(len, texts), default=0)
    for name in texts:
        block.append(f"\n  {name.replace('_', ' '):{wide}}  ", style="dim")
        block.append(row[name])
    return block.append("\n")
