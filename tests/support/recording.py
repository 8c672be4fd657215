"""A project with fault tests of its own, to be run, stopped and continued by real sessions of pytest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fault_table
from fault_record import Record
from places import CHECKOUT

FULL = ("-m", "faults or promise")


class Session:
    """A project of its own, with tests that record."""

    def __init__(self, folder: Path, tests: str) -> None:
        self.folder, self.ran = folder, folder.parent / f"{folder.name}-ran"
        support = folder / "tests" / "support"
        support.mkdir(parents=True)
        for path in (CHECKOUT / "tests" / "support").glob("fault_*.py"):
            shutil.copy(path, support)
        (folder / "tests" / "conftest.py").write_text('pytest_plugins = ["fault_recorder"]')
        (folder / "pyproject.toml").write_text((CHECKOUT / "pyproject.toml").read_text())
        (folder / ".gitignore").write_text("__pycache__\nbroken*\nrecord\npage.md\n")
        self.test = folder / "tests" / "test_it.py"
        self.test.write_text(tests)
        git(folder, "init")
        git(folder, "add", ".")
        git(folder, "commit", "-m", "all")

    @property
    def environment(self) -> dict[str, str]:
        quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout"}
        return os.environ | quick | {"OPD_FAULTS_DIR": str(self.folder / "record"), "RAN": str(self.ran)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        self.ran.write_text("")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def pytest(self, *arguments: str, code: int = 0) -> tuple[set[str], str]:
        """What was run, and what was said."""
        process = self.start(*arguments)
        out, err = process.communicate()
        assert process.returncode == code, out + err
        return set(self.ran.read_text().split()), out

    def record(self) -> Record:
        [file] = (self.folder / "record").iterdir()
        return Record(file)

    def lines(self) -> list[dict]:
        return self.record().lines()

    def found(self) -> list[tuple]:
        """Row, fault, trial (a test's name in its file) and whether it passed."""
        return [(x["row"], x["fault"], x["trial"].rpartition("::")[2], x["ok"]) for x in self.lines()]

    def page(self) -> str:
        """What `make faults` writes at its end."""
        page = self.folder / "page.md"
        page.write_text(f"{fault_table.BEGIN}\n{fault_table.END}\n")
        command = [sys.executable, "tests/support/fault_table.py", str(page)]
        subprocess.run(command, cwd=self.folder, env=self.environment, check=True, capture_output=True)
        return page.read_text()


def git(folder: Path, *command: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True)
