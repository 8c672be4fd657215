"""The installed command line, as tests call it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from flows.cli.app import main

OPD = Path(sys.executable).parent / "opd"


def opd(*args: object, root: Path, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the installed command line from an unrelated directory, as a user would."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OPD_"))}
    command = [str(OPD), *map(str, args), "--root", str(root)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root.parent, env=env, timeout=timeout)
    if check and result.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\nexit {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


class Result(NamedTuple):
    code: int
    out: str
    err: str


def in_this_process(
    patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], store: Path
) -> Callable[..., Result]:
    """A function that calls `opd` in this process, on `store` unless a `root` is given (None: without one)."""

    def call(*args: object, root: Path | None = store) -> Result:
        given = () if root is None else ("--root", str(root))
        patch.setattr(sys, "argv", ["opd", *map(str, args), *given])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capture.readouterr())

    return call
