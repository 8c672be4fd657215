"""Query results on a terminal, as JSON and as CSV; and the list of views."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from typing import Any, TextIO

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.cells import harmless
from flows.cli.options import console as terminal
from flows.cli.options import grid
from storage.query.sql import duckdb_type
from storage.query.statements import Views
from storage.query.views import View

SHOWN_ROWS = 200
_SHOWN_CHARACTERS = 60


def print_views(views: Views, as_json: bool, as_csv: bool, file: TextIO, commands: Sequence[str]) -> None:
    """Every view with its meaning, as a table on standard output with `commands` to go on, or with its columns as JSON or CSV in
    `file`."""
    if as_json or as_csv:
        listed = [
            {"view": view.name, "meaning": view.doc, "columns": [column.name for column in view.columns]}
            for view in views.all.values()
        ]
        return (write_json if as_json else write_csv)(pa.Table.from_pylist(listed), file)
    console = terminal()
    table = grid("view", "meaning", box=None, pad_edge=False)
    for view in views.all.values():
        table.add_row(Text(view.name), Text(view.doc))
    console.print(table)
    console.print()
    for command in commands:
        console.print(Text(command), soft_wrap=True)


def print_columns(view: View, as_json: bool, as_csv: bool, file: TextIO) -> None:
    """One view's columns, as a table on standard output, or as JSON or CSV in `file`."""
    if not (as_json or as_csv):
        return _print_view(terminal(), view)
    names = [(column.name, duckdb_type(column.type), column.doc) for column in view.columns]
    columns = pa.table(dict(zip(("column", "type", "meaning"), map(list, zip(*names, strict=True)), strict=True)))
    (write_json if as_json else write_csv)(columns, file)


def _print_view(console: Console, view: View) -> None:
    table = grid("column", "type", "meaning", title=f"[bold]{view.name}[/]: {view.doc}", title_justify="left")
    for column in view.columns:
        table.add_row(Text(column.name), Text(duckdb_type(column.type)), Text(column.doc))
    console.print(table)


def print_table(table: pa.Table, console: Console) -> None:
    """The first rows as a table, and the number of rows left out."""
    shown = Table()
    for name in table.column_names:
        shown.add_column(Text(name), overflow="fold")
    for row in rows(table.slice(0, SHOWN_ROWS)):
        shown.add_row(*(Text(_cell(value)) for value in row.values()))
    console.print(shown)
    left = table.num_rows - SHOWN_ROWS
    if left > 0:
        console.print(f"{left:,} more rows: --json or --csv prints all of them")


def write_json(table: pa.Table, file: TextIO) -> None:
    """An array of objects. NaN and infinities become the strings NaN, Infinity, -Infinity (JSON has no such numbers)."""
    json.dump([_plain(row) for row in rows(table)], file, indent=1, allow_nan=False, default=_other)
    file.write("\n")


def write_csv(table: pa.Table, file: TextIO) -> None:
    """A header and one line per row. Null is an empty field; lists and structs are JSON."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in rows(table):
        writer.writerow(["" if value is None else _field(value) for value in row.values()])


def rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as Python values, maps as dictionaries."""
    return list(table.to_pylist(maps_as_pydicts="lossy"))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = harmless(_field(value))
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _field(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return json.dumps(_plain(value), default=_other, ensure_ascii=False)
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _other(value: Any) -> Any:
    """Dates, decimals, intervals, blobs."""
    return value.hex() if isinstance(value, bytes) else str(value)
