"""`make faults`: what is recorded, what is not repeated, what the page says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import fault_table
import pytest
from fault_trials import MARKS, Record, commit
from places import CHECKOUT

TESTS = """
import pytest
from pathlib import Path
from fault_trials import both_forms

def ran(name):
    with Path("ran.txt").open("a") as file:
        file.write(f"{name} ")

@pytest.mark.promise(7, "alone")
@pytest.mark.parametrize("n", [1, 2])
def test_alone(n):
    ran(f"alone{n}")
    assert n == 1 or not Path("broken.txt").exists()

@pytest.mark.faults
@pytest.mark.promise(9, "skipped")
def test_skipped():
    if Path("broken.txt").exists():
        pytest.skip("not here")

@both_forms(short=1, full=4)
def test_many(trials, count):
    def attempt(name):
        ran(f"many{name}")
        if Path("broken.txt").exists():
            assert name != "1", "as told"
            if name == "2":
                pytest.skip("not here")
        if name == "3" and Path("edit.txt").exists():
            Path("tests/new.py").touch()
    trials(1, "many", map(str, range(count)), attempt, parallel=2)

def test_other():
    ran("other")
"""


class Project:
    """A project with these tests, and real sessions of pytest in it."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester, self.path = pytester, pytester.path
        self.test = self.path / "tests" / "test_it.py"
        self.test.parent.mkdir()
        self.test.write_text(TESTS)
        (self.path / "pyproject.toml").write_text((CHECKOUT / "pyproject.toml").read_text())
        (self.path / ".gitignore").write_text("__pycache__\n*.txt\n.faults\n.pytest_cache\n")
        git(self.path, "init")
        git(self.path, "add", ".")
        git(self.path, "commit", "-m", "all")

    def run(self, *arguments: str, code: int = 0) -> tuple[list[str], str]:
        """Trials made, and what pytest says."""
        (self.path / "ran.txt").write_text("")
        command = ("-p", "fault_trials", "-p", "no:cacheprovider", *arguments)
        done = self.pytester.runpytest_subprocess(*command)
        assert done.ret == code
        return sorted((self.path / "ran.txt").read_text().split()), done.stdout.str()

    def faults(self, code: int = 0) -> list[str]:
        return self.run("-m", MARKS, code=code)[0]

    @property
    def record(self) -> Record:
        return Record.of(self.path)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("OPD_FAULTS_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT / "tests" / "support"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_timeout")
    return Project(pytester)


def git(folder: Path, *command: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True)


def test_every_result_is_recorded_and_what_passed_is_not_repeated(project: Project) -> None:
    (project.path / "broken.txt").touch()
    assert project.faults(code=1) == ["alone1", "alone2", "many0", "many1", "many2", "many3"]
    found = {
        (x["row"], x["fault"], x["trial"] or x["test"].partition("::")[2]): x["ok"] for x in project.record.lines()
    }
    assert found == {
        (7, "alone", "test_alone[1]"): True,
        (7, "alone", "test_alone[2]"): False,
        (9, "skipped", "test_skipped"): False,
        (1, "many", "0"): True,
        (1, "many", "1"): False,
        (1, "many", "2"): False,
        (1, "many", "3"): True,
        (None, None, "test_many[full]"): False,
    }
    (project.path / "broken.txt").unlink()
    with project.record.path.open("a") as file:
        file.write('\n{"test": "torn by a ki')
    assert project.faults() == ["alone2", "many1", "many2"]
    assert project.faults() == []


def test_the_short_form_records_nothing_and_shows_every_failure(project: Project) -> None:
    ran, _ = project.run()
    assert ran == ["alone1", "alone2", "many0", "other"] and not (project.path / ".faults").exists()
    project.test.write_text(TESTS.replace("short=1", "short=3"))
    (project.path / "broken.txt").touch()
    _, said = project.run("-k", "many", code=1)
    assert "2 of 3 trials failed" in said and "in trial '1'" in said and "in trial '2'" in said


@pytest.mark.parametrize(
    "added",
    [
        "@pytest.mark.faults\ndef test_in_no_table(): ...\n",
        '@pytest.mark.promise(1, "x")\ndef test_in_two_rows(trials): ...\n',
    ],
)
def test_a_fault_test_has_a_row_of_its_own(project: Project, added: str) -> None:
    project.test.write_text(TESTS + added)
    project.run("-m", MARKS, code=pytest.ExitCode.USAGE_ERROR)


def test_what_passes_while_the_code_changes_does_not_count(project: Project) -> None:
    (project.path / "edit.txt").touch()
    before = project.record
    assert project.faults(code=3) == ["alone1", "alone2", "many0", "many1", "many2", "many3"]
    assert {line["fault"] for line in before.lines()} == {"alone", "skipped"}
    changed = commit(project.path)
    assert changed != before.path.stem and changed.startswith(before.path.stem)
    (project.path / "edit.txt").unlink()
    (project.path / "tests" / "new.py").unlink()
    (project.path / "docs.md").write_text("documents do not count")
    assert project.faults() == ["many0", "many1", "many2", "many3"]


def test_the_page_counts_trials_and_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_table, "ROWS", (2, 12))
    record, tests = Record(tmp_path / "abc.jsonl"), ["t.py::a[1]", "t.py::a[2]", "t.py::b[full]", "u.py::b[full]"]
    assert fault_table.report(record, tests) == "Not run yet on commit abc."
    for row, fault, trial, seconds, test in (
        (12, "fault", None, 30.0, tests[0]),
        (12, "fault", None, 60.0, tests[1]),
        (2, "other", "1", 6.0, tests[2]),
        (None, None, None, 6.0, tests[2]),
        (2, "other", "1", 6.0, tests[3]),
        (None, None, None, 6.0, tests[3]),
    ):
        record.add(row=row, fault=fault, trial=trial, ok=True, seconds=seconds, test=test, day="2026-01-02")
    text = fault_table.report(record, tests)
    assert text.startswith("4 trials on commit abc, 2026-01-02; 0 failures.\n\nMachine: ")
    assert text.endswith(
        f"| 2 | other | 2 | all passed | 0.2 | `{fault_table.COMMAND} t.py u.py` |\n"
        f"| 12 | fault | 2 | all passed | 1.5 | `{fault_table.COMMAND} t.py::a` |"
    )
    monkeypatch.setattr(fault_table, "ROWS", (2, 5, 12))
    record.add(row=2, fault="other", trial="2", ok=False, seconds=1.0, test=tests[3], day="2026-01-03")
    text = fault_table.report(record, [*tests, "t.py::new"])
    assert text.startswith("**Incomplete**: so far 5 trials on commit abc, 2026-01-02 to 2026-01-03; 1 failures.")
    assert "- `t.py::new`: 1 of its tests\n- row 5: no trial\n" in text and "| 5 |  | 0 | **missing** |" in text
    assert "| 2 | other | 3 | **1 failed** |" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fault_table.BEGIN}\nold\n{fault_table.END}\nafter\n")
    fault_table.write(page, text)
    assert page.read_text() == f"before\n{fault_table.BEGIN}\n{text}\n{fault_table.END}\nafter\n"


def test_the_rows_are_those_of_the_page() -> None:
    page = (CHECKOUT / "docs" / "reliability.md").read_text().partition(fault_table.BEGIN)[0]
    assert [int(row) for row in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == [*fault_table.ROWS]
