"""opdflow, as users import it: `opdflow.plugin` is what a plugin builds on; `main` is the command `opd`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_OURS = ("flows", "tasks", "storage")


def main() -> None:
    """The command line. Exits with 2 where a module of the user's hides one of this program's packages."""
    here = Path(__file__).resolve().parent.parent
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found != here / name / "__init__.py":
            print(
                f"error: the module {name!r} is {found}, which hides opdflow's own package {here / name}; rename that file,"
                " or take its folder from PYTHONPATH",
                file=sys.stderr,
            )
            sys.exit(2)
    from flows.cli.app import main

    main()
