"""Errors as text, and the commands that messages suggest."""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from storage.disk.remote import address
from storage.errors import CorruptArtifact, IdentityMismatch, OpdError, RunBusy
from storage.runs import Run

DEFAULT_ROOT = Path("opd-store")
"""The default folder of the store."""


def described(error: BaseException) -> str:
    """An error's message; of a bug's exception also its type."""
    text = str(error).strip()
    return text if text and isinstance(error, OpdError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def with_resume_hint(error: BaseException, name: str, root: Path) -> str:
    """The error's message, followed by `resume_hint` if there is one."""
    return "\n".join([described(error), *resume_hint(error, name, root)])


def resume_hint(error: BaseException, name: str, root: Path) -> list[str]:
    """The line with the command that continues the run after an error; of one that failed at its start also the command that
    gives it another config.

    None where no run exists yet, another process holds it, or the name belongs to another run."""
    begun = any(run.name == name for run in Run.list(root))
    if not begun or isinstance(error, RunBusy | IdentityMismatch):
        return []
    lines = [f"committed results are kept; after fixing the cause: {opd_command(root, 'resume', name)}"]
    with suppress(CorruptArtifact):
        if Run.open(root, name).state.failed_at_start:
            lines.append(f"where the config has to change: {opd_command(root, 'run', 'CONFIG', '--name', name)}")
    return lines


def opd_command(root: Path, *words: str) -> str:
    """A command line to paste: with the path of `opd` where the shell would not find it, with --root where the store is not the
    default one."""
    given = () if root.absolute() == DEFAULT_ROOT.absolute() else ("--root", address(root))
    return shlex.join((program("opd"), *words, *given))


def program(name: str) -> str:
    """A console script of this environment as a shell finds it: by name, else by its path."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not beside.exists() or (found is not None and Path(found).resolve() == beside.resolve()):
        return name
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)
