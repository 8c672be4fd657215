"""The record of `make faults`: what is noted, what is not run again, which commit it stands for, what the page says."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import fault_record
import fault_table
import pytest
from fault_record import DIED, OUTSIDE, Record
from fault_trials import Trials, TrialsFailed
from places import CHECKOUT
from recording import FULL, Session, git

TESTS = """
import os, pytest
from pathlib import Path
from fault_trials import both_forms

ran = Path(os.environ["RAN"])

@pytest.fixture(params=["short", pytest.param("full", marks=pytest.mark.faults)])
def world(request):
    return request.param

@pytest.mark.promise(7, "alone")
@pytest.mark.parametrize("n", [1, 2])
def test_alone(n):
    ran.open("a").write(f"alone{n} ")
    assert n == 1 or not Path("broken").exists()

@pytest.mark.promise(8, "in a world")
def test_world(world):
    ran.open("a").write(f"{world} ")

@pytest.mark.faults
@pytest.mark.promise(9, "torn down")
def test_teardown(request):
    ran.open("a").write("teardown ")
    if Path("broken").exists():
        request.addfinalizer(lambda: 1 / 0)

@pytest.mark.faults
@pytest.mark.promise(9, "skipped")
def test_skipped():
    pytest.skip("not here")

@both_forms(short=1, full=3)
def test_many(trials, count):
    trials(1, "many", map(str, range(count)), lambda name: ran.open("a").write(f"many{name} "))

def test_other():
    ran.open("a").write("other ")
