"""How long a run still takes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from flows.run.lines import short_line
from flows.run.pace import clock, duration, estimate, pace, round_seconds
from storage.runs import RoundState, RunState, StageState

NOW = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)


def done(number: int, seconds: float, state: str = "done") -> RoundState:
    train = StageState(state=state, seconds=seconds / 2)
    return RoundState(round=number, student_sha256="a", stages={"train": train, "evaluate": train})


def run(*rounds: RoundState) -> RunState:
    return RunState(name="demo", status="running", rounds=[done(0, 999.0), *rounds])


def test_the_median_counts_rounds_that_were_made_here() -> None:
    rounds = [done(0, 500.0), done(1, 60.0), done(2, 0.0, "cached"), done(3, 120.0), done(4, 90.0)]
    assert round_seconds(rounds) == [60.0, 120.0, 90.0]


def test_what_a_round_has_taken_is_left_out_of_what_it_still_takes() -> None:
    begun = (NOW - timedelta(seconds=30)).strftime("%Y-%m-%dT%H:%M:%S%z")
    stages = {"rollout": StageState(state="done", seconds=10.0), "train": StageState(state="running", started=begun)}
    going_on = run(done(1, 60.0), done(2, 120.0), done(3, 90.0), RoundState(round=4, stages=stages))
    found = pace(going_on, 6, NOW)
    assert found is not None and (found.round, found.goal) == (4, 6)
    assert found.left == pytest.approx(90 - 40 + 2 * 90)
    late = pace(going_on, 6, NOW + timedelta(hours=1))
    assert late is not None and late.left == pytest.approx(180)


def test_before_a_round_is_finished_there_is_a_place_and_no_time() -> None:
    assert pace(RunState(name="demo"), 5, NOW).text(NOW) == "round 0 of 5"
    assert pace(run(), 5, NOW).text(NOW) == "round 1 of 5"
    assert pace(run(done(1, 1.0)), 1, NOW) is None


def test_times_are_those_of_the_machines_clock() -> None:
    here = datetime(2026, 3, 4, 22, 0).astimezone()
    assert clock(here + timedelta(hours=1), here) == "23:00"
    assert clock(here + timedelta(hours=5, minutes=40), here) == "Thu 03:40"
    assert clock(here + timedelta(days=10), here) == "14 Mar 22:00"
    found = pace(run(done(1, 3600.0)), 3, here)
    assert found is not None and found.text(here) == "round 2 of 3, done at about Thu 00:00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5340, "89 min"),
        (7200, "2 h"),
        (7260, "2 h 1 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations_have_one_unit_or_two(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_estimate_needs_a_round_that_is_known_and_one_that_is_left() -> None:
    assert estimate(3, [60.0, 100.0, 80.0]) == "about 4 min for 3 rounds (median of 3 finished rounds: 80 s)"
    assert estimate(1, [60.0]) == "about 60 s for 1 round (median of 1 finished round: 60 s)"
    assert estimate(0, [60.0]) is None and estimate(3, []) is None


METRICS = {
    "accuracy_greedy": 0.245, "accuracy_greedy_se": 0.03, "accuracy_greedy_n": 200.0, "accuracy_sampled": 0.2,
    "reverse_kl": 0.0512, "reverse_kl_se": 0.003, "reverse_kl_n": 200.0, "mean_length": 18.1, "clipped_ratio": 0.094,
}  # fmt: skip
LINE = "round 7/25  accuracy 24.5% ± 3.0%  KL 0.0512 ± 0.0030  n 200  length 18  clipped 9%  41 s"


@pytest.mark.parametrize("width", [200, len(LINE), 80, 60, 40, 20, 5])
def test_a_rounds_line_drops_its_last_parts_where_the_terminal_is_narrow(width: int) -> None:
    state = RoundState(round=7, metrics=METRICS, stages={"train": StageState(state="done", seconds=41.2)})
    line = short_line(state, 25, width)
    assert LINE.startswith(line) and (len(line) <= width or line == "round 7/25")
    if width == 80:
        assert line.endswith("length 18")
    assert width < len(LINE) or line == LINE


def test_a_round_that_was_not_evaluated_says_so() -> None:
    assert short_line(RoundState(round=2, student_sha256="a"), None, 80) == "round 2  not evaluated"
    assert short_line(RoundState(round=2, metrics={"accuracy_sampled": 0.5}), None, 80, True) == (
        "round 2  sampled 50.0%  in the store"
    )
