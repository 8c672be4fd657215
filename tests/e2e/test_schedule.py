"""Three rounds with real engines on a real server, by flow runs every 20 seconds: `opd schedule`, and a worker of a work pool.
One round outlasts several flow runs, one is cancelled from the API and retried, one is killed. The rounds are consecutive, none
is doubled, and the students are those of `opd run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opd_cli import OPD, opd
from places import TINY
from shared_prefect import ask, eventually, running

from storage.query.catalog import Catalog
from storage.runs import Run
from storage.store import Store

PATIENCE = 1500.0
"""Seconds for a round with all that goes before it, on a busy machine."""
LAST = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


class Story:
    """What happens to the flow runs of one deployment. `deployment`: Prefect's filter of its name."""

    def __init__(self, api_url: str, deployment: dict[str, Any], root: Path, alive: Callable[[], bool]) -> None:
        self.api_url, self.deployment, self.root, self.alive = api_url, deployment, root, alive
        self.retried = self.killed = ""

    def all(self) -> list[dict[str, Any]]:
        """Also those that are still to come."""
        found: list[dict[str, Any]] = ask(
            self.api_url, "flow_runs/filter", {"deployments": {"name": self.deployment}, "limit": 200}
        )
        return found

    def flow_runs(self, *states: str) -> list[dict[str, Any]]:
        """By their start, those in one of the states; not those that are still to come."""
        begun = [run for run in self.all() if run["state_type"] not in ("SCHEDULED", "PENDING")]
        chosen = [run for run in begun if not states or run["state_type"] in states]
        return sorted(chosen, key=lambda run: run["start_time"] or "")

    def under_way(self) -> list[dict[str, Any]]:
        """Those that the worker or the schedule has taken, and that have not ended."""
        return [run for run in self.all() if run["state_type"] in ("PENDING", "RUNNING", "CANCELLING")]

    def state_of(self, flow_run: str) -> dict[str, Any]:
        return next(run for run in self.flow_runs() if run["id"] == flow_run)["state"]

    def until(self, what: Callable[[], Any]) -> Any:
        """What `what()` returns, once it is true; the driver lives as long."""

        def look() -> Any:
            assert self.alive(), "the driver has ended"
            return what()

        return eventually(look, PATIENCE)

    def working(self, round: int) -> int:
        """The process that makes a round, once a stage of the round is under way."""

        def look() -> int | None:
            run = next((run for run in Run.list(self.root) if run.name == "base"), None)
            holder = None if run is None else run.holder_info()
            if run is None or holder is None:
                return None
            stages = {r.round: r.stages for r in run.state.rounds}.get(round, {})
            return holder.pid if any(stage.state == "running" for stage in stages.values()) else None

        return self.until(look)

    def play(self) -> None:
        self.working(1)
        skipped = lambda: [run for run in self.flow_runs() if over(run)]  # noqa: E731
        self.until(skipped)  # while round 1 is under way

        self.working(2)
        before = len(skipped())
        self.until(
            lambda: len(skipped()) > before
        )  # one has just been skipped, so that the retry comes before the next
        pid = self.working(2)
        at_work = next(run for run in self.flow_runs("RUNNING") if run["state_name"] == "Running")
        self.retried = at_work["id"]
        self.set_state(self.retried, {"type": "CANCELLING"})
        self.until(lambda: self.state_of(self.retried)["type"] == "CANCELLED")
        assert not Path(f"/proc/{pid}").exists()
        self.set_state(self.retried, {"type": "SCHEDULED", "name": "AwaitingRetry"})

        os.kill(self.working(3), signal.SIGKILL)
        crashed = self.until(lambda: self.flow_runs("CRASHED"))
        self.killed = crashed[-1]["id"]

    def set_state(self, flow_run: str, state: dict[str, str]) -> None:
        ask(self.api_url, f"flow_runs/{flow_run}/set_state", {"state": state, "force": True})

    def told(self) -> str:
        """The flow runs that began, for the record."""
        lines = []
        for run in self.flow_runs():
            which = {self.retried: " (cancelled, then retried)", self.killed: " (killed)"}.get(run["id"], "")
            lines.append(
                f"{(run['start_time'] or '')[11:19]} {(run['end_time'] or '')[11:19]} {run['state_name']}{which}:"
                f" {(run['state']['message'] or '').splitlines()[:1]}"
            )
        return "\n".join(lines)

    def ends_well(self, finished: Any) -> None:
        """Of `finished`, the run that was not disturbed, it has rounds, keys, students, and rows."""
        print(self.told())
        status = json.loads(opd("status", "base", "--json", root=self.root).stdout)
        assert status["status"] == "finished"
        assert [r["round"] for r in status["rounds"]] == [0, 1, 2, 3]
        for ours, other in zip(status["rounds"], finished.status["rounds"], strict=True):
            assert ours["student_sha256"] == other["student_sha256"]
            keys = [{label: stage["artifacts"] for label, stage in r["stages"].items()} for r in (ours, other)]
            assert keys[0] == keys[1]
        catalog = Catalog(Store(self.root), Run.open(self.root, "base"))
        sql = "SELECT round, count(*), count(DISTINCT step), min(step), max(step) FROM training_steps WHERE stage = 'train'"
        steps = [tuple(row.values()) for row in catalog.query(f"{sql} GROUP BY 1 ORDER BY 1").to_pylist()]
        assert [row[0] for row in steps] == [1, 2, 3]
        assert all(count == distinct for _, count, distinct, _, _ in steps)
        assert all(end + 1 == start for (*_, end), (*_, start, _) in pairwise(steps))

        assert self.state_of(self.killed)["type"] == "CRASHED"
        assert self.state_of(self.retried)["type"] in ("COMPLETED", "CANCELLED")  # CANCELLED: another came before it
        worked = [run for run in self.flow_runs("COMPLETED") if not over(run) and run["id"] != self.retried]
        spans = [(run["start_time"], run["end_time"]) for run in worked]
        assert spans and all(end <= start for (_, end), (start, _) in pairwise(spans)), "two worked at once"
        assert self.flow_runs("RUNNING", "CANCELLING") == []


