"""A run's events for programs, and what a quiet call still says."""

from __future__ import annotations

import io
import json

from rich.console import Console

from flows.run.events import EventReporter
from flows.run.progress import LineReporter, QuietReporter, TerminalReporter
from storage.runs import RoundState, RunState, StageState

STATE = RunState(name="demo", rounds=[RoundState(round=0, student_sha256="a")])
DONE = StageState(state="done", seconds=1.5, rows=4, artifacts={"train": "k"})


def told(reporter) -> None:
    reporter.begins(STATE, 5)
    reporter.stage(1, "train", StageState(state="running"))
    for done in (1, 2, 4):
        reporter.progress(1, "train", done, 4, "steps", {"loss": float("nan")})
    reporter.stage(1, "train", DONE, {"loss_last": 0.5})
    reporter.note(1, "train", "warning: look")
    reporter.note(1, "train", "fine")
    reporter.round_done(RoundState(round=1, metrics={"reverse_kl": 0.5}, student_sha256="b"))
    reporter.stage(2, "train", StageState(state="failed", error="no"))


def test_every_event_is_one_line_of_json() -> None:
    out = io.StringIO()
    told(EventReporter(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        "begin", "stage", "progress", "progress", "stage", "note", "note", "round", "stage",
    ]  # fmt: skip
    assert events[0]["run"] == "demo" and events[0]["rounds"] == 5
    assert (events[2]["done"], events[3]["done"], events[2]["metrics"]) == (1, 4, {"loss": None})
    assert events[4]["seconds"] == 1.5 and events[4]["artifacts"] == {"train": "k"}
    assert [event["warning"] for event in events if event["event"] == "note"] == [True, False]
    assert events[7]["metrics"] == {"reverse_kl": 0.5} and events[8]["error"] == "no"


def test_a_quiet_call_has_warnings_and_failures() -> None:
    out = io.StringIO()
    told(QuietReporter(Console(file=out, width=80)))
    assert out.getvalue().splitlines() == ["round 1 train: warning: look", "round 2 train: no"]


def test_without_v_a_round_is_one_line_with_what_must_be_known() -> None:
    out = io.StringIO()
    told(LineReporter(Console(file=out, width=80, highlight=False), verbose=False))
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "round 1 train           warning: look",
        "round 1 train           fine",
        "round 1/5  not evaluated  KL 0.5000",
        "next: round 1 of 5",
        "round 2 train           failed: no",
    ]


def test_the_runs_line_stands_above_the_stages_bar() -> None:
    target = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    reporter = TerminalReporter(target)
    finished = [RoundState(round=n, student_sha256="a", stages={"train": DONE}) for n in range(3)]
    reporter.begins(RunState(name="demo", rounds=finished), 5)
    reporter.stage(3, "train", StageState(state="running"))
    reporter.progress(3, "train", 1, 4, "steps")
    shown = io.StringIO()
    Console(file=shown, width=80, color_system=None).print(reporter._live.get_renderable())
    first, second = shown.getvalue().splitlines()
    assert first.startswith("demo ━") and "round 3 of 5, done at about " in first
    assert second.startswith("round 3 train ")
