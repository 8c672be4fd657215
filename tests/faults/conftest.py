"""Fixtures of the fault tests, and what is said at their end."""

from __future__ import annotations

from pathlib import Path

import fault_trials
import pytest
import scripted_run

_recorded: list[Path] = []


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> fault_trials.Trials:
    """Runs and, in the full form, records the trials of this test."""
    record = None
    if request.node.get_closest_marker("faults"):
        record = fault_trials.folder() / f"{fault_trials.commit()}.jsonl"
        record.parent.mkdir(parents=True, exist_ok=True)
        _recorded.append(record)
    return fault_trials.Trials(record, request.node.nodeid)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with models and prompts, and no run yet."""
    return scripted_run.prepare_root(tmp_path_factory.mktemp("template") / "store")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _recorded:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{_recorded[-1]}\n\n{fault_trials.table(fault_trials.read(_recorded[-1]))}")
