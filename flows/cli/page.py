"""`opd report`: a run, or several, as one HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import ReadRoot, RunName, example, existing_root, local
from flows.run.hints import DEFAULT_ROOT
from storage.errors import InputError

_HEAD_BYTES = 1_000
"""Of an existing file: where a page says what made it."""


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command(epilog=example("opd report demo --compare other -o report.html"))(report)


def report(
    name: RunName,
    others: Annotated[
        list[str] | None, typer.Argument(metavar="OTHER...", help="further runs to compare with", show_default=False)
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="OTHER...", help="runs beside it", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="the page (default: report-NAME.html)", show_default=False, callback=local),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is no such page")] = False,
    root: ReadRoot = DEFAULT_ROOT,
) -> None:
    """Write a run as one HTML page that needs no network: figures and training curves, time per stage, keys, config differences,
    prompts before and after, and completions token by token, coloured by how far student and teacher are apart.

    A page of an earlier call is replaced, any other file only with --force. Of long runs a sample is shown; the page says which.
    It contains prompts, completions and the names of machines.

    Exit codes: 0 written, 1 damaged data, 2 no such run, no finished round, or a file that cannot be written."""
    from flows.page.build import page

    target = output if output is not None else Path(f"report-{name}.html")
    existing_root(root)
    refuse_unless_ours(target, force)
    made = page(root, [name, *(compare or ()), *(others or ())])
    write(target, made.html)
    typer.echo(f"{target} is written ({made.about})")


def refuse_unless_ours(target: Path, force: bool = False) -> None:
    """InputError where the page cannot be written to `target`, or would replace a file that is no page of this command."""
    from flows.page.build import GENERATOR

    if target.is_dir():
        raise InputError(f"{target}: a folder; give the name of a file, for example {target / 'report.html'}")
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}; make it first (mkdir -p {target.parent})")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{target}: the folder {target.parent.absolute()} cannot be written to; choose another -o")
    if target.exists() and not force:
        with target.open("rb") as file:
            ours = f'name="generator" content="{GENERATOR}'.encode() in file.read(_HEAD_BYTES)
        if not ours:
            raise InputError(
                f"{target}: exists and is no page of opd report; choose another -o, or replace it with --force"
            )


def write(target: Path, html: bytes) -> None:
    """Writes the file; readers see the old page or the new one."""
    from storage.disk.files import replace_atomically

    replace_atomically(target, html)
