"""Options shared by several commands."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from storage.disk.files import scheme
from storage.errors import InputError

PIPE_WIDTH = 1000


def local(path: Path | None) -> Path | None:
    """A path of this machine. InputError for what looks like a URL or another scheme: it would become a folder of that name."""
    if path is not None and (found := scheme(path)):
        raise InputError(
            f"{_as_typed(path)}: a path on this machine is needed, and this looks like {found}; {INSTEAD.get(found, OTHERWISE)}"
        )
    return path


def _as_typed(path: Path) -> str:
    """`s3://b/x` for the Path of it, which has lost a slash."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+:)/(?!/)", r"\1//", str(path))


def readable(path: Path) -> Path:
    """A store's folder, or for a URL a folder with the records of the store there. RemoteError where that cannot be read."""
    if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is None:
        local(path)
        return path
    from storage.disk.remote import remote_of
    from storage.upkeep.mirror import mirror

    return mirror(remote_of(path))


_TO_BUCKET = (
    "`opd push` and `opd pull` copy runs to and from a bucket; query, ls, status, report, show and compare read there"
)
INSTEAD = {
    "s3:": _TO_BUCKET,
    "gs:": _TO_BUCKET,
    "hub:": "give a folder; `opd export` uploads one with --push OWNER/NAME",
    "hf:": "give a folder; `opd export` uploads one with --push OWNER/NAME",
    "file:": "leave out the scheme",
}
OTHERWISE = "give a folder (a name with a colon: as an absolute path)"
Root = Annotated[Path, typer.Option("--root", envvar="OPD_ROOT", help="the store's folder", callback=local)]
ReadRoot = Annotated[
    Path,
    typer.Option(
        "--root", envvar="OPD_ROOT", help="the store's folder, or s3://... where runs were pushed to", callback=readable
    ),
]
Set = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="override a field, e.g. train.lr=1e-4")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
SetOfRun = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="a field of runtime, policy, trackers or hooks, e.g. policy.rounds=8"
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="a line per stage, with its metrics")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print warnings and errors only")]
RunJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="print the result as JSON on standard output, every event as a line of JSON on standard error",
    ),
]
AtRound = Annotated[str, typer.Argument(metavar="NAME[@ROUND]", help="a run, or a round of it", show_default=False)]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="a run's name", show_default=False)]


def at_round(text: str, round: int | None = None) -> tuple[str, int | None]:
    """Name and round of `NAME@ROUND`; of `NAME` the round that an option gave. InputError for both, and for no number."""
    name, at, number = text.rpartition("@")
    if not at:
        return text, round
    if not number.isdigit():
        raise InputError(f"{text!r}: expected NAME@ROUND with the number of a round, for example demo@2")
    if round is not None and round != int(number):
        raise InputError(f"{text!r} and --round {round}: two rounds are named; give one of them")
    return name, int(number)


def example(command: str) -> str:
    """The epilog of a command's help."""
    return f"Example: {command}"


def existing_root(root: Path) -> Path:
    """The root of an existing store. InputError if there is none: a command that reads must not create a store."""
    if not (root / "artifacts").is_dir():
        raise InputError(f"{root}: no store in this folder; set the store's folder with --root or OPD_ROOT")
    return root


def grid(*headings: str, **options: Any) -> Table:
    """A table whose cells wrap where the terminal is narrow: a name or a key that was cut off could not be used."""
    table = Table(**options)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


SLIM: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
"""Options of a table that leaves its width to the columns."""


def fitting(out: Console, *tables: Table) -> Table:
    """The first table that fits without wrapping, else the last."""
    free = out.options.update(max_width=PIPE_WIDTH)
    return next((table for table in tables if out.measure(table, options=free).maximum <= out.width), tables[-1])


def console() -> Console:
    """Standard output. If it is not a terminal, tables take the width they need."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(highlight=False, width=width)
