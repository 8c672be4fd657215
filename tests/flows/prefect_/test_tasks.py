"""A run as Prefect shows it, read back from a real server; and outcomes that are the functions' own, whatever Prefect does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scripted_run
from places import CHECKOUT
from scripted_run import NAME
from shared_prefect import ask, eventually
from stopping import PATIENCE, StoppedRun

from flows.experiment import Experiment
from flows.prefect_ import shown
from flows.prefect_.server import StoreServer
from flows.prefect_.session import Session, prefect_session
from flows.prefect_.tasks import run_as_flow, run_stage
from flows.run.hints import opd_command
from flows.run.progress import SilentReporter
from flows.run.shown import amount, by_round
from storage.errors import RunBusy
from storage.runs import RoundState, Run, RunState, StageState

E = scripted_run.experiment()


class Odd(Exception):
    """Cannot be rebuilt from its args, so nothing that copies exceptions gets it right."""

    def __init__(self, first, second):
        super().__init__("one text")
        self.second = second


@pytest.fixture(scope="module")
def session(shared_server: StoreServer):
    """A session on the shared server, by way of its root."""
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PREFECT_")}
    os.environ["PREFECT_PROFILE"] = "one-that-does-not-exist"  # a user's own setting must not reach the store's server
    lines: list[str] = []
    with prefect_session(shared_server.home.parent, warn=lines.append) as open_session:
        assert open_session.active and lines == []
        assert open_session.server.api_url == shared_server.api_url
        yield open_session
    assert shared_server.alive()
    assert os.environ.pop("PREFECT_PROFILE") == "one-that-does-not-exist"
    assert "PREFECT_API_URL" not in os.environ
    os.environ.update(saved)


def flow(session: Session, name: str, function):
    return run_as_flow(session, E, name, 1, function)


def stage(session: Session, label: str, function, cached=lambda _: False):
    return run_stage(session, label, 1, function, cached)


def flow_runs(server: StoreServer, name: str) -> list[dict[str, Any]]:
    return ask(server.api_url, "flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_ASC"})


def reported_runs(server: StoreServer, rounds: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """The flow runs of `reported` (of `failed`: `rounds` is 3); other tests' runs on the shared server have the same name."""
    found = [run for run in flow_runs(server, NAME) if "scripted_leaks" in str(run["parameters"])]
    return [run for run in found if run["parameters"]["rounds"] in rounds]


# What a run looks like there


@pytest.fixture(scope="module")
def reported(shared_server: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> StoppedRun:
    """A run of one round with workers, then of a second round, by the command line; both report to the shared server. A third
    call, which finds everything in the store, does not."""
    folder = tmp_path_factory.mktemp("reported")
    run = StoppedRun.of(scripted_run.prepare_root(folder / "template" / "store"), folder / "run", rounds=1)
    run.write(None)
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("scripted_family", "scripted_leaks"))
    for rounds in (1, 2, 2):
        leak = {"OPD_TEST_LEAK_HOW": "prints", "OPD_TEST_LEAK": "a line of the trainer's [worker]"}
        more = ("--set", f"policy.rounds={rounds}")
        process = run.begin(*more, prefect=True, PREFECT_API_URL=shared_server.api_url, **leak)
        process.join(PATIENCE)
        assert run.ended(process) == 0 and run.leftovers() == [], run.output
        assert "warning" not in run.output
    assert run.output.count("nothing to do") == 1
    return run


