"""Options that commands share, declared once."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from storage.errors import InputError

DEFAULT_ROOT = Path("opd-store")
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


def opd_command(root: Path, *words: str) -> str:
    """A command line to paste: `opd` by its path where the shell would not find this one, with --root where the default
    would not find the store."""
    given = () if root.absolute() == DEFAULT_ROOT.absolute() else ("--root", str(root))
    return shlex.join((_program(), *words, *given))


def _program() -> str:
    beside = Path(sys.executable).parent / "opd"
    found = shutil.which("opd")
    if not beside.exists() or (found is not None and Path(found).resolve() == beside.resolve()):
        return "opd"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)
