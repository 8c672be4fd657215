"""Options shared by several commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from storage.errors import InputError

PIPE_WIDTH = 1000

Root = Annotated[Path, typer.Option("--root", envvar="OPD_ROOT", help="the store's folder")]
Set = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="override a field, e.g. train.lr=1e-4")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="a run's name", show_default=False)]


def example(command: str) -> str:
    """The epilog of a command's help."""
    return f"Example: {command}"


def existing_root(root: Path) -> Path:
    """The root of an existing store. InputError if there is none: a command that reads must not create a store."""
    if not (root / "artifacts").is_dir():
        raise InputError(f"{root}: no store in this folder; set the store's folder with --root or OPD_ROOT")
    return root


def console() -> Console:
    """Standard output. If it is not a terminal, tables take the width they need."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(highlight=False, width=width)