def tasks_of(server: StoreServer, flow_run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Task runs by name, once all (four a round) have arrived in their last state."""
    count = 4 * (1 + flow_run["parameters"]["rounds"])

    def ended() -> dict[str, dict[str, Any]] | None:
        found = ask(server.api_url, "task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run["id"]]}}})
        complete = len(found) == count and all(run["state_type"] == "COMPLETED" for run in found)
        return {run["name"]: run for run in found} if complete else None

    return eventually(ended)


def artifacts_of(server: StoreServer, flow_run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = ask(server.api_url, "artifacts/filter", {"flow_runs": {"id": {"any_": [flow_run["id"]]}}})
    return {artifact["key"]: artifact for artifact in found}


def messages(server: StoreServer, task_run: dict[str, Any]) -> list[str]:
    body = {"logs": {"task_run_id": {"any_": [task_run["id"]]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
    return [line["message"] for line in ask(server.api_url, "logs/filter", body)]


def test_a_flow_run_has_the_experiment_as_its_parameters_and_its_method_as_tags(reported, shared_server) -> None:
    first, second = reported_runs(shared_server)
    for run, rounds in ((first, 1), (second, 2)):
        assert run["state_type"] == "COMPLETED"
        assert set(run["tags"]) == {NAME, "direct", "reverse_kl"}
        assert (run["parameters"]["run"], run["parameters"]["rounds"]) == (NAME, rounds)
    stored = Run.open(reported.root, NAME).experiment
    assert Experiment.model_validate(second["parameters"]["experiment"]) == Experiment.model_validate(stored)


def test_tasks_are_the_stages_of_the_rounds_and_a_cached_one_says_so(reported, shared_server) -> None:
    first, second = (tasks_of(shared_server, run) for run in reported_runs(shared_server))
    round_0 = ("model", "model_teacher", "prepare", "evaluate")
    round_1 = ("rollout", "supervise", "train", "evaluate")
    names = {f"{label} · round 0" for label in round_0} | {f"{label} · round 1" for label in round_1}
    later = {f"{label} · round 2" for label in round_1}
    assert first.keys() == names and second.keys() == names | later
    assert set(first["train · round 1"]["tags"]) == {NAME, "direct", "reverse_kl", "round 1"}
    made = {name for name, run in first.items() if run["state_name"] == "Completed"}
    assert made == {"evaluate · round 0", *(f"{label} · round 1" for label in round_1)}
    assert {run["state_name"] for name, run in first.items() if name not in made} == {"Cached"}
    assert {name for name, run in second.items() if run["state_name"] == "Completed"} == later
    assert {run["state_name"] for name, run in second.items() if name not in later} == {"Cached"}


def test_a_round_is_a_table_and_the_end_a_summary(reported, shared_server) -> None:
    # on a busy machine a stage may take so long that it has a bar too
    first, second = (
        {key: made for key, made in artifacts_of(shared_server, run).items() if made["type"] != "progress"}
        for run in reported_runs(shared_server)
    )
    assert first.keys() == {f"{NAME}-round-0", f"{NAME}-round-1", f"{NAME}-rounds", f"{NAME}-summary"}
    assert second.keys() == first.keys() | {f"{NAME}-round-2"}
    state = Run.open(reported.root, NAME).state
    one = state.rounds[1]
    table = first[f"{NAME}-round-1"]
    assert table["type"] == "table" and "accuracy" in table["description"]

    rows = {row["stage"]: row for row in json.loads(table["data"])}
    assert list(rows) == list(one.stages)
    for label, row in rows.items():
        assert (row["state"], row["made"]) == ("done", amount(label, one.stages[label]))
        assert row["seconds"] == pytest.approx(one.stages[label].seconds, abs=0.06)
        assert all(f"{name}/{key}" in row["artifacts"] for name, key in one.stages[label].artifacts.items())
    kl, error = one.metrics["reverse_kl"], one.metrics["reverse_kl_se"]
    assert f"reverse_kl {kl:.5g} ± {error:.5g} (n " in rows["evaluate"]["metrics"]
    assert "reverse_kl_se" not in rows["evaluate"]["metrics"]
    assert f"tokens {one.metrics['rollout_tokens']:.5g}" in rows["rollout"]["metrics"]
    summary = first[f"{NAME}-summary"]
    assert summary["type"] == "markdown" and summary["data"].startswith(f"# {NAME}: round 1 of 1")
    shares = [
        " ± ".join(form.format(one.metrics[name + part]) for part in ("", "_se"))
        for name, form in (("accuracy_greedy", "{:.1%}"), ("reverse_kl", "{:.4f}"))
    ]
    assert f"| 1 | {shares[0]} | " in summary["data"] and f" | {shares[1]} | " in summary["data"]
    assert "(n 4)" in summary["data"]
    student = f"artifacts/student/{one.stages['train'].artifacts['student']}"
    assert f"`{student}`" in summary["data"] and (reported.root / student).is_dir()
    assert f"In the store `{reported.root}`" in summary["data"]
    for words in (("export", NAME, f"{NAME}-student"), ("report", NAME)):
        assert opd_command(reported.root, *words) in summary["data"]


def test_all_rounds_are_one_table_that_grows(reported, shared_server) -> None:
    first, second = (artifacts_of(shared_server, run) for run in reported_runs(shared_server))
    state = Run.open(reported.root, NAME).state
    for found, rounds in ((first, 1), (second, 2)):
        table = found[f"{NAME}-rounds"]
        headings, rows = by_round(state.rounds[: rounds + 1])
        assert table["type"] == "table" and "accuracy" in headings and len(rows) == rounds + 1
        assert json.loads(table["data"]) == [dict(zip(headings, row, strict=True)) for row in rows]
        assert "all rounds" in table["description"]
    count = {"artifacts": {"key": {"any_": [f"{NAME}-rounds"]}}, "flow_runs": {"name": {"any_": [NAME]}}}
    ours = {run["id"] for run in reported_runs(shared_server)}
    found = [a for a in ask(shared_server.api_url, "artifacts/filter", count) if a["flow_run_id"] in ours]
    assert len(found) == 2  # one per flow run, not one per round


@pytest.fixture(scope="module")
def failed(reported, shared_server) -> StoppedRun:
    """The same run, whose third round fails: the trainer writes a line and dies, each time that it is tried again."""
    leak = {"OPD_TEST_LEAK_HOW": "dies", "OPD_TEST_LEAK": "the trainer's last words"}
    process = reported.begin("--set", "policy.rounds=3", prefect=True, PREFECT_API_URL=shared_server.api_url, **leak)
    process.join(PATIENCE)
    assert reported.ended(process) == 1, reported.output
    return reported


def test_a_failure_says_what_the_worker_wrote_and_what_to_do(failed, shared_server) -> None:
    (run,) = reported_runs(shared_server, rounds=(3,))
    artifact = artifacts_of(shared_server, run)[f"{NAME}-failure"]
    assert run["state_type"] == "FAILED" and artifact["type"] == "markdown"
    for text in (run["state"]["message"], artifact["data"]):
        assert "round 3 train: trainer worker" in text
        assert "the trainer's last words" in text and "last lines of" in text
        assert opd_command(failed.root, "resume", NAME) in text
    assert opd_command(failed.root, "logs", NAME) in artifact["data"]
    body = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    states = {task["name"]: task["state_name"] for task in ask(shared_server.api_url, "task_runs/filter", body)}
    assert states["train · round 3"] == "Failed" and states["train · round 2"] == "Cached"


def test_what_a_stage_and_its_worker_say_is_in_the_tasks_log(reported, shared_server) -> None:
    first, second = (tasks_of(shared_server, run) for run in reported_runs(shared_server))
    lines = messages(shared_server, first["train · round 1"])
    assert "trainer: a line of the trainer's [worker]" in lines
    assert "round 1 train: started" in lines
    assert any(line.startswith("round 1 train: done in") for line in lines)
    assert not any("line of the trainer" in line for line in messages(shared_server, first["rollout · round 1"]))
    assert any("already in the store" in line for line in messages(shared_server, second["train · round 1"]))
    assert not any("line of the trainer" in line for line in messages(shared_server, second["train · round 1"]))


@pytest.mark.parametrize(
    ("end", "percent", "text"),
    [
        (None, 50.0, r"rollout, round 3: 2 of 4 samples, [\d.,]+ per second, about \d+ s left"),
        (StageState(state="done", seconds=1.0, rows=4), 100.0, "rollout, round 3: 4 samples in 1 s"),
        (StageState(state="failed", error="it broke"), 50.0, "rollout, round 3: failed"),
        (StageState(state="pending", error="interrupted"), 50.0, "rollout, round 3: interrupted"),
    ],
)
def test_a_long_stage_has_a_progress_bar_with_rate_and_time_left(
    session, shared_server, tmp_path, monkeypatch, end: StageState | None, percent: float, text: str
) -> None:
    for name in ("LONG_SECONDS", "BETWEEN_SECONDS"):
        monkeypatch.setattr(shown, name, 0.0)
    run, name = Run.create(tmp_path, "bar", {}, {}), f"bar {end and end.state}"
    reporter = shown.InPrefect(session, run, RunState(name="bar"), SilentReporter())

    def work() -> None:
        reporter.stage(3, "rollout", StageState(state="running"))
        for done in (1, 2):
            reporter.progress(3, "rollout", done, 4, "samples")
        if end is not None:
            reporter.stage(3, "rollout", end)

    flow(session, name, lambda: stage(session, "rollout", work))
    (found,) = flow_runs(shared_server, name)
    (bar,) = artifacts_of(shared_server, found).values()
    assert (bar["type"], bar["key"], float(bar["data"])) == ("progress", "bar-rollout-round-3", percent)
    assert re.fullmatch(text, bar["description"])


def test_progress_is_reported_every_few_seconds_at_most(tmp_path, monkeypatch) -> None:
    now, moved = [0.0], list[float]()
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    run = Run.create(tmp_path, "bar", {}, {})
    reporter = shown.InPrefect(Session(active=True), run, RunState(name="bar"), SilentReporter())
    monkeypatch.setattr(reporter, "_move_bar", lambda *_: moved.append(now[0]))
    monkeypatch.setattr(reporter, "_log", lambda *_: None)
    reporter.stage(1, "train", StageState(state="running"))
    for step in range(4000):
        now[0] = step / 100
        reporter.progress(1, "train", step, 4000, "steps")
    assert moved and moved[0] >= shown.LONG_SECONDS
    assert all(later - earlier >= shown.BETWEEN_SECONDS for earlier, later in pairwise(moved))


def test_a_workers_line_is_shown_when_it_is_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shown, "BETWEEN_SECONDS", 0.0)
    run = Run.create(tmp_path, "bar", {}, {})
    log = run.log_path("trainer")
    log.write_text("of an earlier call\n")
    reporter, lines = shown.InPrefect(Session(active=True), run, RunState(name="bar"), SilentReporter()), list[str]()
    monkeypatch.setattr(reporter, "_log", lambda *more: lines.extend(more))
    for text in ("one\ntoken hf_abcdefgh", "ijklmnopqrstuvwxyz0123\n"):
        with log.open("a") as file:
            file.write(text)
        reporter.progress(1, "train", 1, 4, "steps")
    assert [line for line in lines if line.startswith("trainer: ")] == ["trainer: one", "trainer: token ***"]


def test_a_server_that_fails_while_a_bar_is_moved_ends_the_record_not_the_run(tmp_path, monkeypatch) -> None:
    for name in ("LONG_SECONDS", "BETWEEN_SECONDS"):
        monkeypatch.setattr(shown, name, 0.0)
    lines = list[str]()
    session = Session(warn=lines.append, active=True)
    reporter = shown.InPrefect(session, Run.create(tmp_path, "bar", {}, {}), RunState(name="bar"), SilentReporter())
    monkeypatch.setattr(reporter, "_log", lambda *_: None)

    def broken(*_: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(reporter, "_move_bar", broken)
    reporter.stage(1, "train", StageState(state="running"))
    for step in range(3):
        reporter.progress(1, "train", step, 3, "steps")
    reporter.stage(1, "train", StageState(state="done", seconds=1.0))
    reporter.round_done(RoundState(round=1))
    assert not session.active
    (line,) = lines
    assert "nothing of the run is lost" in line


# Outcomes


def test_importing_costs_no_prefect() -> None:
    script = "import sys, flows.prefect_.tasks, flows.prefect_.schedule; assert 'prefect' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)


def test_without_prefect_functions_are_called(tmp_path: Path) -> None:
    inactive, error, thing = Session(active=False), ValueError("x"), object()

    def fail() -> None:
        raise error

    assert flow(inactive, "f", lambda: stage(inactive, "t", lambda: thing)) is thing
    with pytest.raises(ValueError) as caught:
        flow(inactive, "f", lambda: stage(inactive, "t", fail))
    assert caught.value is error


def test_results_come_out_as_themselves(session, shared_server) -> None:
    thing = object()
    assert flow(session, "a {name}", lambda: stage(session, "rollout", lambda: thing)) is thing
    assert session.active
    (run,) = flow_runs(shared_server, "a {name}")
    assert run["state_type"] == "COMPLETED"


@pytest.mark.parametrize("error", [Odd(1, 2), KeyboardInterrupt(), RunBusy("held", "pid 1"), SystemExit(3)])
def test_exceptions_come_out_as_themselves(session, shared_server, error) -> None:
    def fail() -> None:
        raise error

    name = f"fails with {type(error).__name__}"
    with pytest.raises(type(error)) as caught:
        flow(session, name, lambda: stage(session, "train", fail))
    assert caught.value is error
    assert session.active  # the function's failure is not Prefect's
    (run,) = flow_runs(shared_server, name)
    assert run["state_type"] == ("FAILED" if isinstance(error, Exception) else "CRASHED")


def test_sigterm_is_an_interrupt_inside_a_flow(session) -> None:
    def body() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        flow(session, "distill", lambda: stage(session, "train", body))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("when", ["create_flow_run", "set_flow_run_state"])
def test_a_prefect_that_fails_before_or_after_the_work_changes_nothing(session, monkeypatch, when) -> None:
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
        assert flow(session, "distill", lambda: calls.append(1) or "made") == "made"
        assert calls == [1]
        assert not session.active
        assert stage(session, "t", lambda: 2) == 2
    finally:
        session.active = True
    (line,) = lines
    assert "nothing of the run is lost" in line
