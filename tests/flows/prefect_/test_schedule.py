"""Schedules on a real server, with scripted engines: ticks skip, try again, end, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from between import between
from cancelling import cancel_a_tick
from opd_cli import OPD
from places import CHECKOUT, PLUGINS
from scripted_run import EXPERIMENT, prepare_root
from shared_prefect import Api, ask, eventually

from flows.prefect_ import schedule
from flows.prefect_.schedule import serve, tick
from flows.prefect_.server import ServerUnavailable, StoreServer
from storage.disk import locks
from storage.errors import RunBusy
from storage.runs import Run

PATHS = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support"), str(PLUGINS)])


@pytest.fixture
def server(by_url: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A server as PREFECT_API_URL; ticks find the plugins."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_API_URL", by_url.api_url)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.syspath_prepend(PLUGINS)  # a tick's process gets the path of the one that serves it
    yield by_url


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return prepare_root(tmp_path / "store")


def write(root: Path, rounds: int) -> str:
    config = root.parent / "config.yaml"
    config.write_text(json.dumps(EXPERIMENT | {"plugins": ["scripted_ticks"], "policy": {"rounds": rounds}}))
    return str(config)


def every(seconds: float):
    from prefect.schedules import Interval

    return Interval(timedelta(seconds=seconds), anchor_date=datetime.now(UTC) + timedelta(seconds=seconds))


def go(name: str, root: Path, rounds: int, seconds: float = 3.0) -> tuple[int, list[str]]:
    lines: list[str] = []
    return serve(name, write(root, rounds), root, every(seconds), 1, [], lines.append), lines


def ticks(server: Api, name: str) -> list[dict]:
    found = ask(server.api_url, "flow_runs/filter", {"deployments": {"name": {"like_": f"{name}-"}}, "limit": 200})
    return [run for run in found if run["state_type"] != "SCHEDULED"]


def processes_of_ticks(schedule: int) -> list[psutil.Process]:
    alive = [p for p in psutil.Process(schedule).children() if p.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if "spawn_main" in "".join(process.cmdline())]


def test_ticks_run_consecutive_rounds_skip_what_overlaps_try_again_and_end(server: Api, root: Path) -> None:
    (root / "fail").touch()
    (root / "slow").write_text("6")  # for the tick after the one that fails
    code, lines = go("nightly", root, 2)
    assert code == 0
    state = Run.open(root, "nightly").state
    assert state.status == "finished" and [r.round for r in state.rounds] == [0, 1, 2]
    text = "\n".join(lines)
    assert "the sampler fails once" in text and "the next tick tries again" in text
    assert "nightly: at round 1 after" in text and "at round 2" in lines[-1]
    found = ticks(server, "nightly")
    states = [run["state_name"] for run in found]
    assert (states.count("Completed"), states.count("Failed")) == (1, 1)
    assert "Cancelled" in states  # while round 1 was busy
    assert set(states) == {"Completed", "Failed", "Cancelled", "Finished"}
    own = ask(server.api_url, "flow_runs/filter", {"flow_runs": {"name": {"any_": ["nightly"]}}})
    assert len(own) >= 3 and all(run["parent_task_run_id"] for run in own)  # the run's flow, under each tick's


def test_a_tick_is_skipped_while_another_process_holds_the_run(server: Api, root: Path) -> None:
    config = root.parent / "held.yaml"
    config.write_text(json.dumps(EXPERIMENT | {"plugins": []}))
    from flows.experiment import load_experiment
    from flows.run.runner import open_run

    run = open_run(load_experiment(config, []), "held", root)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with run.lock():
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(10)
        state = tick(str(config), "held", str(root), 1, [])
    finally:
        release.set()
        holder.join()
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert "tick skipped" in state.message and f"pid {os.getpid()}" in state.message


def test_an_error_that_no_tick_cures_ends_the_schedule_with_its_code(server: Api, root: Path) -> None:
    config = Path(write(root, 1))
    lines: list[str] = []
    config.write_text(config.read_text().replace('"samples_per_step": 4', '"samples_per_step": 3'))
    assert serve("bad", str(config), root, every(3), 1, [], lines.append) == 2
    assert "train.samples_per_step" in lines[-1] and "the schedule ends here" in lines[-1]
    assert {run["state_name"] for run in ticks(server, "bad") if run["state_type"] == "FAILED"} == {"Refused"}


@pytest.mark.parametrize("moment", ["aadd_flow", "start"])
def test_ctrl_c_before_the_first_tick_ends_in_order(
    server: Api, root: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(f"prefect.runner.Runner.{moment}", interrupted)
    lines: list[str] = []
    assert serve("early", write(root, 1), root, every(60), 1, [], lines.append) == 130
    assert "opd resume early" in lines[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_a_schedule_ends_its_tick_and_another_goes_on(server: Api, root: Path, number: int) -> None:
    name = f"ended-{number:d}"
    (root / "slow").write_text("300")
    command = [OPD, "schedule", write(root, 1), "--name", name, "--every", "3s", "--root", root]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        eventually(lambda: (root / "is-slow").exists() or process.poll() is not None, 120)
        holder = Run.open(root, name).holder_info()
        assert holder is not None and holder.pid != process.pid
        with pytest.raises(RunBusy, match=f"pid {process.pid}"):
            go(name, root, 1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), output
    if number == signal.SIGTERM:
        assert f"opd resume {name}" in output
    eventually(lambda: not Path(f"/proc/{holder.pid}").exists())
    assert Run.open(root, name).holder() is None
    assert go(name, root, 1)[0] == 0  # nothing that was left behind holds the only slot
    assert Run.open(root, name).state.status == "finished"
    left = [run["state_type"] for run in ticks(server, name) if run["state_type"] in ("RUNNING", "PENDING")]
    assert left == []


@pytest.mark.parametrize("fault", ["cut", pytest.param("hold", marks=pytest.mark.slow)])
def test_a_schedule_outlives_a_server_that_is_away_and_its_tick_goes_on(
    server: Api, root: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """With one retry of Prefect's client, so that its runner gives up in seconds."""
    monkeypatch.setattr(schedule, "WAITS", (1.0, 2.0))
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "1")
    if fault == "hold":
        monkeypatch.setenv("PREFECT_API_REQUEST_TIMEOUT", "6")
    name, lines, config = f"away-{fault}", list[str](), write(root, 2)
    (root / "slow").write_text("25" if fault == "cut" else "90")
    with between(server.api_url) as relay:
        monkeypatch.setenv("PREFECT_API_URL", relay.url)

        def away() -> None:
            eventually(lambda: (root / "is-slow").exists(), 300)
            getattr(relay, fault)()
            eventually(lambda: any("the tick under way goes on" in line for line in lines), 300)
            getattr(relay, {"cut": "restore", "hold": "release"}[fault])()

        trouble = threading.Thread(target=away)
        trouble.start()
        assert serve(name, config, root, every(3), 1, [], lines.append) == 0
        trouble.join()
    text = "\n".join(lines)
    assert "Prefect's runner ended after failed requests: the server does not answer" in text
    assert "; trying again in 1 s" in text and "Traceback" not in text
    state = Run.open(root, name).state
    assert state.status == "finished" and [r.round for r in state.rounds] == [0, 1, 2]
    assert state.rounds[1].stages["rollout"].seconds >= 20  # the tick that lost its server made it
    left = [run for run in ticks(server, name) if run["state_type"] in ("RUNNING", "PENDING")]
    assert left == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_prefect_of_the_users")
