"""The `opd` command. Each group of commands is a file with `register(app)`; what is heavy, its functions import."""

from __future__ import annotations

import importlib

import typer

from flows.cli.errors import exit_codes

GROUPS = ("run", "study", "schedule", "inspect", "objectives", "export", "store")
"""Files of this folder, in the order in which help lists their commands."""

EPILOG = "Exit codes: 0 done, 1 failed, 2 bad config, input or usage, 75 held by another process, 130 stopped (Ctrl-C)."


def make_app() -> typer.Typer:
    """The application with every group's commands."""
    app = typer.Typer(
        name="opd",
        help="On-policy distillation in rounds: sample the student, ask the teacher, train, evaluate, go on.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name in GROUPS:
        importlib.import_module(f"flows.cli.{name}").register(app)
    return app


def main() -> None:
    """Entry point of the console script."""
    with exit_codes():
        make_app()()


if __name__ == "__main__":
    main()