"""


def test_what_passed_is_recorded_and_not_run_again(tmp_path: Path) -> None:
    session = Session(tmp_path / "project", TESTS)
    (session.folder / "broken").touch()
    ran, _ = session.pytest(*FULL, code=1)
    assert ran == {"alone1", "alone2", "short", "full", "teardown", "many0", "many1", "many2"}
    assert session.found() == [
        (7, "alone", "test_alone[1]", True),
        (7, "alone", "test_alone[2]", False),
        (8, "in a world", "test_world[short]", True),
        (8, "in a world", "test_world[full]", True),
        (9, "torn down", "test_teardown", False),
        (9, "skipped", "test_skipped", False),
        (1, "many", "0", True),
        (1, "many", "1", True),
        (1, "many", "2", True),
    ]
    for line in session.lines():
        assert line["seconds"] >= 0 and line["when"] and line["test"].startswith("tests/test_it.py::")
    (session.folder / "broken").unlink()
    ran, said = session.pytest(*FULL)
    assert ran == {"alone2", "teardown"}
    assert "3 tests passed on this commit before" in said and "| 7 | alone | 2 | **1 failed** |" in said
    ran, said = session.pytest("-m", "promise", "-k", "alone or world")
    assert (
        ran == set() and "4 tests passed on this commit before" in said
    )  # and no complaint that there was nothing to do
    assert len(session.lines()) == 9 + 3  # the skipped one failed again


def test_the_short_form_records_nothing(tmp_path: Path) -> None:
    session = Session(tmp_path / "project", TESTS)
    ran, said = session.pytest()
    assert ran == {"alone1", "alone2", "short", "many0", "other"}
    assert not (session.folder / "record").exists() and "faults ----" not in said


def test_a_full_form_that_would_be_in_no_table_is_refused(tmp_path: Path) -> None:
    session = Session(tmp_path / "project", TESTS)
    for added in (
        "@pytest.mark.faults\ndef test_unnamed(): ...\n",
        '@pytest.mark.promise(1, "x")\ndef test_x(trials): ...',
    ):
        session.test.write_text(TESTS + added)
        ran, _ = session.pytest(*FULL, code=4)
        assert ran == set()


def test_trials_that_passed_are_not_run_again_and_failures_stay(tmp_path: Path) -> None:
    record, seen = Record(tmp_path / "deep" / "record.jsonl"), list[str]()
    trials = Trials(record, "tests/test_x.py::test_x[full]")

    def attempt(name: str) -> None:
        seen.append(name)
        assert name != "b" or len(seen) > 3, "as told"

    with pytest.raises(TrialsFailed, match="1 trials failed:\nb: AssertionError: as told"):
        trials(3, "fault", "abc", attempt)
    trials(3, "fault", "abc", attempt, parallel=2)
    trials(3, "another fault", "a", attempt)
    assert seen == [*"abc", "b", "a"]
    assert [(line["trial"], line["ok"]) for line in record.lines()] == [*zip("abcba", (1, 0, 1, 1, 1), strict=True)]
    assert record.lines()[0]["test"] == "tests/test_x.py::test_x[full]"
    assert record.machines() == [fault_record.machine()]
    assert Record(record.path).passed(3, "fault", trials.test) == {"a", "b", "c"}
    assert Record(record.path).passed(3, "fault", "tests/test_x.py::test_y[full]") == set()
    (table,) = [line for line in fault_table.table(record.lines()).splitlines() if "| 3 | fault" in line]
    assert "| 3 | **1 failed** |" in table


def test_a_torn_line_does_not_count_and_spoils_none(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.jsonl")
    record.note(1, "fault", "a", None, 1.0, "t")
    record.note(1, "fault", "b", None, 1.0, "t")
    record.path.write_bytes(record.path.read_bytes()[:-20])
    assert record.passed(1, "fault", "t") == {"a"}
    record.note(1, "fault", "c", None, 1.0, "t")
    assert record.passed(1, "fault", "t") == {"a", "c"}


def test_a_commit_is_what_matters_in_it(tmp_path: Path) -> None:
    def add(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        git(tmp_path, "add", path)
        git(tmp_path, "commit", "-m", path)

    git(tmp_path, "init")
    add("storage/store.py", "1")
    add("docs/page.md", "1")
    first = fault_record.commit(tmp_path)
    assert len(first) == 12
    add("docs/page.md", "2")
    (tmp_path / "docs" / "page.md").write_text("3")
    (tmp_path / "docs" / "new.md").write_text("not in git")
    (tmp_path / ".git" / "info" / "exclude").write_text("*.pyc")
    (tmp_path / "storage" / "store.pyc").write_text("ignored by git")
    assert fault_record.commit(tmp_path) == first
    (tmp_path / "storage" / "store.py").write_text("2")
    changed = fault_record.commit(tmp_path)
    assert changed.startswith(f"{first}-")
    (tmp_path / "storage" / "store.py").write_text("3")
    assert fault_record.commit(tmp_path) not in (first, changed)
    git(tmp_path, "checkout", "storage/store.py")
    names = set()
    for name, text in (("new.py", "1"), ("new.py", "2"), ("newer.py", "2")):
        (tmp_path / "storage" / name).write_text(text)
        names.add(fault_record.commit(tmp_path))
        (tmp_path / "storage" / name).unlink()
    assert len(names) == 3 and all(name.startswith(f"{first}-") for name in names)
    assert fault_record.commit(tmp_path) == first
    add("tests/test_x.py", "1")
    assert fault_record.commit(tmp_path) != first


def test_the_page_says_on_what_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_FAULTS_DIR", str(tmp_path))
    monkeypatch.setattr(fault_table, "ROWS", (2, 12))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fault_table.BEGIN}\nold\n{fault_table.END}\nafter\n")
    fault_table.write(page, "abc", ["t.py::a"])
    assert "Not run yet on commit abc." in page.read_text() and "old" not in page.read_text()
    record = Record(tmp_path / "abc.jsonl")
    tests = ["t.py::a[1]", "t.py::a[2]", "t.py::b[full]", "u.py::b[full]"]
    for row, fault, trial, seconds, test in (
        (12, "fault", tests[0], 30.0, tests[0]),
        (12, "fault", tests[1], 60.0, tests[1]),
        (2, "other", "1", 6.0, tests[2]),
        (2, "other", "1", 6.0, tests[3]),
    ):
        record.begin(test)
        record.note(row, fault, trial, None, seconds, test)
        record.end(test, "passed")
    with record.path.open("a") as file:
        file.write(json.dumps({"machine": "another one"}) + "\n")
    fault_table.write(page, "abc", tests)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "\n4 trials on commit abc, " in text and "; 0 failures.\n" in text and "ncomplete" not in text
    assert f"Machine: {fault_record.machine()}." in text and "Machine: another one." in text
    for part in (" cores, ", "GiB of memory", "Python 3.", "torch ", "vllm "):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        f"| 2 | other | 2 | all passed | 0.2 | `{fault_table.COMMAND} t.py u.py` |",
        f"| 12 | fault | 2 | all passed | 1.5 | `{fault_table.COMMAND} t.py::a` |",
    ]
    monkeypatch.setattr(fault_table, "ROWS", (2, 5, 12))
    text = fault_table.report(record, "abc", tests)
    assert text.startswith("**Incomplete**: so far 4 trials") and "- row 5: no trial\n" in text
    assert "| 5 |  | 0 | **missing** | 0.0 |  |" in text


def test_the_rows_are_those_of_the_page() -> None:
    page = (CHECKOUT / "docs" / "reliability.md").read_text().partition(fault_table.BEGIN)[0]
    assert [int(row) for row in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == [*fault_table.ROWS]


RAISES = """
import os, pytest, time
from pathlib import Path
from fault_trials import both_forms