def test_a_schedule_starts_its_own_server_again(root: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "WAITS", (1.0, 2.0))
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.syspath_prepend(PLUGINS)
    shutil.copytree(migrated, root / "prefect")
    lines = list[str]()
    (root / "slow").write_text("20")

    def kill() -> None:
        eventually(lambda: (root / "is-slow").exists(), 120)
        holder = locks.holder(root / "prefect" / "server.lock")
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)

    trouble = threading.Thread(target=kill)
    trouble.start()
    assert serve("own", write(root, 2), root, every(3), 1, [], lines.append) == 0
    trouble.join()
    assert [r.round for r in Run.open(root, "own").state.rounds] == [0, 1, 2]
    assert sum(line == "starting the Prefect server" for line in lines) == 2, lines
    assert locks.holder(root / "prefect" / "server.lock") is None


def lost(contact: schedule.Contact, seconds: float | None, now: list[float]) -> int:
    """An attempt that works for so many seconds, and then loses the server."""
    contact.began = now[0]
    if seconds is not None:
        now[0] += seconds
        contact.heard = now[0]
    now[0] += 1
    raise ServerUnavailable("it is gone")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """The time, and the waits."""
    now, waits = [1000.0], list[float]()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(schedule.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(schedule.time, "sleep", sleep)
    return now, waits


def test_the_waits_for_a_lost_server_double_up_to_a_limit_and_end(clock: tuple[list[float], list[float]]) -> None:
    now, waits = clock
    works, lines = iter([30.0]), list[str]()
    with pytest.raises(ServerUnavailable, match=r"it is gone; away for 6 h"):
        schedule._until_over(lambda contact: lost(contact, next(works, None), now), "n", lines.append)
    assert waits[:8] == [5, 10, 20, 40, 80, 160, 300, 300] and set(waits[8:]) == {300.0}
    assert lines[0] == "n: it is gone; trying again in 5 s" and len(lines) == len(waits)


def test_a_server_that_comes_and_goes_does_not_begin_the_waits_again(clock: tuple[list[float], list[float]]) -> None:
    now, waits = clock
    works = iter([10.0, 10.0, 10.0, 100.0])
    attempts = lambda contact: lost(contact, found, now) if (found := next(works, None)) is not None else 0  # noqa: E731
    assert schedule._until_over(attempts, "n", lambda line: None) == 0
    assert waits == [5, 10, 20, 5]


def test_a_server_that_was_never_there_is_not_waited_for(clock: tuple[list[float], list[float]]) -> None:
    now, waits = clock
    with pytest.raises(ServerUnavailable):
        schedule._until_over(lambda contact: lost(contact, None, now), "n", print)
    assert waits == []


def test_a_failed_tick_that_is_retried_in_prefect_goes_on_from_the_store(server: Api, root: Path) -> None:
    """By hand, as the button of Prefect's pages does it; and `opd run` by hand beside the schedule."""
    (root / "fail").touch()
    command = [OPD, "schedule", write(root, 2), "--name", "retried", "--every", "1h", "--root", root]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        failed = lambda: [run for run in ticks(server, "retried") if run["state_type"] == "FAILED"]  # noqa: E731
        (run,) = eventually(lambda: failed() or process.poll() is not None, 120)
        eventually(lambda: not processes_of_ticks(process.pid))
        time.sleep(3)  # the runner calls a tick crashed that ends with an error, unless it is in its last state
        retry = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
        ask(server.api_url, f"flow_runs/{run['id']}/set_state", retry)
        first = lambda: [r for r in ticks(server, "retried") if r["id"] == run["id"] and r["state_name"] == "Completed"]  # noqa: E731
        eventually(lambda: first() or process.poll() is not None, 120)
        assert [r.round for r in Run.open(root, "retried").state.rounds] == [0, 1]
        by_hand = [OPD, "run", root.parent / "config.yaml", "--name", "retried", "--root", root]
        done = subprocess.run(list(map(str, by_hand)), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert Run.open(root, "retried").state.status == "finished"


def test_a_tick_cancelled_in_prefect_leaves_nothing_behind(shared_server: StoreServer, tmp_path: Path) -> None:
    cancel_a_tick(tmp_path, shared_server.api_url, "trainer").remove()
