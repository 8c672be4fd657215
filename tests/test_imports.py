"""Rules about the code itself: import contracts, module names, what may not be imported early."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKOUT, PLUGINS


@pytest.mark.parametrize("name", ["flows", "tasks", "storage"])
def test_bare_names_resolve_to_this_checkout(name):
    module = importlib.import_module(name)
    assert Path(module.__file__).resolve().parent == CHECKOUT / name


def test_import_contracts_hold():
    linter = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([linter, "--no-cache"], cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def imported(modules: str, heavy: set[str], path: str = "") -> str:
    """Which of the modules `heavy` a new process has after `import MODULES`, with a folder on its path; "" for none."""
    script = f"import sys, {modules}; print(*sorted({heavy!r} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def test_stage_modules_import_no_engine():
    """`opd run` shows its errors in a second because nothing heavy is imported until a worker starts."""
    heavy = {"torch", "vllm", "transformers", "deepspeed", "prefect", "datasets", "ray"}
    assert imported("flows.experiment, flows.run.runner", heavy) == ""


def test_the_scripted_engines_import_no_torch():
    """Fault tests start thousands of their processes; torch would take most of each one's time."""
    assert imported("tasks.workers.main, scripted_engines", {"torch"}, str(PLUGINS)) == ""
