"""`opd objectives`, `opd recipes`: recipes and choices with equations, papers, fields and defaults."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.cli.options import Json, console, example
from storage.disk.yaml_text import plain
from storage.errors import ConfigError, did_you_mean

_TASK = ("demo", "quickstart")
"""Configs of the demo task, over which the recipes stand."""
_OF_THE_TASK = {
    "rollout": ("prompts_per_round", "max_completion_length"),
    "teacher": ("warmup",),
    "train": ("lr", "samples_per_step", "schedule"),
}
"""By section the fields that fit the demo task alone."""

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
    for entry in sorted(chosen, key=lambda entry: entry.axis == "recipe"):  # what to write into a config comes last
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
    if entry.axis == "recipe":
        out.print("\nin a config of your own:\n")
        for line in config_lines(entry.name):
            out.print(f"    {escape(line)}", soft_wrap=True)
        out.print("\nrollout and teacher: beside what is there; k, verifiers, columns, steps and caps are the demo's")
    out.print()


def own_part(recipe: str) -> dict[str, Any]:
    """What a recipe sets that does not belong to the demo's task: no models, prompts, lengths, learning rate."""
    from flows.config_file import RECIPE, merge, read_layers

    whole: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for file, data in read_layers(Path(f"{RECIPE}{recipe}")):
        whole = merge(whole, data)
        own = own if file.stem in _TASK else merge(own, data)
    found = {name: dict(whole[name]) for name in ("objective", "supervise", "judge", "mixture") if whole.get(name)}
    beside = found["objective"].get("beside")
    for place in (found["objective"], beside if isinstance(beside, dict) else {}):
        if "support" in place and place["support"].get("kind") == "full":
            place["support"] = {"kind": "full"}  # its k is the demo's vocabulary; left out it is the models' own
    for section, left_out in _OF_THE_TASK.items():
        if kept := {name: value for name, value in (own.get(section) or {}).items() if name not in left_out}:
            found[section] = kept
    return dict(plain(found))


def config_lines(recipe: str) -> list[str]:
    """`own_part` as YAML, a field per line."""
    return [
        line
        for section, fields in own_part(recipe).items()
        for line in (f"{section}:", *(f"  {field}: {_flow(value)}" for field, value in fields.items()))
    ]


def _flow(value: Any) -> str:
    """A value of a config on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if (
        isinstance(value, str)
        and re.fullmatch(r"[a-z_]+", value)
        and value not in ("null", "true", "false", "yes", "no", "on", "off")
    ):
        return value
    return json.dumps(value, ensure_ascii=False)
