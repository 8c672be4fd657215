"""What a command imports. Its start is mostly imports, so each command names the packages that it may load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKOUT, TINY

from flows.experiment import load_experiment
from flows.run.runner import open_run
from storage.runs import RoundState, StageState
from storage.store import Store

PARSER = {"annotated_doc", "attr", "rich", "shellingham", "typer", "typing_extensions"}
MODELS = {"annotated_types", "pydantic", "pydantic_core", "typing_inspection", "yaml"}
HELP = {"markdown_it", "mdurl", "pygments"}
ARROW = {"cloudpickle", "numpy", "pyarrow"}
CONFIG = {"msgspec", "psutil"}
DUCKDB = {"_cyutility", "_duckdb", "dateutil", "duckdb", "pandas", "psutil", "pytz", "six"}
"""Arrow's datasets import pandas, where it is installed; psutil says how much memory is free."""

SCRIPT = """
import json, sys
from opdflow import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = {name.partition('.')[0] for name in sys.modules}
installed = [name for name in found if 'site-packages' in (getattr(sys.modules.get(name), '__file__', None) or '')]
print(json.dumps(installed), file=sys.stderr)
"""


def loaded(*arguments: str) -> set[str]:
    """Top-level names of the installed packages that a command has imported when it ends."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert result.stdout
    names = set(json.loads(result.stderr.splitlines()[-1]))
    return {name for name in names if not name.startswith(("__editable__", "_distutils_hack"))}  # of the installation


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run."""
    root = tmp_path_factory.mktemp("modules") / "store"
    Store(root)
    run = open_run(load_experiment(TINY), "demo", root)
    with run.lock():
        state = run.state
        metrics = {"reverse_kl": 0.5, "reverse_kl_se": 0.1, "reverse_kl_n": 9.0}
        stages = {"evaluate": StageState(state="done", seconds=1.0)}
        state.rounds.append(RoundState(round=0, student_sha256="0" * 64, metrics=metrics, stages=stages))
        run.save(state)
    return root


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], PARSER | MODELS | HELP),
        (["run", "--help"], PARSER | MODELS | HELP),
        (["ls"], PARSER | MODELS | ARROW),
        (["status", "demo"], PARSER | MODELS | ARROW | CONFIG),
        (["query", "demo", "SELECT round FROM rounds"], PARSER | MODELS | ARROW | DUCKDB),
        (["run", str(TINY), "--dry-run"], PARSER | MODELS | ARROW | CONFIG | {"tzlocal"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_needs(root: Path, arguments: list[str], allowed: set[str]) -> None:
    store = [] if "--help" in arguments else ["--root", str(root)]
    assert loaded(*arguments, *store) <= allowed