def attempt(name):
    match name:
        case "fail": pytest.fail("as told")
        case "not raised":
            with pytest.raises(ValueError):
                pass
        case "skip": pytest.skip("not here")
        case "exit": raise SystemExit(0)
        case "noted":
            error = AssertionError("wrong")
            error.add_note("after this story")
            raise error

@both_forms(short=1, full=2)
def test_raises(trials, count):
    names = ["skip"] if count == 1 else ["fail", "not raised", "skip", "exit", "noted", "last"]
    trials(3, "raises", names, attempt, parallel=count)
"""


def test_whatever_a_trial_raises_is_on_record_and_the_others_go_on(tmp_path: Path) -> None:
    session = Session(tmp_path / "project", RAISES)
    session.pytest(*FULL, code=1)
    problems = {line["trial"]: line["problem"] for line in session.lines()}
    assert problems == {
        "fail": "Failed: as told",
        "not raised": "Failed: DID NOT RAISE ValueError",
        "skip": "Skipped: not here",
        "exit": "SystemExit: 0",
        "noted": "AssertionError: wrong\nafter this story",
        "last": None,
    }
    _, said = session.pytest(code=1)  # the short form
    assert "skip: Skipped: not here" in said


OUTSIDE_OF_TRIALS = """
import os, pytest, time
from pathlib import Path
from fault_trials import both_forms

@pytest.fixture
def needs():
    assert not Path("broken").exists(), "cannot be set up"
    yield
    assert not Path("broken").exists(), "cannot be torn down"

@both_forms(short=1, full=2)
def test_fixture(needs, trials, count):
    trials(4, "with a fixture", map(str, range(count)), str)

@both_forms(short=1, full=2)
def test_after(trials, count):
    trials(5, "before an assertion", map(str, range(count)), str)
    assert not Path("broken").exists(), "after the trials"

@both_forms(short=1, full=2)
def test_none(trials, count):
    if not Path("broken").exists():
        trials(6, "none", map(str, range(count)), str)

@pytest.mark.faults
@pytest.mark.timeout(2)
def test_slow(trials):
    trials(7, "slow", ["one", "two"], lambda name: time.sleep(4 * Path("broken").exists()))
"""


def test_what_fails_outside_of_the_trials_is_on_record(tmp_path: Path) -> None:
    session = Session(tmp_path / "project", OUTSIDE_OF_TRIALS)
    (session.folder / "broken").touch()
    session.pytest(*FULL, code=1)
    failed = {(x["row"], x["fault"], x["trial"]): x["problem"] for x in session.lines() if not x["ok"]}
    text = {
        (0, OUTSIDE, "tests/test_it.py::test_fixture[full]"): "cannot be set up",
        (5, OUTSIDE, "tests/test_it.py::test_after[full]"): "after the trials",
        (0, OUTSIDE, "tests/test_it.py::test_none[full]"): "it made no trial",
        (7, "slow", "one"): "Timeout",
        (7, OUTSIDE, "tests/test_it.py::test_slow"): "Timeout",
    }
    assert failed.keys() == text.keys()
    assert all(text[key] in problem for key, problem in failed.items())
    page = session.page()
    assert "**Incomplete**" in page and f"| ? | {OUTSIDE} | 2 | **2 failed** |" in page
    (session.folder / "broken").unlink()
    session.pytest(*FULL)
    page = session.page()
    assert "8 failed" not in page and "; 5 failures." in page and f"| ? | {OUTSIDE} | 2 | **2 failed** |" in page


STOPPED = """
import os, pytest, signal, time
from pathlib import Path

