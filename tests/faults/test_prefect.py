"""Prefect down, locked or deleted loses no work (row 14): the run ends as the undisturbed one does, soon, says in a line that
Prefect's record is incomplete, and leaves nothing behind; the next run reports again where that is possible."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fault_trials import Trials, both_forms
from prefect_faults import BEFORE, MID_RUN, Elsewhere, ReportedRun
from stopping import PATIENCE, by

LATE = 45.0
"""Seconds from the fault to the run's end, most of them Prefect's two chances to answer; a round takes one here."""
STAGES = ("shard.", "manifest.", "builder.", "tree.")
"""Failpoints that only stages meet, so that the session with Prefect has begun."""
SPOILT = ("spoilt", "no-folder", "no-database", "newer")
"""Faults that stay, until someone removes the folder."""


class Undisturbed:
    def __init__(self, template: Path, folder: Path, reported: Path) -> None:
        """`reported`: Prefect's folder with a database in use."""
        self.template, self.reported = template, reported
        run = self.run(folder / "plain")
        assert run.begin_and_end() == 0, run.output
        self.result, hits = run.result(), Counter(run.hits())
        self.moments = [
            f"{name}@{hit + 1}" for name in sorted(hits) if name.startswith(STAGES) for hit in range(hits[name])
        ]

    def run(self, folder: Path, reported: bool = False) -> LoggedRun:
        """`reported`: Prefect's database is there already."""
        run = LoggedRun.of(self.template, folder)
        run.write(None)
        if reported:
            shutil.copytree(self.reported, run.home)
        return run

    def moment(self, name: str) -> str:
        return random.Random(f"prefect {name}").choice(self.moments)


class LoggedRun(ReportedRun):
    def begin_and_end(self) -> int:
        """Without Prefect; writes down the failpoints that are met."""
        process = self.begin(OPD_FAILPOINTS_LOG=str(self.folder / "hits"))
        process.join(PATIENCE)
        return self.ended(process)


def ends(run: ReportedRun, process: Any, expected: dict[str, Any], patience: float = LATE) -> None:
    """The run finishes in time with what is expected; nothing is left, and nothing but the warning is said of Prefect."""
    process.join(patience)
    assert process.exitcode is not None, f"still there after {patience} s\n{run.output}"
    assert run.ended(process) == 0, run.output
    assert run.result() == expected
    assert run.leftovers() == []
    for noise in ("Traceback", "prefect._internal", "Error logging"):
        assert noise not in run.output, run.output


def said_once(run: ReportedRun, how: str) -> None:
    """One line that says how Prefect is missing, and that the run does without it."""
    (line,) = run.warnings()
    assert how in line and "without" in line, run.output


def reports_again(run: ReportedRun, expected: dict[str, Any]) -> None:
    """With its evaluations to make again: a run that has nothing to do does not ask for Prefect."""
    shutil.rmtree(run.root / "artifacts" / "evaluate")
    before = run.warnings()
    ends(run, run.begin(prefect=True), expected)
    assert run.warnings() == before


@pytest.fixture(scope="module")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Undisturbed:
    return Undisturbed(template, tmp_path_factory.mktemp("undisturbed"), migrated)


pytestmark = pytest.mark.usefixtures("no_prefect_of_the_users")


@both_forms(short=1, full=10)
def test_a_fault_in_mid_round_loses_nothing(
    undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int
) -> None:
    """In `make test` the server is killed, at one moment."""
    full = count > 1

    def attempt(name: str) -> None:
        fault = name.split()[0]
        run = undisturbed.run(tmp_path / name.replace(" ", "-"), reported=True)
        process = run.begin_until(undisturbed.moment(name))
        with MID_RUN[fault](run):
            run.go_on()
            ends(run, process, undisturbed.result)
        said_once(run, "its record is incomplete")
        if full and fault not in SPOILT:
            reports_again(run, undisturbed.result)
        run.remove()

    for fault in MID_RUN if full else ("killed",):
        names = [f"{fault} {number}" for number in range(count)]
        trials(14, f"Prefect's server or database is {fault} in mid-round", names, attempt)


@both_forms(short=1, full=3)
def test_a_prefect_that_cannot_be_used_from_the_start_loses_nothing(
    undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int
) -> None:
    full = count > 1

    def attempt(name: str) -> None:
        fault = name.split()[0]
        run = undisturbed.run(tmp_path / name.replace(" ", "-"), reported=full)
        with BEFORE[fault](run):
            ends(run, run.begin(prefect=True), undisturbed.result)
        said_once(run, "no record of this run")
        assert str(run.home) in run.output
        run.remove()

    for fault in BEFORE if full else ("no-folder",):
        names = [f"{fault} {number}" for number in range(count)]
        trials(14, f"Prefect's database before the run: {fault}", names, attempt)


URLS = ("http://127.0.0.1:9/api", "http://name-that-nobody-has.invalid/api", "127.0.0.1:9/api", "file:///etc/passwd")


@both_forms(short=1, full=len(URLS))
def test_an_api_that_cannot_be_reached_loses_nothing(
    undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int
) -> None:
    def attempt(name: str) -> None:
        run = undisturbed.run(tmp_path / str(URLS.index(name)))
        ends(run, run.begin(prefect=True, PREFECT_API_URL=name), undisturbed.result)
        said_once(run, f"PREFECT_API_URL={name}")
        run.remove()

    trials(14, "PREFECT_API_URL leads nowhere", URLS[:count], attempt)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_server_elsewhere_that_fails_loses_nothing(undisturbed: Undisturbed, trials: Trials, tmp_path: Path) -> None:
    def attempt(name: str) -> None:
        how = name.split()[0]
        elsewhere = Elsewhere(tmp_path / f"elsewhere-{name.replace(' ', '-')}")
        try:
            run = undisturbed.run(tmp_path / name.replace(" ", "-"))
            process = run.begin_until(undisturbed.moment(name), PREFECT_API_URL=elsewhere.url)
            assert run.servers() == []
            elsewhere.signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            run.go_on()
            ends(run, process, undisturbed.result)
            said_once(run, "its record is incomplete")
        finally:
            elsewhere.end()
        run.remove()

    names = [f"{how} {number}" for number in range(5) for how in ("killed", "frozen")]
    trials(14, "a server at PREFECT_API_URL is killed or frozen in mid-round", names, attempt)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_run_is_stopped_in_time_without_prefects_help(
    undisturbed: Undisturbed, trials: Trials, tmp_path: Path
) -> None:
    """Within the ten seconds of row 10, though the server does not answer."""

    def attempt(name: str) -> None:
        fault = name.split()[0]
        run = undisturbed.run(tmp_path / name.replace(" ", "-"), reported=True)
        process = run.begin_until(undisturbed.moment(name))
        with MID_RUN[fault](run):
            by(signal.SIGTERM)(run, process, [])
            assert run.ended(process) == 130, run.output
        assert "opd resume" in run.output and run.leftovers() == []
        assert run.resumed() == undisturbed.result
        run.remove()

    names = [f"{fault} {number}" for number in range(4) for fault in ("killed", "frozen", "locked")]
    trials(14, "the same, and the run is stopped by SIGTERM", names, attempt)
