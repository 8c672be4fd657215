"""What a model wrote is shown in a terminal, and not obeyed by it; tables fit a narrow terminal."""

from __future__ import annotations

import re

import pytest
from opd_cli import in_this_process
from rich.console import Console

from flows.cli.cells import cell, harmless, visible
from flows.cli.options import SLIM, fitting, grid

ESCAPES = "\x1b[2J\x1b]0;title\x07 a\x05b\x9bc \u202eevil\u2066"


@pytest.mark.parametrize("show", [cell, harmless, visible])
def test_control_characters_are_shown(show) -> None:
    shown = show(ESCAPES)
    assert shown.isprintable() and "\\x1b[2J" in shown and "a\\x05b\\x9bc" in shown and "\\u202e" in shown


def test_other_text_stays() -> None:
    assert harmless("né 你好 🙂\n\tx") == "né 你好 🙂\n\tx" and cell("a\nb\tc") == "a\\nb\\tc"


def test_the_first_table_that_fits_is_taken() -> None:
    tables = [grid("figure", **form) for form in ({}, SLIM)]
    for table in tables:
        table.add_row("12345678901234")
    for width, expected in ((40, 0), (18, 0), (17, 1), (5, 1)):
        assert fitting(Console(width=width), *tables) is tables[expected], width


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", [["status", "demo"], ["ls"], ["compare", "demo"]])
def test_no_figure_is_broken_at_the_width_of_a_terminal(columns, command, monkeypatch, capsys, example_store) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("flows.cli.report.console", lambda: Console(highlight=False, width=columns))
    monkeypatch.setattr("flows.cli.inspect.console", lambda: Console(highlight=False, width=columns))
    done = in_this_process(monkeypatch, capsys, example_store)(*command)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert any("±" in line for line in lines)
    assert not [line for line in lines if re.search(r"±\s*(│|$)", line)], done.out
