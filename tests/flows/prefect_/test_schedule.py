"""Prefect around a run: outcomes are the functions' own, whatever Prefect does; schedules skip, end and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import timedelta
from pathlib import Path

import pytest
from cancelling import cancel_a_tick
from places import CHECKOUT
from schedule_stub import events

from flows.prefect_.schedule import Schedule, local_timezone, parse_every, serve, tick
from flows.prefect_.server import EmbeddedServer
from flows.prefect_.session import current_session, prefect_session
from flows.prefect_.tasks import run_as_flow, run_stage_task, show_table
from storage.errors import ConfigError, InputError, RunBusy
from storage.runs import Run
from tasks.workers.pool import WorkerDied, WorkerFailed


class Odd(Exception):
    """Cannot be rebuilt from its args, so nothing that copies exceptions gets it right."""

    def __init__(self, first, second):
        super().__init__("one text")
        self.second = second


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store's root whose name has what URLs and paths trip over."""
    return tmp_path_factory.mktemp("a store") / "root #1"


@pytest.fixture(scope="module")
def session(root):
    """One server for the tests of this file; started as a user's first run starts it."""
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PREFECT_")}
    os.environ["PREFECT_PROFILE"] = "one-that-does-not-exist"  # a user's own setting must not reach the store's server
    lines: list[str] = []
    with prefect_session(root, warn=lines.append) as open_session:
        assert open_session.active, lines
        yield open_session
    assert not EmbeddedServer(root).alive()
    assert os.environ.pop("PREFECT_PROFILE") == "one-that-does-not-exist"
    assert "PREFECT_API_URL" not in os.environ
    os.environ.update(saved)


