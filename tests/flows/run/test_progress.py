"""What a terminal and a log show of a run, as rendered text."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from flows.run import progress
from flows.run.progress import LineReporter, OnlyWork, TerminalReporter, round_line
from flows.run.shown import apart, sample_sizes, with_error
from storage.query.figures import Figure
from storage.runs import RoundState, StageState
from tasks.workers.metrics import short_words, summarised, summary, words

EVERYTHING = {
    "loss": 0.08712,
    "grad_norm": 1.923,
    "teacher_mass": 0.9912,
    "student_mass": 0.97,
    "overlap_ratio": 0.93,
    "student_entropy": 0.412,
    "teacher_entropy": 0.379,
    "outlier_fraction": 0.25,
    "clip_fraction": 0.012,
    "log_ratio_p05": -0.21,
    "log_ratio_p50": 0.0,
    "log_ratio_p95": 0.18,
}
LINE = (
    "loss 0.08712  grad norm 1.92  teacher mass 99.1%  student mass 97.0%  overlap 0.93  entropy 0.41  teacher entropy 0.38"
    "  outliers 25.0%  clipped 1.2%  log-ratio p5/50/95 -0.21/0.00/0.18"
)
ROW = dict.fromkeys(EVERYTHING) | {"log_ratio_mean": None, "step": 1}
ROWS = [
    ROW | EVERYTHING | {"loss": 0.412, "grad_norm": 0.5},
    ROW | {"loss": 0.3, "grad_norm": 1.9, "clip_fraction": 0.5},
    ROW | {"loss": 0.0871, "grad_norm": 1.0},
]
DONE = StageState(state="done", seconds=12.0, rows=64)


def console(width: int = 100, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False), out


def test_only_what_exists_is_shown() -> None:
    assert words(EVERYTHING) == LINE
    assert words({"loss": 2.0, "teacher_mass": None, "unknown": 1.0}) == "loss 2"
    assert words({"student_entropy": 0.5}) == "entropy 0.50"
    assert words({}) == ""


def test_a_summary_tells_the_first_and_last_loss_and_the_latest_of_the_rest() -> None:
    text = summary(summarised(ROWS))
    assert text.startswith("loss 0.412 → 0.0871  grad norm ≤ 1.9  teacher mass 99.1%  student mass 97.0%  overlap 0.93")
    assert "clipped 50.0%" in text and text.endswith("log-ratio p5/50/95 -0.21/0.00/0.18")
    assert summary(summarised([ROW | {"loss": 3.0, "grad_norm": 0.1}])) == "loss 3 → 3  grad norm ≤ 0.1"
    assert summary({"accuracy": 1.0}) == ""


@pytest.mark.parametrize("width", range(0, 120, 7))
def test_short_words_end_where_the_room_does(width: int) -> None:
    text = short_words(EVERYTHING, width)
    assert cell_len(text) <= width
    assert short_words(EVERYTHING, 500).startswith(text)
    assert width < 22 or text.startswith("loss 0.08712 grad 1.92")


def test_a_plain_log_has_figures_in_its_periodic_line_and_a_summary_at_the_end(monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    target, out = console(width=300)
    reporter = LineReporter(target)
    reporter.progress(2, "train", 3, 64, "steps", EVERYTHING)
    reporter.progress(2, "rollout", 3, 64, "samples")
    reporter.stage(2, "train", DONE, summarised(ROWS))
    signals = {"mask": "a", "sampled": "b", "teacher_topk": "c"}
    reporter.stage(2, "supervise", StageState(state="done", seconds=12.0, rows=1920, artifacts=signals))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == f"round 2 train           3/64 steps  {LINE}"
    assert lines[1] == "round 2 rollout         3/64 samples"
    assert lines[2] == "round 2 train           done in 12.0 s (64 steps)"
    assert lines[3] == f"round 2 train           {summary(summarised(ROWS))}"
    assert lines[4:] == ["round 2 supervise       done in 12.0 s (640 samples, 3 signals)"]


def test_what_is_in_the_store_takes_one_line_of_a_round() -> None:
    target, out = console(width=300)
    reporter = LineReporter(target)
    found = StageState(state="cached", rows=64)
    for round, last in ((1, found), (2, DONE)):
        for label in ("rollout", "supervise"):
            reporter.stage(round, label, found)
        reporter.stage(round, "train", last)
        reporter.round_done(RoundState(round=round, metrics={"mean_length": 5.0}))
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "round 1:  length 5.0  already in the store",
        "round 2 rollout, supervise already in the store",
        "round 2 train           done in 12.0 s (64 steps)",
        "round 2:  length 5.0",
    ]


def test_only_work_is_passed_on_when_nothing_is_to_be_done() -> None:
    target, out = console(width=300)
    reporter = OnlyWork(LineReporter(target))
    for round, state in ((1, StageState(state="cached")), (2, DONE)):
        reporter.stage(round, "train", state)
        reporter.note(round, "train", f"note {round}")
        reporter.round_done(RoundState(round=round))
    shown = [line.rstrip() for line in out.getvalue().splitlines()]
    assert shown == [
        "round 1 train           note 1",
        "round 2 train           done in 12.0 s (64 steps)",
        "round 2 train           note 2",
        "round 2:",
    ]


def test_a_rounds_line_has_errors_and_sizes() -> None:
    metrics = {"accuracy_greedy": 0.245, "accuracy_greedy_se": 0.0304, "accuracy_greedy_n": 200.0}
    metrics |= {"accuracy_greedy_prompts": 200.0, "reverse_kl": 0.5112, "reverse_kl_se": 0.0302, "reverse_kl_n": 128.0}
    state = RoundState(round=3, metrics=metrics | {"reverse_kl_prompts": 64.0, "mean_length": 5.0})
    assert round_line(state) == (
        "round 3:  accuracy 24.5% ± 3.0% (n 200)  reverse KL 0.5112 ± 0.0302 (n 128 of 64 prompts)  length 5.0"
    )


def test_a_cached_stage_has_no_summary() -> None:
    target, out = console()
    LineReporter(target).stage(1, "train", StageState(state="cached", rows=3), summarised(ROWS))
    assert "loss" not in out.getvalue()


@pytest.mark.parametrize("label", ["train", "warmup_teacher"])
@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_live_bar_keeps_to_one_line_of_the_terminal(label: str, width: int) -> None:
    target, _ = console(width, terminal=True)
    reporter = TerminalReporter(target)
    reporter.stage(12, label, StageState(state="running"))
    for done in (100, 2000):
        reporter.progress(12, label, done, 2000, "steps", EVERYTHING)
        rendered, shown = console(width)
        rendered.print(reporter._bar.get_renderable())
        (line,) = shown.getvalue().splitlines()
        assert f"round 12 {label} " in line and f"{done}/2000" in line and "…" not in line
        assert width < 100 or "loss 0.08712" in line
        assert width < 160 or "loss 0.08712 grad 1.92 mass 99%/97% H 0.41/0.38 clip 1%" in line


def test_the_next_stage_starts_without_the_last_ones_figures() -> None:
    target, _ = console(terminal=True)
    reporter = TerminalReporter(target)
    reporter.progress(1, "train", 1, 2, "steps", EVERYTHING)
    reporter.stage(1, "evaluate", StageState(state="running"))
    reporter.progress(1, "evaluate", 1, 2, "samples")
    rendered, shown = console()
    rendered.print(reporter._bar.get_renderable())
    assert "evaluate" in shown.getvalue() and "loss" not in shown.getvalue()


def test_sizes_are_told_once_where_they_are_equal() -> None:
    def state(**sizes: float) -> RoundState:
        return RoundState(round=0, metrics={f"{name}_n": n for name, n in sizes.items()})

    names = ("accuracy_greedy", "reverse_kl", "mean_length")
    assert sample_sizes([state(accuracy_greedy=200, reverse_kl=200, mean_length=200)] * 2, names) == "n 200"
    found = sample_sizes([state(accuracy_greedy=200, reverse_kl=64), state(accuracy_greedy=200, reverse_kl=63)], names)
    assert found == "accuracy n 200; reverse KL n 64 or n 63"
    assert sample_sizes([state()], names) == ""


def test_an_error_that_is_not_0_does_not_read_so():
    kl = {"reverse_kl": 0.0302, "reverse_kl_se": 0.00002}
    assert with_error(kl, "reverse_kl", "{:.4f}") == "0.0302 ± 2e-05"
    assert with_error(kl | {"reverse_kl_se": 0.0}, "reverse_kl", "{:.4f}") == "0.0302 ± 0.0000"
    assert with_error({"mean_length": 15.9, "mean_length_se": 0.04}, "mean_length", "{:.1f}") == "15.9 ± 0.0"
    assert apart(Figure(-0.0002, 0.00002, 20, 20), "{:.4f}") == "-0.0002 ± 2e-05"
