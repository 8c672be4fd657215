"""`opd objectives`, `opd recipes`: recipes and choices with equations, papers, fields and defaults."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.cli.options import Json, console, example
from storage.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from flows.reference.catalogue import Entry


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd recipes"))(recipes)
    app.command(epilog=example("opd objectives tropd"))(objectives)


def recipes(json_: Json = False) -> None:
    """List the recipes: `opd run recipe:NAME` runs one, `opd objectives NAME` shows its equation and fields.

    Exit codes: 0 shown."""
    from flows.reference.catalogue import catalogue

    _print([entry for entry in catalogue() if entry.axis == "recipe"], json_)


def objectives(
    name: Annotated[
        str | None, typer.Argument(help="a recipe, or a choice on an axis, or a method", show_default=False)
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="a module that registers more, as in a config's `plugins`; repeatable")
    ] = None,
    json_: Json = False,
) -> None:
    """List all recipes and all choices of an objective; with a name, show its equation, paper, code and fields.

    Exit codes: 0 shown, 2 no such name or plugin."""
    from flows.reference.catalogue import catalogue
    from tasks.plugins import load_plugins

    load_plugins(plugin or ())
    entries = catalogue()
    chosen = entries if name is None else [entry for entry in entries if entry.name == name]
    if name is not None and not chosen:  # as papers write it: SRPO, vOPD, PowerOPD
        chosen = [entry for entry in entries if _folded(entry.name) == _folded(name)]
    if not chosen:
        names = sorted({entry.name for entry in entries})
        hint = did_you_mean(str(name), names, "opd objectives lists them")
        raise ConfigError(f"objectives: no recipe or choice named {name!r}; {hint}")
    if name is None or json_:
        return _print(chosen, json_)
    for entry in chosen:
        _show(console(), entry)


def _print(entries: list[Entry], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
    else:
        _list(console(), entries)


def _folded(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _list(out: Console, entries: list[Entry]) -> None:
    from flows.reference.catalogue import axes

    for axis in axes(entries):
        table = Table(title=f"[bold]{axis}[/]", title_justify="left", box=None, header_style="dim", pad_edge=False)
        own = [entry for entry in entries if entry.axis == axis]
        with_defaults = axis not in ("recipe", "estimator") and any(entry.fields for entry in own)
        for column in ("name", "description", "paper", *(["defaults"] if with_defaults else [])):
            table.add_column(column, overflow="fold")
        for entry in own:
            mark = " [yellow](experimental)[/]" if entry.experimental else ""
            shown = [escape(", ".join(f"{f.name} {f.default}" for f in entry.fields))] if with_defaults else []
            table.add_row(entry.label, escape(entry.summary) + mark, ", ".join(entry.papers), *shown)
        out.print(table)
        out.print()
    out.print("Run a recipe: opd run recipe:NAME. Equations and fields: opd objectives NAME")


def _show(out: Console, entry: Entry) -> None:
    what = entry.axis + (f" of {entry.estimator}" if entry.estimator else "")
    out.print(f"[bold]{entry.name}[/] ({what}{', experimental' if entry.experimental else ''})")
    out.print(escape(entry.about), soft_wrap=True)
    out.print()
    for equation in entry.equations:
        out.print(f"    {escape(equation)}", soft_wrap=True)
    out.print()
    if entry.papers:
        out.print("paper   " + ", ".join(f"arXiv {paper}" for paper in entry.papers))
    out.print(f"code    {entry.code.replace(' ', ', ')}")
    if entry.file:
        out.print(f"recipe  {entry.file}")
    if entry.fields:
        table = Table("field", "value" if entry.axis == "recipe" else "default", "meaning", box=None, pad_edge=False)
        for field in entry.fields:
            table.add_row(field.name, escape(field.default), escape(field.meaning))
        out.print()
        out.print(table)
    out.print()
