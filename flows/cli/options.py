"""Options that commands share, declared once."""

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
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="a run's name", show_default=False)]


def example(command: str) -> str:
    """The epilog of a command's help."""
    return f"Example: {command}"


def existing_root(root: Path) -> Path:
    """The root of a store that is there. InputError otherwise: reading must not make an empty store."""
    if not (root / "artifacts").is_dir():
        raise InputError(f"{root}: no store there; name the store's folder with --root or OPD_ROOT")
    return root


def console() -> Console:
    """Standard output. Where that is no terminal, tables take the width that they need."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(highlight=False, width=width)
