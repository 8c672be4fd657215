"""The `opd` command. Each group of commands is a module with `register(app)`; commands import heavy modules when called."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Annotated

import typer

from flows.cli.errors import exit_codes

GROUPS = ("init", "run", "study", "schedule", "inspect", "show", "page", "objectives", "export", "store")
"""Modules of this folder, in the order in which help lists their commands."""

EPILOG = "Exit codes: 0 done, 1 failed, 2 bad config, input or usage, 75 held by another process, 130 interrupted."


def make_app() -> typer.Typer:
    """The application with every group's commands."""
    app = typer.Typer(
        name="opd",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    app.callback()(_options)
    for name in GROUPS:
        importlib.import_module(f"flows.cli.{name}").register(app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opdflow {importlib.metadata.version('opdflow')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """On-policy distillation in rounds: sample the student, score with the teacher, train, evaluate."""


def main() -> None:
    """Entry point of the console script."""
    with exit_codes():
        make_app()()


if __name__ == "__main__":
    main()
