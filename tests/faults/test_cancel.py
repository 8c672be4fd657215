"""Cancelled in Prefect (row 10): the tick of a schedule ends with everything that its workers have started."""

from __future__ import annotations

from pathlib import Path

import pytest
from cancelling import cancel_a_tick
from fault_trials import Trials

from flows.prefect_.server import StoreServer


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_tick_cancelled_in_prefect_leaves_nothing_behind(
    trials: Trials, tmp_path: Path, shared_server: StoreServer, no_prefect_of_the_users: None
) -> None:
    students = set()

    def attempt(name: str) -> None:
        run = cancel_a_tick(tmp_path / name.replace(" ", "-"), shared_server.api_url, name.split()[0])
        students.add(tuple(run.resumed()["students"].items()))
        run.remove()

    names = [f"{role} {number}" for number in range(4) for role in ("sampler", "scorer", "trainer")]
    trials(10, "a scheduled run cancelled by Prefect's API, with grandchildren", names, attempt)
    assert len(students) <= 1
