"""The main path's calls are checked by their types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKOUT

CALL = """
from flows.experiment import Experiment
from flows.run.executor import Executor
from tasks.evaluate import evaluate_work
from tasks.stage import Prompts, Student, Teacher


def call(do: Executor, e: Experiment, one: Student, other: Teacher, prompts: Prompts) -> None:
    do("evaluate", evaluate_work, e.evaluate, student={}, teacher={}, prompts=prompts, seed=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher", "errors"), [("one", "other", 0), ("other", "one", 2)])
def test_a_swap_of_student_and_teacher_is_a_type_error(tmp_path: Path, student: str, teacher: str, errors: int) -> None:
    file = tmp_path / "call.py"
    file.write_text(CALL.format(student, teacher))
    command = [sys.executable, "-m", "mypy", "--follow-imports", "silent", str(file)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert done.stdout.count("[arg-type]") == errors and done.returncode == int(errors > 0), done.stdout
