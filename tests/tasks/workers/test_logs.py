"""Reading the logs of workers: by whole lines, without secrets, and no further back than the last attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.workers.logs import CUT, TAIL_BYTES, attempt_begins, last_lines, whole_lines

SECRET = "correct-horse-battery-staple"
HALF = SECRET[:13]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("A_SERVICE_PASSWORD", SECRET)
    return tmp_path / "trainer.log"


def lines(log: Path) -> list[str]:
    first, *rest = last_lines(log).splitlines()
    assert first == (f"last lines of {log}:" if rest else f"this attempt wrote nothing to {log}")
    return [line.strip() for line in rest]


def test_the_end_of_a_log_begins_at_the_last_attempt(log: Path) -> None:
    attempt_begins(log, "trainer: python -m trainer")
    with log.open("a") as file:
        file.write("first\n--- Logging error ---\nhalf a li")
    assert lines(log) == ["first", "--- Logging error ---", CUT]
    attempt_begins(log, "trainer: next job")
    assert lines(log) == []
    with log.open("a") as file:
        file.writelines(f"line {n}\n" for n in range(20))
    assert lines(log) == [f"line {n}" for n in range(8, 20)]


def test_a_log_that_is_not_there_has_no_lines(log: Path) -> None:
    assert lines(log) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"password is {SECRET}\n", ["password is ***"]),
        (f"one\n{HALF}", ["one", CUT]),  # its writer ended, or writes on
        (f"{SECRET}\n{'x' * (TAIL_BYTES - 18)}\nend\n", ["x" * (TAIL_BYTES - 18), "end"]),
    ],
)
def test_secrets_are_hidden_also_where_a_log_is_cut(text: str, shown: list[str], log: Path) -> None:
    log.write_text(text)
    assert lines(log) == shown


def test_a_secret_of_several_lines_is_hidden_before_lines_are_chosen(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "".join(f"part {n} of a key\n" for n in range(20))
    monkeypatch.setenv("SIGNING_KEY", key)
    log.write_text(f"begin\n{key}end\n")
    assert lines(log) == ["begin", "***end"]


def test_what_is_read_on_begins_and_ends_at_whole_lines(log: Path) -> None:
    with log.open("w", buffering=1) as file:
        file.write(f"one\n{HALF}")
        file.flush()
        first = whole_lines(log)
        assert (first.text, first.end, first.cut) == ("one\n", 4, True)
        file.write(f"{SECRET[13:]}\r50%\rtwo")
        file.flush()
        second = whole_lines(log, first.end)
        assert (second.text, second.cut) == ("***\r50%\r", True)
        file.write("\n")
    third = whole_lines(log, second.end)
    assert (third.text, third.end, third.cut) == ("two\n", log.stat().st_size, False)
    again = whole_lines(log, third.end)
    assert (again.text, again.end, again.cut) == ("", third.end, False)


def test_of_more_than_asked_the_last_whole_lines_are_read(log: Path) -> None:
    log.write_text(f"{SECRET}\nthree\nfour\n")
    assert whole_lines(log, most=20).text == "three\nfour\n"
    assert whole_lines(log, most=11).text == "four\n"  # as far as it can be seen, `three` is the end of a line
    log.write_text("x")
    assert whole_lines(log, 100).end == 1  # a log that was cut
