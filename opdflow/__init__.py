"""opdflow, as users import it: `open` a store to ask it; `opdflow.plugin` is what a plugin builds on; `main` is the command
`opd`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opdflow.lab import Lab

_OURS = ("flows", "tasks", "storage")


def open(root: str | Path = "opd-store") -> Lab:
    """The store in a folder, for Python and notebooks: `opdflow.lab` has what it answers. InputError where there is none."""
    if hidden := _hidden():
        raise ImportError(hidden)
    from opdflow import lab

    return lab.open(root)


def main() -> None:
    """The command line. Exits with 2 where a module of the user's hides one of this program's packages."""
    if hidden := _hidden():
        print(f"error: {hidden}", file=sys.stderr)
        sys.exit(2)
    from flows.cli.app import main

    main()


def _hidden() -> str | None:
    """What hides one of this program's packages, and what to do; None where nothing does."""
    here = Path(__file__).resolve().parent.parent
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found != here / name / "__init__.py":
            return (
                f"the module {name!r} is {found}, which hides opdflow's own package {here / name}; rename that file,"
                " or take its folder from PYTHONPATH"
            )
    return None