def runs(session, kind, **body):
    """Task or flow runs as the server knows them (task states arrive a moment later), newest first."""
    request = urllib.request.Request(
        f"{session.api_url}/{kind}/filter",
        json.dumps({"sort": "EXPECTED_START_TIME_DESC", **body}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def eventually(what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return result


# without a session


def test_importing_costs_no_prefect():
    script = "import sys, flows.prefect_.tasks, flows.prefect_.schedule; assert 'prefect' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)


def test_without_a_session_functions_are_called_and_only_dead_workers_are_tried_again(capsys):
    assert current_session() is None
    calls = []

    def fails(error, times):
        def function():
            calls.append(1)
            if len(calls) <= times:
                raise error
            return "made"

        return function

    assert run_stage_task("t", fails(WorkerDied("killed"), 2), retries=2, retry_delay_seconds=0) == "made"
    assert len(calls) == 3
    assert "killed" in capsys.readouterr().err
    for error, times, retries in [(WorkerDied("x"), 3, 2), (WorkerFailed("x"), 1, 2), (ValueError("x"), 1, 2)]:
        calls.clear()
        with pytest.raises(type(error)) as caught:
            run_stage_task("t", fails(error, times), retries=retries, retry_delay_seconds=0)
        assert caught.value is error
        assert len(calls) == times


@pytest.mark.parametrize(
    ("text", "seconds"), [("6h", 21600), ("30m", 1800), ("45s", 45), ("1d", 86400), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_durations(text, seconds):
    assert parse_every(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "6", "h", "6 hours", "0s", "-1h", "1w", "h6", "9999999h"])
def test_what_is_no_duration_is_refused_naming_it(text):
    with pytest.raises(ConfigError, match="--every"):
        parse_every(text)


def test_schedules_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="exactly one"):
        Schedule("c", "n", "r")
    with pytest.raises(ConfigError, match="exactly one"):
        Schedule("c", "n", "r", every=timedelta(hours=1), cron="0 2 * * *")
    with pytest.raises(InputError, match="--name"):
        Schedule("c", "../n", "r", cron="0 2 * * *")
    with pytest.raises(ConfigError, match="--rounds"):
        Schedule("c", "n", "r", cron="0 2 * * *", rounds=0)


def test_cron_means_this_machines_time(monkeypatch):
    monkeypatch.setenv("TZ", ":Europe/Berlin")
    assert local_timezone() == "Europe/Berlin"


def test_a_database_that_cannot_be_used_costs_a_warning_only(tmp_path):
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "prefect.db").write_bytes(b"this is no database" * 1000)
    lines: list[str] = []
    with prefect_session(tmp_path, warn=lines.append) as broken:
        assert not broken.active
        assert run_as_flow("f", lambda: run_stage_task("t", lambda: 7)) == 7
    text = "\n".join(lines)
    assert "without Prefect" in text
    assert str(tmp_path / "prefect") in text


def test_an_api_url_that_does_not_answer_costs_a_warning_only(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    lines: list[str] = []
    with prefect_session(tmp_path, warn=lines.append) as broken:
        assert not broken.active
        assert run_as_flow("f", lambda: 7) == 7
    assert "PREFECT_API_URL=http://127.0.0.1:9/api" in lines[0]
    assert not (tmp_path / "prefect" / "server.json").exists()


# inside one


def test_results_and_states(session):
    thing = object()

    def flow():
        assert run_stage_task("rollout · round {1}", lambda: thing, lambda result: result is thing) is thing
        assert run_stage_task("train · round {1}", lambda: thing, lambda result: False) is thing
        show_table("rounds", [{"round": 1, "accuracy": 0.5, "missing": None}])
        return thing

    assert run_as_flow("distill", flow, run_name="states") is thing
    assert session.active
    (flow_run,) = runs(session, "flow_runs", flow_runs={"name": {"any_": ["states"]}})
    assert flow_run["state_type"] == "COMPLETED"
    own = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
    eventually(lambda: {r["state_type"] for r in runs(session, "task_runs", **own)} == {"COMPLETED"})
    names = {r["name"]: r["state_name"] for r in runs(session, "task_runs", **own)}
    assert names == {"rollout · round {1}": "Cached", "train · round {1}": "Completed"}


@pytest.mark.parametrize("error", [Odd(1, 2), KeyboardInterrupt(), RunBusy("held", "pid 1"), SystemExit(3)])
def test_exceptions_come_out_as_themselves(session, error):
    def fail():
        raise error

    name = f"fails with {type(error).__name__}"
    with pytest.raises(type(error)) as caught:
        run_as_flow("distill", lambda: run_stage_task("train", fail), run_name=name)
    assert caught.value is error
    assert session.active  # the function's failure is not Prefect's
    (flow_run,) = runs(session, "flow_runs", flow_runs={"name": {"any_": [name]}})
    assert flow_run["state_type"] == ("FAILED" if isinstance(error, Exception) else "CRASHED")


def test_the_runs_own_sigterm_handler_holds_inside_a_flow(session):
    def interrupt(number, frame):
        raise KeyboardInterrupt("as Ctrl-C")

    def body():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt, match="as Ctrl-C"):
            run_as_flow("distill", lambda: run_stage_task("train", body))
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_command_uses_the_same_server_and_a_killed_one_leaves_it_to_the_first(session, root):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom flows.prefect_.server import EmbeddedServer\n"
        "print(EmbeddedServer(Path(sys.argv[1])).ensure(), flush=True)\nos.kill(os.getpid(), 9)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    result = subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=CHECKOUT, env=env, capture_output=True, text=True
    )
    assert result.returncode == -signal.SIGKILL
    assert result.stdout.strip() == session.api_url
    time.sleep(1.5)
    assert EmbeddedServer(root).alive()


# schedules; PREFECT_API_URL is the session's while it is open


def a_schedule(root, name, config, **options):
    path = root / f"{name}.json"
    path.write_text(json.dumps(config))
    stub = {"every": timedelta(seconds=3), "run_rounds": "schedule_stub:run_rounds"} | options
    return Schedule(str(path), name, str(root), **stub)


def stubs(root):
    """What ticks noted since the last call."""
    found = events(root)
    (root / "events.jsonl").unlink(missing_ok=True)
    return found


def test_ticks_run_consecutive_rounds_skip_what_overlaps_try_again_and_end(session, root):
    lines: list[str] = []
    config = {"rounds": 3, "seconds": [0, 8, 0], "fail": [1]}
    assert serve(a_schedule(root, "nightly", config, overrides=["a=1"]), lines.append) == 0
    noted = stubs(root)
    assert [(e["event"], e["round"]) for e in noted] == [
        ("start", 1), ("start", 1), ("end", 1), ("start", 2), ("end", 2), ("start", 3), ("end", 3),
    ]  # fmt: skip
    assert noted[0]["overrides"] == ["a=1"]
    assert len({e["pid"] for e in noted}) == 4  # a process per tick
    assert Run.open(root, "nightly").state.status == "finished"
    text = "\n".join(lines)
    assert "round 1 fails once" in text and "the next tick tries again" in text
    assert "at round 3" in lines[-1]
    ticks = runs(session, "flow_runs", deployments={"name": {"like_": "nightly-"}})
    states = [t["state_type"] for t in ticks if t["state_type"] != "SCHEDULED"]
    assert states.count("COMPLETED") == 3
    assert states.count("FAILED") == 1
    assert states.count("CANCELLED") >= 1  # while round 2 was busy
    assert set(states) == {"COMPLETED", "FAILED", "CANCELLED"}


def test_a_tick_is_skipped_while_another_process_holds_the_run(root, session, capsys):
    path = root / "held.json"
    path.write_text(json.dumps({"rounds": 1, "seconds": [0]}))
    run = Run.create(root, "held", {}, {"config": "held.json"})
    held, release = threading.Event(), threading.Event()

    def hold():
        with run.lock():
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(10)
        state = tick(str(path), "held", str(root), 1, [], "schedule_stub:run_rounds")
    finally:
        release.set()
        holder.join()
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert "skipped" in capsys.readouterr().out
    assert stubs(root) == []


def test_an_error_that_no_tick_cures_ends_the_schedule_with_its_code(session, root):
    lines: list[str] = []
    assert serve(a_schedule(root, "bad", {"bad": True}), lines.append) == 2
    assert "bad: true is not allowed" in lines[-1]
    with pytest.raises(ConfigError, match="--cron 'every day'"):
        serve(a_schedule(root, "cron", {}, every=None, cron="every day"), lines.append)


SERVE = """
import os, sys
from datetime import timedelta
from flows.prefect_.schedule import Schedule, serve
if __name__ == "__main__":
    path, name, root = sys.argv[1:]
    schedule = Schedule(path, name, root, every=timedelta(seconds=3), run_rounds="schedule_stub:run_rounds")
    sys.exit(serve(schedule, lambda line: print(line, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_a_schedule_ends_its_tick_and_another_goes_on(session, root, tmp_path, number):
    name = f"ended-{number}"
    schedule = a_schedule(root, name, {"rounds": 1, "seconds": [300]})
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(script), schedule.config_path, name, str(root)],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        (started,) = eventually(lambda: events(root) or process.poll() is not None, 120)
        with pytest.raises(RunBusy, match=f"pid {process.pid}"):
            serve(schedule)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        print(process.stdout.read() if not process.stdout.closed else "")
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert f"opd resume {name}" in output
    eventually(lambda: not Path(f"/proc/{started['pid']}").exists())
    assert Run.open(root, name).holder() is None
    stubs(root)
    Path(schedule.config_path).write_text(json.dumps({"rounds": 1, "seconds": [0]}))
    assert serve(schedule, lambda line: None) == 0  # nothing that was left behind holds the only slot
    assert [e["round"] for e in stubs(root) if e["event"] == "end"] == [1]


def test_a_tick_cancelled_in_prefect_leaves_nothing_behind(session, tmp_path):
    cancel_a_tick(tmp_path, session.api_url, "trainer").remove()


@pytest.mark.parametrize("when", ["create_flow_run", "set_flow_run_state"])
def test_a_prefect_that_fails_before_or_after_the_work_changes_nothing(session, monkeypatch, capsys, when):
    import httpx
    from prefect.client.orchestration import SyncPrefectClient

    calls, real = [], getattr(SyncPrefectClient, when)

    def broken(self, *args, **kwargs):
        if when == "create_flow_run" or calls:
            raise httpx.ConnectError("the server is gone")
        return real(self, *args, **kwargs)

    lines = []
    monkeypatch.setattr(SyncPrefectClient, when, broken)
    monkeypatch.setattr(session, "warn", lines.append)
    try:
        assert run_as_flow("distill", lambda: calls.append(1) or "made") == "made"
        assert calls == [1]
        assert not session.active
        assert run_stage_task("t", lambda: 2) == 2
    finally:
        session.active = True
    (line,) = lines
    assert "nothing of the run is lost" in line


@pytest.mark.slow
def test_a_server_that_dies_takes_no_work_with_it(tmp_path_factory, root, session):
    """The same with a real server, killed in the middle of a flow."""
    script = """
import json, os, sys, time
from pathlib import Path
from flows.prefect_.tasks import run_as_flow, run_stage_task
from flows.prefect_.session import prefect_session
root = Path(sys.argv[1])
def body():
    record = json.loads((root / "prefect" / "server.json").read_text())
    assert run_stage_task("one", lambda: 1) == 1
    os.kill(record["pid"], 9)
    time.sleep(0.5)
    return run_stage_task("two", lambda: 2) + run_stage_task("three", lambda: 3)
with prefect_session(root) as session:
    assert session.active
    assert run_as_flow("distill", body) == 5
    assert run_as_flow("again", lambda: 6) == 6
print("done")
"""
    other = tmp_path_factory.mktemp("other")
    (other / "prefect").mkdir()
    source = root / "prefect" / "prefect.db"
    subprocess.run(  # a copy of the migrated database saves the first start's migrations
        [sys.executable, "-c", "import sqlite3, sys; a, b = map(sqlite3.connect, sys.argv[1:]); a.backup(b)",
         str(source), str(other / "prefect" / "prefect.db")], check=True,
    )  # fmt: skip
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    result = subprocess.run(
        [sys.executable, "-c", script, str(other)],
        cwd=CHECKOUT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.strip() == "done", result.stderr
    assert "nothing of the run is lost" in result.stderr
    assert "Traceback" not in result.stderr
