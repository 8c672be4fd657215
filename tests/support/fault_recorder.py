"""A pytest plugin: every test of `make faults` ends up in the record of `fault_record`.

- A test that takes `trials` records each of its trials itself; what goes wrong outside of them is recorded here.
- A test marked `promise(row, "fault in words")` is one trial for every set of its parameters: recorded when it ends, and
  not run again on a commit on which it passed.

`-m "faults or promise"` is the full form. A test that is marked `promise` alone is as long in both forms. The session ends
with an error when the code is not that of the record any more."""

from __future__ import annotations

import signal
from collections.abc import Generator

import fault_table
import pytest
from fault_record import Record, commit, folder
from fault_trials import Trials, TrialsFailed

_problems = pytest.StashKey[list[str]]()
_seconds = pytest.StashKey[float]()
_failed = pytest.StashKey[bool]()
_trials = pytest.StashKey[Trials]()
STOPS = (signal.SIGTERM, signal.SIGHUP)


class Recorder:
    """What one session records."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.before: list[pytest.Item] = []
        """Tests that passed on this commit in an earlier session."""
        self.commit = ""
        self._record: Record | None = None

    @property
    def record(self) -> Record:
        if self._record is None:
            self.commit = commit()
            self._record = Record(folder() / f"{self.commit}.jsonl")
        return self._record

    def records(self, item: pytest.Item) -> bool:
        """Whether the item is a trial by itself, to be recorded."""
        marked = item.get_closest_marker("promise") is not None
        return marked and not _takes_trials(item) and (self.full or item.get_closest_marker("faults") is not None)

    def watches(self, item: pytest.Item) -> bool:
        """Whether the item, or each of its trials, is to be recorded."""
        return self.records(item) or (_takes_trials(item) and item.get_closest_marker("faults") is not None)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.full and not session.config.option.collectonly:
            _ = self.record  # before the code is imported: it must be this commit's

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """After the choice by marks: what is left is to run, but for what passed already."""
        for item in items:
            marks = {name: item.get_closest_marker(name) is not None for name in ("faults", "promise")}
            if marks["faults"] and not _takes_trials(item) and not marks["promise"]:
                raise pytest.UsageError(
                    f"{item.nodeid}: its result would be in no table; take the fixture `trials`, or mark it"
                    ' @pytest.mark.promise(row, "fault in words")'
                )
            if marks["promise"] and _takes_trials(item):
                raise pytest.UsageError(f"{item.nodeid}: its trials name their rows; remove @pytest.mark.promise")
        if config.option.collectonly or not any(map(self.watches, items)):
            return
        self.record.note_deaths()
        passed = {line["test"] for line in self.record.lines() if line["ok"] and line["trial"] == line["test"]}
        self.before = [item for item in items if self.records(item) and item.nodeid in passed]
        if self.before:
            config.hook.pytest_deselected(items=self.before)
            items[:] = [item for item in items if item not in self.before]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """SIGTERM and SIGHUP stop a session that records as Ctrl-C does: the test at hand has not failed."""
        mine = [number for number in STOPS if signal.getsignal(number) is signal.SIG_DFL]
        if self._record is None:
            return (yield)
        for number in mine:
            signal.signal(number, signal.default_int_handler)
        try:
            return (yield)
        finally:
            for number in mine:
                signal.signal(number, signal.SIG_DFL)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if not self.watches(item):
            return (yield)
        self.record.begin(item.nodeid, *(_row(item) if self.records(item) else ()))
        self._check_code(item)
        try:
            result = yield
        except (KeyboardInterrupt, pytest.exit.Exception):
            self.record.end(item.nodeid, "stopped")
            raise
        except BaseException as error:  # of pytest, or of a plugin
            self._note(item, f"{type(error).__name__}: {error}")
            raise
        self._check_code(item)
        self._note(item, "\n".join(item.stash.get(_problems, [])) or None)
        return result

    def _note(self, item: pytest.Item, problem: str | None) -> None:
        """The test's end, its result where it is a trial, and what went wrong outside of its trials."""
        seconds = item.stash.get(_seconds, 0.0)
        if self.records(item):
            self.record.note(*_row(item), item.nodeid, problem, seconds, item.nodeid)
        else:
            trials, failed = item.stash.get(_trials, None), item.stash.get(_failed, False)
            if problem is None and not failed and (trials is None or not trials.made):
                problem = "it made no trial"
            if problem is not None:
                self.record.note(*self.record.outside(item.nodeid), item.nodeid, problem, seconds, item.nodeid)
        failed = problem is not None or item.stash.get(_failed, False)
        self.record.end(item.nodeid, "failed" if failed else "passed")

    def _check_code(self, item: pytest.Item) -> None:
        if (now := commit()) == self.commit:
            return
        if problems := item.stash.get(_problems, []):
            self._note(item, "\n".join(problems))
        self.record.end(item.nodeid, "changed")
        pytest.exit(
            f"the code changed while the faults ran: it was {self.commit}, it is {now} ({item.nodeid} was the test at"
            " hand, and what passed in it does not count); undo the change to go on, or begin anew with the present code",
            returncode=pytest.ExitCode.INTERNAL_ERROR,
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        item.stash[_seconds] = item.stash.get(_seconds, 0.0) + report.duration
        if not report.passed:  # a skipped one too: it shows nothing
            item.stash[_failed] = True
            if call.excinfo is None or not isinstance(call.excinfo.value, TrialsFailed):
                item.stash.setdefault(_problems, []).append(f"{report.when}: {report.longreprtext[-2000:]}")
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
    request.node.stash[_trials] = Trials(recorder.record if full else None, request.node.nodeid)
    return request.node.stash[_trials]


def _takes_trials(item: pytest.Item) -> bool:
    return "trials" in getattr(item, "fixturenames", ())


def _row(item: pytest.Item) -> tuple[int, str]:
    marker = item.get_closest_marker("promise")
    assert marker is not None
    row, fault = marker.args
    return row, fault
