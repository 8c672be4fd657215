"""Trials of the fault tests: how many there are, and which are done already.

A test runs its trials through `Trials`. In the short form (`make test`) they simply run. In the full form (`make faults`)
each result is appended to `<OPD_FAULTS_DIR>/<commit>.jsonl` as soon as it is there; a trial that passed on this commit is
not run again, so that a run can be stopped and continued. A failed one is tried again, but its failure stays on record.
Tests that are one trial by themselves are recorded by `fault_recorder`; `fault_table` makes the table of
docs/reliability.md."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
FULL_SECONDS = 12 * 3600
MATTERS = ("storage", "tasks", "flows", "tests", "configs", "requirements", "pyproject.toml")
"""What a result depends on: neither what is not in git nor a change of the documents makes it another commit's."""
LIBRARIES = ("torch", "vllm", "transformers", "deepspeed", "prefect", "pyarrow", "duckdb", "hypothesis")


def both_forms(short: int, full: int) -> pytest.MarkDecorator:
    """Parametrises `count`: the number of trials in `make test` and in `make faults`."""
    marks = (pytest.mark.faults, pytest.mark.timeout(FULL_SECONDS))
    return pytest.mark.parametrize(
        "count", [pytest.param(short, id="short"), pytest.param(full, id="full", marks=marks)]
    )


def commit(checkout: Path = CHECKOUT) -> str:
    """The last commit that changed something that matters, and for a changed tree a digest of the changes."""
    last = _git(checkout, "log", "-1", "--format=%h", "--abbrev=12", "--", *MATTERS)
    changes = _git(checkout, "diff", "HEAD", "--", *MATTERS)
    return last + (f"-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def _git(checkout: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


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
    """Results on file, a line of JSON each; and a line for every machine that they come from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._signed = False

    def note(self, row: int, fault: str, trial: str, problem: str | None, seconds: float, test: str) -> None:
        """Appends a result; `problem` is None for one that passed."""
        line = {"row": row, "fault": fault, "trial": trial, "ok": problem is None, "problem": problem}
        line |= {"seconds": round(seconds, 3), "test": test.partition("[")[0], "when": time.strftime("%FT%T%z")}
        with self._lock:
            if not self._signed and machine() not in self.machines():
                self._append({"machine": machine()})
            self._signed = True
            self._append(line)

    def lines(self) -> list[dict[str, Any]]:
        """The results so far."""
        return [line for line in self._read() if "row" in line]

    def machines(self) -> list[str]:
        return [line["machine"] for line in self._read() if "machine" in line]

    def passed(self, row: int, fault: str) -> set[str]:
        """The trials that need not be run again."""
        return {x["trial"] for x in self.lines() if x["row"] == row and x["fault"] == fault and x["ok"]}

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        """A line that was torn when its writer was killed does not count."""
        lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines


class Trials:
    """Runs trials of one test. `record` holds the results; None in the short form."""

    def __init__(self, record: Record | None, test: str) -> None:
        self.record, self.test = record, test

    def __call__(
        self, row: int, fault: str, names: Iterable[str], attempt: Callable[[str], object], parallel: int = 1
    ) -> None:
        """Runs `attempt(name)` for every trial that has not passed yet; AssertionError at the end if any failed.

        `row` is that of the table of promises, `fault` what is done to the system, in words."""
        done = self.record.passed(row, fault) if self.record is not None else set()
        failures: list[str] = []

        def one(name: str) -> None:
            started = time.monotonic()
            try:
                attempt(name)
                problem = None
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                failures.append(f"{name}: {problem}")
                if self.record is None:
                    raise
            if self.record is not None:
                self.record.note(row, fault, name, problem, time.monotonic() - started, self.test)

        with ThreadPoolExecutor(parallel) as pool:
            running = [pool.submit(one, name) for name in names if name not in done]
            try:
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        assert not failures, f"{len(failures)} trials failed:\n" + "\n".join(failures[:20])
