"""The record of `make faults`: what is noted, what is not run again, which commit it stands for, what the page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fault_table
import fault_trials
import pytest
from fault_trials import CHECKOUT, Record, Trials

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


class Session:
    """A folder of tests that record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "conftest.py").write_text('pytest_plugins = ["fault_recorder"]')
        (folder / "pyproject.toml").write_text((CHECKOUT / "pyproject.toml").read_text())
        (folder / "test_it.py").write_text(TESTS)

    def pytest(self, *arguments: str, code: int = 0) -> tuple[set[str], str]:
        """What was run, and what was said."""
        ran = self.folder / "ran"
        ran.write_text("")
        path = os.pathsep.join(map(str, (CHECKOUT / "tests" / "support", CHECKOUT)))
        env = os.environ | {"OPD_FAULTS_DIR": str(self.folder / "record"), "RAN": str(ran), "PYTHONPATH": path}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "test_it.py"]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return set(ran.read_text().split()), done.stdout

    def lines(self) -> list[dict]:
        [file] = (self.folder / "record").iterdir()
        return Record(file).lines()


FULL = ("-m", "faults or promise")


def test_what_passed_is_recorded_and_not_run_again(tmp_path: Path) -> None:
    session = Session(tmp_path)
    (tmp_path / "broken").touch()
    ran, _ = session.pytest(*FULL, code=1)
    assert ran == {"alone1", "alone2", "short", "full", "teardown", "many0", "many1", "many2"}
    found = {(line["row"], line["fault"], line["trial"].rpartition("::")[2]): line["ok"] for line in session.lines()}
    assert found == {
        (7, "alone", "test_alone[1]"): True,
        (7, "alone", "test_alone[2]"): False,
        (8, "in a world", "test_world[short]"): True,
        (8, "in a world", "test_world[full]"): True,
        (9, "torn down", "test_teardown"): False,
        (9, "skipped", "test_skipped"): False,
        (1, "many", "0"): True,
        (1, "many", "1"): True,
        (1, "many", "2"): True,
    }
    assert all(
        line["seconds"] >= 0 and line["when"] and line["test"].startswith("test_it.py::") for line in session.lines()
    )
    (tmp_path / "broken").unlink()
    ran, said = session.pytest(*FULL)
    assert ran == {"alone2", "teardown"}
    assert "3 tests passed on this commit before" in said and "| 7 | alone | 2 | **1 failed** |" in said
    ran, said = session.pytest("-m", "promise", "-k", "alone or world")
    assert (
        ran == set() and "4 tests passed on this commit before" in said
    )  # and no complaint that there was nothing to do
    assert len(session.lines()) == 9 + 3  # the skipped one failed again


def test_the_short_form_records_nothing(tmp_path: Path) -> None:
    session = Session(tmp_path)
    ran, said = session.pytest()
    assert ran == {"alone1", "alone2", "short", "many0", "other"}
    assert not (tmp_path / "record").exists() and "faults ----" not in said


def test_a_full_form_that_would_be_in_no_table_is_refused(tmp_path: Path) -> None:
    session = Session(tmp_path)
    with (tmp_path / "test_it.py").open("a") as file:
        file.write("@pytest.mark.faults\ndef test_unnamed(): ...\n")
    done = session.pytest(*FULL, code=4)
    assert done[0] == set()
    assert "other" in session.pytest()[0]


def test_trials_that_passed_are_not_run_again_and_failures_stay(tmp_path: Path) -> None:
    record, seen = Record(tmp_path / "deep" / "record.jsonl"), list[str]()
    trials = Trials(record, "tests/test_x.py::test_x[full]")

    def attempt(name: str) -> None:
        seen.append(name)
        assert name != "b" or len(seen) > 3, "as told"

    with pytest.raises(AssertionError, match="1 trials failed:\nb: AssertionError: as told"):
        trials(3, "fault", "abc", attempt)
    trials(3, "fault", "abc", attempt, parallel=2)
    trials(3, "another fault", "a", attempt)
    assert seen == [*"abc", "b", "a"]
    assert [(line["trial"], line["ok"]) for line in record.lines()] == [*zip("abcba", (1, 0, 1, 1, 1), strict=True)]
    assert record.lines()[0]["test"] == "tests/test_x.py::test_x"
    assert record.machines() == [fault_trials.machine()]
    assert Record(record.path).passed(3, "fault") == {"a", "b", "c"}
    (table,) = [line for line in fault_table.table(record.lines()).splitlines() if "| 3 | fault" in line]
    assert "| 3 | **1 failed** |" in table


def test_a_torn_line_does_not_count_and_spoils_none(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.jsonl")
    record.note(1, "fault", "a", None, 1.0, "t")
    record.note(1, "fault", "b", None, 1.0, "t")
    record.path.write_bytes(record.path.read_bytes()[:-20])
    assert record.passed(1, "fault") == {"a"}
    record.note(1, "fault", "c", None, 1.0, "t")
    assert record.passed(1, "fault") == {"a", "c"}


def test_a_commit_is_what_matters_in_it(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@localhost")
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    def add(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        git("add", path)
        git("commit", "-m", path)

    git("init")
    add("storage/store.py", "1")
    add("docs/page.md", "1")
    first = fault_trials.commit(tmp_path)
    assert len(first) == 12
    add("docs/page.md", "2")
    (tmp_path / "storage" / "notes").write_text("not in git")
    (tmp_path / "docs" / "page.md").write_text("3")
    assert fault_trials.commit(tmp_path) == first
    (tmp_path / "storage" / "store.py").write_text("2")
    changed = fault_trials.commit(tmp_path)
    assert changed.startswith(f"{first}-")
    (tmp_path / "storage" / "store.py").write_text("3")
    assert fault_trials.commit(tmp_path) not in (first, changed)
    git("checkout", "storage/store.py")
    add("tests/test_x.py", "1")
    assert fault_trials.commit(tmp_path) != first


def test_the_page_says_on_what_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_FAULTS_DIR", str(tmp_path))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fault_table.BEGIN}\nold\n{fault_table.END}\nafter\n")
    fault_table.write(page, "abc")
    assert "Not run yet on commit abc." in page.read_text() and "old" not in page.read_text()
    record = Record(tmp_path / "abc.jsonl")
    record.note(12, "fault", "t.py::a[1]", None, 30.0, "t.py::a[1]")
    record.note(12, "fault", "t.py::a[2]", None, 60.0, "t.py::a[2]")
    record.note(2, "other", "1", None, 6.0, "t.py::a")
    record.note(2, "other", "1", None, 6.0, "u.py::b")
    with record.path.open("a") as file:
        file.write(json.dumps({"machine": "another one"}) + "\n")
    fault_table.write(page, "abc")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "4 trials on commit abc, " in text and "; 0 failures." in text
    assert f"Machine: {fault_trials.machine()}." in text and "Machine: another one." in text
    assert (
        " cores, " in text and "GiB of memory" in text and "Python 3." in text and "torch " in text and "vllm " in text
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        f"| 2 | other | 2 | all passed | 0.2 | `{fault_table.COMMAND} t.py u.py` |",
        f"| 12 | fault | 2 | all passed | 1.5 | `{fault_table.COMMAND} t.py::a` |",
    ]
