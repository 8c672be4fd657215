"""A pytest plugin: every test of `make faults` ends up in the record of `fault_trials`.

- A test that takes `trials` records each of its trials itself.
- A test marked `promise(row, "fault in words")` is one trial for every set of its parameters: recorded when it ends, and
  not run again on a commit on which it passed.

`-m "faults or promise"` is the full form. A test that is marked `promise` alone is as long in both forms."""

from __future__ import annotations

from collections.abc import Generator

import fault_table
import pytest
from fault_trials import Record, Trials, commit, folder

_problems = pytest.StashKey[list[str]]()
_seconds = pytest.StashKey[float]()


class Recorder:
    """What one session records."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.before: list[pytest.Item] = []
        """Tests that passed on this commit in an earlier session."""
        self._record: Record | None = None

    @property
    def record(self) -> Record:
        if self._record is None:
            self._record = Record(folder() / f"{commit()}.jsonl")
        return self._record

    def records(self, item: pytest.Item) -> bool:
        """Whether the item is a trial by itself, to be recorded."""
        marked = item.get_closest_marker("promise") is not None
        return marked and not _takes_trials(item) and (self.full or item.get_closest_marker("faults") is not None)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """After the choice by marks: what is left is to run, but for what passed already."""
        for item in items:
            if item.get_closest_marker("faults") and not _takes_trials(item) and not item.get_closest_marker("promise"):
                raise pytest.UsageError(
                    f"{item.nodeid}: its result would be in no table; take the fixture `trials`, or mark it"
                    ' @pytest.mark.promise(row, "fault in words")'
                )
        self.before = [item for item in items if self.records(item) and _trial(item) in self.record.passed(*_row(item))]
        if self.before:
            config.hook.pytest_deselected(items=self.before)
            items[:] = [item for item in items if item not in self.before]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        problems = item.stash.setdefault(_problems, [])
        item.stash[_seconds] = item.stash.get(_seconds, 0.0) + report.duration
        if not report.passed:  # a skipped one too: it shows nothing
            problems.append(f"{report.when}: {report.longreprtext[-2000:]}")
        if report.when == "teardown" and self.records(item):
            problem = "\n".join(problems) or None
            self.record.note(*_row(item), _trial(item), problem, item.stash[_seconds], item.nodeid)
        return report

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._record is not None and self.record.lines():
            terminalreporter.section("faults")
            if self.before:
                terminalreporter.write_line(f"{len(self.before)} tests passed on this commit before, and were not run")
            terminalreporter.write_line(f"{self.record.path}\n\n{fault_table.table(self.record.lines())}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder("promise" in config.option.markexpr), "fault-recorder")


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    """Runs and, in the full form, records the trials of this test."""
    recorder = request.config.pluginmanager.get_plugin("fault-recorder")
    full = request.node.get_closest_marker("faults") is not None
    return Trials(recorder.record if full else None, request.node.nodeid)


def _takes_trials(item: pytest.Item) -> bool:
    return "trials" in getattr(item, "fixturenames", ())


def _row(item: pytest.Item) -> tuple[int, str]:
    marker = item.get_closest_marker("promise")
    assert marker is not None
    row, fault = marker.args
    return row, fault


def _trial(item: pytest.Item) -> str:
    """Unique among the tests of all files."""
    return item.nodeid
