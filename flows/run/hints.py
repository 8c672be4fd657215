"""Commands that messages suggest to the user."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from storage.errors import IdentityMismatch, OpdError, RunBusy
from storage.runs import Run

DEFAULT_ROOT = Path("opd-store")
"""The store's folder where none is given."""


def with_resume_hint(error: OpdError, name: str, root: Path) -> str:
    """The message, and after it what was kept of the run and the one command that goes on.

    Nothing is added where nothing was begun, where another process is at it, and where the name is another run's."""
    begun = any(run.name == name for run in Run.list(root))
    if not begun or isinstance(error, RunBusy | IdentityMismatch):
        return str(error)
    return f"{error}\nwhat was committed stays; once the cause is gone: {opd_command(root, 'resume', name)}"


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
