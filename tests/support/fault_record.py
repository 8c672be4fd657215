"""The record of `make faults`: a file of results for every commit, a line of JSON each, appended as soon as it is known.

Beside results it holds: the machines that they come from; how many trials a test has planned; where each test began and
how it ended. A test that began and has no end died with its process, and failed. A result is never taken back, but for what
passed while the code changed: that belongs to no commit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from places import CHECKOUT

MATTERS = ("storage", "tasks", "flows", "tests", "configs", "requirements", "pyproject.toml")
"""What a result depends on: neither what git ignores nor a change of the documents makes it another commit's."""
LIBRARIES = ("torch", "vllm", "transformers", "deepspeed", "prefect", "pyarrow", "duckdb", "hypothesis")
OUTSIDE = "outside of its trials: fixtures, set-up, end"
"""The fault in the table where a test of many trials failed, and none of them."""
DIED = "its process died (crash, SIGKILL, power cut)"


def commit(checkout: Path = CHECKOUT) -> str:
    """The last commit that changed something that matters, and for a changed tree a digest of the changes, new files too."""
    last = _git(checkout, "log", "-1", "--format=%h", "--abbrev=12", "--", *MATTERS).decode().strip()
    changes = _git(checkout, "diff", "HEAD", "--binary", "--", *MATTERS)
    new = _git(checkout, "ls-files", "--others", "--exclude-standard", "-z", "--", *MATTERS)
    if not changes and not new:
        return last
    digest = hashlib.sha256(changes)
    for name in new.split(b"\0")[:-1]:
        path = checkout / os.fsdecode(name)
        content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        digest.update(name + b"\0" + hashlib.sha256(content).digest())
    return f"{last}-{digest.hexdigest()[:8]}"


def _git(checkout: Path, *command: str) -> bytes:
    return subprocess.run(["git", *command], cwd=checkout, capture_output=True, check=True).stdout


def machine() -> str:
    """What the trials run on, in words."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    memory = psutil.virtual_memory().total / 2**30
    names = {name: _version(name) for name in LIBRARIES}
    libraries = ", ".join(f"{name} {number}" for name, number in names.items() if number)
    return (
        f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory, {f'{gpus} GPUs' if gpus else 'no GPU'};"
        f" {platform.system()}, Python {platform.python_version()}; {libraries}"
    )


def _version(name: str) -> str | None:
    for package in (name, f"{name}-cpu"):
        try:
            return version(package)
        except ModuleNotFoundError:
            continue
    return None


def folder() -> Path:
    return Path(os.environ.get("OPD_FAULTS_DIR") or CHECKOUT / ".faults").absolute()


class Record:
    """One commit's file. `test` is a test's id with its parameters everywhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._signed = False

    # --- writing

    def note(self, row: int, fault: str, trial: str, problem: str | None, seconds: float, test: str) -> None:
        """Appends a result; `problem` is None for one that passed."""
        line = {"row": row, "fault": fault, "trial": trial, "ok": problem is None, "problem": problem}
        line |= {"seconds": round(seconds, 3), "test": test, "when": time.strftime("%FT%T%z")}
        with self._lock:
            if not self._signed and machine() not in self.machines():
                self._append({"machine": machine()})
            self._signed = True
            self._append(line)

    def plan(self, row: int, fault: str, trials: int, test: str) -> None:
        """How many trials the test has of this fault."""
        with self._lock:
            self._append({"planned": test, "row": row, "fault": fault, "trials": trials})

    def begin(self, test: str, row: int | None = None, fault: str | None = None) -> None:
        """The test begins; with `row` and `fault` it is one trial itself."""
        with self._lock:
            self._append({"begins": test, "row": row, "fault": fault, "process": _process(os.getpid())})

    def end(self, test: str, how: str) -> None:
        """`how`: "passed", "failed", "stopped", or "changed", where the code is not the record's any more."""
        with self._lock:
            self._append({"ends": test, "how": how})

    def note_deaths(self) -> None:
        """Tests that began in a process that is gone, and did not end, have failed."""
        begun: dict[str, dict[str, Any]] = {}
        for line in self._read():
            if "begins" in line:
                begun[line["begins"]] = line
            elif "ends" in line:
                begun.pop(line["ends"], None)
            elif "trial" in line and line["trial"] == line["test"]:  # the test's own result
                begun.pop(line["test"], None)
        for test, line in begun.items():
            if line["process"] == _process(line["process"][0]):
                continue  # alive
            row, fault = (line["row"], line["fault"]) if line["row"] is not None else self.outside(test)
            self.note(row, fault, test, DIED, 0.0, test)

    # --- reading

    def lines(self) -> list[dict[str, Any]]:
        """The results so far."""
        return [line for line in self._valid() if "trial" in line]

    def machines(self) -> list[str]:
        return [line["machine"] for line in self._read() if "machine" in line]

    def passed(self, row: int, fault: str, test: str) -> set[str]:
        """The test's trials that need not be run again."""
        what = (row, fault, test)
        return {x["trial"] for x in self.lines() if (x["row"], x["fault"], x["test"]) == what and x["ok"]}

    def ended(self) -> set[str]:
        """The tests that came to their end, all trials of all their faults passed."""
        return {x["ends"] for x in self._valid() if x.get("how") == "passed"}

    def planned(self) -> dict[tuple[str, int, str], int]:
        """(test, row, fault) -> trials."""
        return {(x["planned"], x["row"], x["fault"]): x["trials"] for x in self._valid() if "planned" in x}

    def outside(self, test: str) -> tuple[int, str]:
        """Row (0: unknown) and fault under which the table has what happened to a test of many trials outside of them."""
        return next((row for which, row, _ in self.planned() if which == test), 0), OUTSIDE

    def _valid(self) -> list[dict[str, Any]]:
        """Without what passed in a test during which the code changed."""
        lines: list[dict[str, Any]] = []
        for line in self._read():
            if line.get("how") == "changed":
                test = line["ends"]
                begun = max((at for at, x in enumerate(lines) if x.get("begins") == test), default=0)
                lines[begun:] = [x for x in lines[begun:] if not (x.get("test") == test and x["ok"])]
            lines.append(line)
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = size > 0 and file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")

    def _read(self) -> list[dict[str, Any]]:
        """A line that was torn when its writer was killed does not count."""
        lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines


def _process(pid: int) -> list[Any]:
    """Tells a process from another one with its number; its start is 0 where there is none."""
    try:
        return [pid, psutil.Process(pid).create_time()]
    except psutil.NoSuchProcess:
        return [pid, 0]
