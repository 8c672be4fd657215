"""Fault tests: many trials in one test, and the record of `make faults` (a pytest plugin).

A test that takes `trials` makes many trials, a few of them in `make test` (`both_forms`). A test marked
`promise(row, "fault in words")` is one trial itself. The full form, `-m "faults or promise"`, appends every result to
`<OPD_FAULTS_DIR>/<commit>.jsonl` and does not repeat what passed on this commit; `fault_table` makes the table from it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

MARKS = "faults or promise"
MATTERS = ("storage", "tasks", "flows", "tests", "configs", "requirements", "pyproject.toml")
"""What a result depends on. A change elsewhere, or to what git ignores, does not make it another commit's."""
FULL_SECONDS = 12 * 3600
_RECORD = pytest.StashKey["Record | None"]()


def both_forms(short: int, full: int) -> pytest.MarkDecorator:
    """Parametrises `count`: the number of trials in `make test` and in `make faults`."""
    marks = (pytest.mark.faults, pytest.mark.timeout(FULL_SECONDS))
    return pytest.mark.parametrize(
        "count", [pytest.param(short, id="short"), pytest.param(full, id="full", marks=marks)]
    )


def commit(checkout: Path) -> str:
    """The last commit that changed something that matters; of a changed tree also a digest, new files included."""
    paths = [name for name in MATTERS if (checkout / name).exists()]

    def git(*command: str, **environment: str) -> str:
        env = os.environ | environment
        done = subprocess.run(["git", *command], cwd=checkout, env=env, capture_output=True, check=True, text=True)
        return done.stdout.strip()

    last = git("log", "-1", "--format=%h", "--abbrev=12", "--", *paths)
    if not git("status", "--porcelain", "--", *paths):
        return last
    with tempfile.TemporaryDirectory() as folder:
        index = f"{folder}/index"  # not the user's
        git("add", "--all", "--", *paths, GIT_INDEX_FILE=index)
        return f"{last}-{git('write-tree', GIT_INDEX_FILE=index)[:8]}"


class Record:
    """The results on one commit, a line of JSON each: every trial, and (`trial` null) how every test ended."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()

    @classmethod
    def of(cls, checkout: Path) -> Record:
        folder = Path(os.environ.get("OPD_FAULTS_DIR") or checkout / ".faults").absolute()
        return cls(folder / f"{commit(checkout)}.jsonl")

    def add(self, **line: Any) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"\n{json.dumps(line)}")  # the newline comes first: a line torn by a kill spoils no other

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def ended(self) -> set[str]:
        """The tests that passed."""
        return {line["test"] for line in self.lines() if line["trial"] is None and line["ok"]}


class Trials:
    """Makes the trials of one test. `record` is None in the short form."""

    def __init__(self, record: Record | None, test: str) -> None:
        self.record, self.test = record, test

    def __call__(
        self, row: int, fault: str, names: Iterable[str], attempt: Callable[[str], object], parallel: int = 1
    ) -> None:
        """Calls `attempt(name)` for every trial that has not passed on this commit; ExceptionGroup at the end if any failed.

        `row` is that of the table of promises, `fault` what is done to the system, in words. Whatever a trial raises is its
        failure, also a skip; only Ctrl-C and pytest.exit stop the others."""
        names = list(names)
        assert names and len(set(names)) == len(names), f"trials need different names: {names}"
        known = self.record.lines() if self.record else []
        passed = {x["trial"] for x in known if (x["test"], x["fault"], x["ok"]) == (self.test, fault, True)}
        errors: list[BaseException] = []

        def one(name: str) -> None:
            started, problem = time.monotonic(), None
            try:
                attempt(name)
            except (KeyboardInterrupt, pytest.exit.Exception):
                raise
            except BaseException as error:  # pytest.fail and pytest.skip raise no Exception
                problem = "".join(traceback.format_exception_only(error))
                error.add_note(f"in trial {name!r}")
                errors.append(error)
            if self.record:
                note = {"test": self.test, "row": row, "fault": fault, "trial": name, "ok": problem is None}
                self.record.add(**note, problem=problem, **_when(time.monotonic() - started))

        with ThreadPoolExecutor(parallel) as pool:
            running = [pool.submit(one, name) for name in names if name not in passed]
            try:
                for future in running:
                    future.result()
            except BaseException:  # Ctrl-C, or the test's time is over
                pool.shutdown(cancel_futures=True)
                raise
        if errors:
            raise BaseExceptionGroup(f"{len(errors)} of {len(names)} trials failed", errors)


class Plugin:
    """Records a session of the full form. It ends with an error when the code is not that of the record any more."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        full = config.option.markexpr == MARKS and not config.option.collectonly
        self.record = Record.of(config.rootpath) if full else None
        self.before = 0
        self._promises: dict[str, tuple[int, str]] = {}
        self._seconds: dict[str, float] = {}
        self._problems: dict[str, str] = {}
        self._begun = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark, many = item.get_closest_marker("promise"), "trials" in getattr(item, "fixturenames", ())
            if many == (mark is not None) and (many or item.get_closest_marker("faults")):
                raise pytest.UsageError(
                    f"{item.nodeid}: needs either the fixture `trials` or @pytest.mark.promise(row, fault)"
                )
            if mark is not None:
                self._promises[item.nodeid] = mark.args
        if self.record:
            passed = self.record.ended()
            done = [item for item in items if item.nodeid in passed]
            self.before = len(done)
            self.config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in passed]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.record:
            self._begun = self.record.path.stat().st_size if self.record.path.exists() else 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        self._seconds[test] = self._seconds.get(test, 0.0) + report.duration
        if not report.passed:  # a skip is a failure here
            self._problems[test] = f"{report.when}: {report.longreprtext[-2000:]}"
        if not self.record or report.when != "teardown":
            return
        if (now := commit(self.config.rootpath)) != self.record.path.stem:
            if self.record.path.exists():
                os.truncate(self.record.path, self._begun)
            pytest.exit(f"the code changed to {now} during {test}, which does not count", returncode=3)
        row, fault = self._promises.get(test, (None, None))
        note = {"test": test, "row": row, "fault": fault, "trial": None, "ok": test not in self._problems}
        self.record.add(**note, problem=self._problems.get(test), **_when(self._seconds[test]))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.record:
            terminalreporter.write_line(
                f"{self.before} tests had passed on this commit before; record: {self.record.path}"
            )


def pytest_configure(config: pytest.Config) -> None:
    plugin = Plugin(config)
    config.stash[_RECORD] = plugin.record
    config.pluginmanager.register(plugin, "fault-trials")


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    """Makes and, in the full form, records the trials of this test."""
    return Trials(request.config.stash[_RECORD], request.node.nodeid)


def _when(seconds: float) -> dict[str, Any]:
    return {"seconds": round(seconds, 3), "day": time.strftime("%F")}