def over(run: dict[str, Any]) -> bool:
    """Whether another was at work when its time came."""
    return run["state_name"] == "Skipped" or (
        run["state_type"] == "CANCELLED" and "concurrency" in run["state"]["message"].lower()
    )


def test_ticks_of_opd_schedule(finished: Any, prepared_root: Any, shared_server: Any) -> None:
    root = prepared_root()
    command = [OPD, "schedule", TINY, "--name", "base", "--every", "20s", "--rounds", "1", "--root", root]
    with running(command, root.parent, {"PREFECT_API_URL": shared_server.api_url}) as schedule:
        story = Story(shared_server.api_url, {"like_": "base-"}, root, lambda: schedule.poll() is None)
        story.play()
        assert schedule.wait(PATIENCE) == 0
    story.ends_well(finished)


def test_flow_runs_of_a_process_worker(finished: Any, prepared_root: Any, shared_server: Any) -> None:
    root, url = prepared_root(), shared_server.api_url
    made = [OPD, "deploy", TINY, "--name", "base", "--pool", "real", "--create-pool", "--every", "20s"]
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OPD_"))} | {"PREFECT_API_URL": url}
    put = subprocess.run(
        list(map(str, [*made, "--rounds", "1", "--root", root])),
        env=own,
        cwd=root.parent,
        capture_output=True,
        text=True,
    )
    assert put.returncode == 0, put.stdout + put.stderr
    command = [Path(sys.executable).parent / "prefect", "worker", "start", "--pool", "real", "--name", "one"]
    more = {
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(root.parent / "home"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    with running(command, root.parent, more) as worker:
        story = Story(url, {"any_": ["base"]}, root, lambda: worker.poll() is None)
        story.play()
        story.until(lambda: any(run["state_name"] == "Finished" for run in story.flow_runs("COMPLETED")))
        story.until(lambda: not story.under_way())  # one may have been given to the worker meanwhile
    story.ends_well(finished)
