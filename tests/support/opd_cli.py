"""The installed command line, as tests call it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OPD = Path(sys.executable).parent / "opd"


def opd(*args: object, root: Path, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the installed command line from an unrelated directory, as a user would."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OPD_"))}
    command = [str(OPD), *map(str, args), "--root", str(root)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root.parent, env=env, timeout=timeout)
    if check and result.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\nexit {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result
