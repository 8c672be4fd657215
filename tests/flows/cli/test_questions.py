"""The questions of `docs/query.md`: all are there, and its commands run. Their answers: tests/e2e/test_questions.py."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib

import duckdb
import pyarrow as pa
import pytest
from places import CHECKOUT
from rich.console import Console

from flows.cli.app import main
from flows.cli.questions import print_answer
from storage.errors import InputError
from storage.query.limits import default_memory, memory_bytes
from storage.query.questions import FOLDER, parse, questions
from storage.runs import RunState

PAGE = (CHECKOUT / "docs" / "query.md").read_text()
COMMANDS = [
    line[: line.find("   ")] if "   " in line else line
    for line in PAGE.splitlines()
    if line.startswith("opd ") and " --tasks " not in line  # those need lm-eval (tests/tasks/test_harness.py)
]


def test_the_page_has_every_question_with_its_defaults():
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (?:`(.*)`)? ?\|$", PAGE, re.MULTILINE)
    defaults = {
        name: " ".join(f"{p.name}={p.choices[0] if p.choices else p.default or '...'}" for p in question.parameters)
        for name, question in questions().items()
    }
    assert dict(rows) == defaults


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_run(command, example_store_once, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # `opd report` writes where it is called
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--root", str(example_store_once)])
    try:
        main()
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    assert capsys.readouterr().out


def test_every_file_of_a_question_is_in_the_package():
    (pattern,) = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "storage"
    ]
    assert {path.stem for path in (CHECKOUT / "storage").glob(pattern)} == set(questions()) and FOLDER.is_dir()


@pytest.mark.parametrize("name", questions())
def test_a_question_is_one_select_that_uses_its_parameters(name):
    asked = questions()[name]
    (statement,) = duckdb.connect().extract_statements(asked.statement)
    assert statement.type == duckdb.StatementType.SELECT
    assert {p.name for p in asked.parameters} | {"run"} >= set(re.findall(r"\$(\w+)", asked.statement))
    assert all(f"${p.name}" in asked.statement for p in asked.parameters)


def test_values_stay_literals():
    asked = parse("x", "-- what\n-- $name: a text\n-- $limit = 3: rows\nSELECT $name, $limit\n")
    run = RunState(name="it's")
    assert asked.sql(run, {"name": "a'; DROP TABLE t; --"}) == "SELECT 'a''; DROP TABLE t; --', 3\n"
    with pytest.raises(InputError, match="a whole number is needed"):
        asked.sql(run, {"name": "a", "limit": "1 OR true"})


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_and_ids_are_never_cut_off(width):
    row = {
        "kl": 0.123456,
        "tokens": 123456789,
        "sample_id": "a" * 30,
        "before": "x" * 60,
        "token": " the",
        "answer": "y" * 200,
    }
    out = Console(width=width, force_terminal=False)
    with out.capture() as shown:
        print_answer(pa.Table.from_pylist([row, row]), out)
    text = shown.get()
    assert text.count("123,456,789") == text.count("a" * 30) == text.count("0.1235") == 2 and "␣the" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_the_default_memory_is_of_this_machine():
    assert 1_000_000_000 <= memory_bytes(default_memory()) < 1 << 46


def test_the_first_line_of_a_question_is_a_whole_sentence():
    """It alone stands in `opd query --list`."""
    assert [found.name for found in questions().values() if not found.doc.endswith(".")] == []
