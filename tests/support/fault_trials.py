"""Trials of the fault tests: how many there are, and which are done already.

A test runs its trials through `Trials`. In the short form (`make test`) they simply run. In the full form (`make faults`)
each result is put on record (`fault_record`) as soon as it is there; a trial that passed on this commit is not run again, so
that a run can be stopped and continued. A failed one is tried again, but its failure stays on record. Tests that are one
trial by themselves are recorded by `fault_recorder`; `fault_table` makes the table of docs/reliability.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_record import Record

FULL_SECONDS = 12 * 3600


def both_forms(short: int, full: int) -> pytest.MarkDecorator:
    """Parametrises `count`: the number of trials in `make test` and in `make faults`."""
    marks = (pytest.mark.faults, pytest.mark.timeout(FULL_SECONDS))
    return pytest.mark.parametrize(
        "count", [pytest.param(short, id="short"), pytest.param(full, id="full", marks=marks)]
    )


class TrialsFailed(AssertionError):
    """Trials failed, and each is on record."""


class Trials:
    """Runs trials of one test. `record` holds the results; None in the short form."""

    def __init__(self, record: Record | None, test: str) -> None:
        self.record, self.test = record, test
        self.made = 0
        """How many trials there were to make so far, those that passed before too."""

    def __call__(
        self, row: int, fault: str, names: Iterable[str], attempt: Callable[[str], object], parallel: int = 1
    ) -> None:
        """Runs `attempt(name)` for every trial that has not passed yet; TrialsFailed at the end if any failed.

        `row` is that of the table of promises, `fault` what is done to the system, in words. Whatever a trial raises is its
        failure, a skip and what pytest raises by itself too; only Ctrl-C and pytest.exit stop the others."""
        names = list(names)
        assert names and len(set(names)) == len(names), f"the trials need names of their own: {names}"
        self.made += len(names)
        done: set[str] = set()
        if self.record is not None:
            self.record.plan(row, fault, len(names), self.test)
            done = self.record.passed(row, fault, self.test)
        failures: list[str] = []
        busy: dict[str, float] = {}

        def note(name: str, started: float, problem: str | None) -> None:
            if problem is not None:
                failures.append(f"{name}: {problem}")
            if self.record is not None:
                self.record.note(row, fault, name, problem, time.monotonic() - started, self.test)

        def one(name: str) -> None:
            busy[name] = started = time.monotonic()
            try:
                attempt(name)
            except (KeyboardInterrupt, pytest.exit.Exception):
                raise
            except BaseException as error:  # pytest.fail and pytest.skip raise no Exception
                notes = getattr(error, "__notes__", [])  # hypothesis has its story there
                note(name, started, "\n".join([f"{type(error).__name__}: {error}", *notes]))
                if self.record is None and isinstance(error, Exception):
                    raise  # for its traceback
            else:
                note(name, started, None)
            del busy[name]

        with ThreadPoolExecutor(parallel) as pool:
            running = [pool.submit(one, name) for name in names if name not in done]
            try:
                for future in running:
                    future.result()
            except BaseException as error:
                if isinstance(error, pytest.fail.Exception):  # the test's time is over
                    for name, started in list(busy.items()):
                        note(name, started, f"{type(error).__name__}: {error}")
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if failures:
            raise TrialsFailed(f"{len(failures)} trials failed:\n" + "\n".join(failures[:20]))