def wait(name):
    Path(os.environ["RAN"]).open("a").write(f"{name} ")
    if name == "2" and Path("broken").exists():
        Path("broken-now").touch()
        time.sleep(60)

@pytest.mark.faults
def test_many(trials):
    trials(1, "many", "123", wait)

@pytest.mark.promise(2, "alone")
@pytest.mark.parametrize("n", range(5))
def test_alone(n):
    ...
"""


def stop(session: Session, number: signal.Signals) -> int:
    """The exit code of a session that gets a signal in its second trial."""
    (session.folder / "broken").touch()
    process = session.start(*FULL)
    while not (session.folder / "broken-now").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    # a stopped session lets its trial end
    if number != signal.SIGKILL:
        (session.folder / "broken").unlink()
    process.communicate()
    (session.folder / "broken-now").unlink()
    (session.folder / "broken").unlink(missing_ok=True)
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_is_incomplete_until_it_went_on(tmp_path: Path, number: signal.Signals) -> None:
    session = Session(tmp_path / "project", STOPPED.replace("time.sleep(60)", "time.sleep(1)"))
    assert stop(session, number) == pytest.ExitCode.INTERRUPTED
    page = session.page()
    assert "**Incomplete**: so far 2 trials on commit " in page and "; 0 failures." in page
    assert "- `tests/test_it.py::test_many`; 2 of 3 trials of row 1, many\n" in page
    assert "- `tests/test_it.py::test_alone`: 5 of 5 tests\n" in page
    assert "- row 2: no trial\n" in page and "| 2 |  | 0 | **missing** |" in page
    ran, _ = session.pytest(*FULL)
    assert ran == {"3"}
    left = [line for line in session.page().splitlines() if line.startswith("- ")]
    assert left == [f"- row {row}: no trial" for row in range(3, 19)]


def test_a_test_whose_process_died_has_failed(tmp_path: Path) -> None:
    session = Session(tmp_path / "project", STOPPED)
    assert stop(session, signal.SIGKILL) == -signal.SIGKILL
    page = session.page()
    assert "so far 2 trials on commit " in page and "; 1 failures." in page  # a trial, and the death
    assert f"| 1 | {OUTSIDE} | 1 | **1 failed** |" in page
    assert "- `tests/test_it.py::test_many`; 1 of 3 trials of row 1, many\n" in page
    ran, said = session.pytest(*FULL)
    assert ran == {"2", "3"} and f"| 1 | {OUTSIDE} | 1 | **1 failed** |" in said
    assert [line["problem"] for line in session.lines() if not line["ok"]] == [DIED]


CHANGES = """
import os, pytest
from pathlib import Path

@pytest.mark.promise(1, "first")
def test_first():
    ...

@pytest.mark.faults
def test_changes(trials):
    def attempt(name):
        Path(os.environ["RAN"]).open("a").write(f"{name} ")
        if name == "b" and Path("broken").exists():
            Path("tests/new.py").write_text("")
        assert name != "c" or not Path("broken").exists()

    trials(2, "changes", "abc", attempt)

@pytest.mark.promise(3, "last")
def test_last():
    Path(os.environ["RAN"]).open("a").write("last ")
"""


def test_what_passes_while_the_code_changes_does_not_count(tmp_path: Path) -> None:
    session = Session(tmp_path / "project", CHANGES)
    (session.folder / "broken").touch()
    ran, said = session.pytest(*FULL, code=3)
    assert ran == {"a", "b", "c"}
    assert "the code changed while the faults ran: it was " in said and "test_changes was the test at hand" in said
    assert session.found() == [(1, "first", "test_first", True), (2, "changes", "c", False)]
    (session.folder / "broken").unlink()
    (session.folder / "tests" / "new.py").unlink()
    ran, _ = session.pytest(*FULL)
    assert ran == {"a", "b", "c", "last"}
    assert session.found()[2:] == [(2, "changes", name, True) for name in "abc"] + [(3, "last", "test_last", True)]
