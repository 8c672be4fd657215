"""A study's tables and files, from states and Parquet as real runs leave them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from places import TINY

from flows.run.runner import open_run
from flows.study.files import write_files
from flows.study.results import best_lrs, grids, read_rows, spread, undecided
from flows.study.spec import StudyPlan, load_study
from storage.query.figures import Sums
from storage.runs import RoundState, Run, StageState

STUDY = {
    "name": "s",
    "base": str(TINY),
    "seeds": [0, 1],
    "rounds": 2,
    "methods": {"good": {"group": "g"}, "bad": {"set": {"objective.support.k": 4}}},
    "sweep": {"seeds": [9], "rounds": 2, "groups": {"g": {"method": "good", "lrs": [1e-4, 1e-3]}}},
}


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return load_study(tmp_path / "study.yaml")


@pytest.fixture
def root(example_store: Path, plan: StudyPlan) -> Path:
    """The example's run `demo` (rounds 0 to 2) under the names of the study's runs, with other metrics; `bad` seed 0
    failed in round 1, and its seed 1 has not begun."""
    example = Run.open(example_store, "demo").state
    pace = {"study-s-sweep-g-0.0001-s9": 0.5, "study-s-sweep-g-0.001-s9": 2, "study-s-good-s0": 2, "study-s-good-s1": 4}
    for planned in (*plan.sweep_runs(), *plan.method_runs({"g": 1e-3})):
        if planned.name == "study-s-bad-s1":
            continue
        run = open_run(plan.experiment(planned.method, planned.seed, planned.lr), planned.name, example_store)
        state = run.state
        state.rounds = [r.model_copy(deep=True) for r in example.rounds]
        state.status = "finished"
        for r in state.rounds:
            r.metrics = {"accuracy_greedy": r.round / 4, "reverse_kl": math.exp(-r.round * pace.get(planned.name, 1))}
        if planned.method == "bad":
            failed = StageState(state="failed", error="the loss is not finite")
            state.rounds = [state.rounds[0], RoundState(round=1, stages={"train": failed})]
            state.status = "failed"
        with run.lock():
            run.save(state)
    return example_store


def cells(plan: StudyPlan, root: Path, title: str) -> dict[tuple[str, str, str], dict[str, str]]:
    grid = next(grid for grid in grids(plan, read_rows(plan, root)) if grid.title.startswith(title))
    return {line[:3]: dict(zip(grid.header, line, strict=True)) for line in grid.lines}


def test_a_method_has_mean_and_range_over_its_seeds(plan, root):
    kl = cells(plan, root, "Reverse KL")
    good = kl["good", "0.001", "2 of 2"]
    low, high = math.exp(-8), math.exp(-4)
    assert good["round 0"] == "1.0000 (1.0000 to 1.0000)"
    assert good["round 2"] == f"{(low + high) / 2:.4f} ({low:.4f} to {high:.4f})"
    assert good["largest gradient norm (before clipping)"] == "1"
    assert cells(plan, root, "Accuracy")["good", "0.001", "2 of 2"]["round 1"] == "25.0% ± 25.0% (25.0% to 25.0%)"
    note = next(grid.note for grid in grids(plan, read_rows(plan, root)) if grid.title == "Accuracy")
    assert note.endswith("n 4 each"), "one of the evaluation's four prompts is right: 1/4 ± 1/4"


def test_a_failed_method_keeps_what_it_had_and_says_why(plan, root):
    bad = cells(plan, root, "Reverse KL")["bad", "0.001", "0 of 2, 1 failed"]
    assert bad["round 0"] == "1.0000 [1]" and bad["round 1"] == "" and bad["round 2"] == ""
    failed = next(grid for grid in grids(plan, read_rows(plan, root)) if grid.title == "Failed")
    assert failed.lines == [("study-s-bad-s0", "round 1 train: the loss is not finite")]


def test_the_sweeps_table_marks_the_choice_and_that_it_lies_at_an_end(plan, root):
    sweep = cells(plan, root, "Learning rates")
    assert sweep["g", "good", "0.0001"]["reverse KL"] == f"{math.exp(-1):.4f}"
    assert sweep["g", "good", "0.0001"][""] == ""
    assert sweep["g", "good", "0.001"][""] == "chosen, the end of its list"


def sweep_row(lr: float, kl: list[float], seed: int = 9) -> dict[str, Any]:
    """The last round of a candidate: one completion of ten tokens per prompt."""
    sums = Sums(tuple(f"p{i}" for i in range(len(kl))), np.array(kl) * 10, np.full(len(kl), 10.0), len(kl))
    known = {"part": "sweep", "group": "g", "lr": lr, "seed": seed, "status": "finished", "round": 2}
    return known | {"run": str(lr), "reverse_kl": sums.value, "sums": {"reverse_kl": sums}, "grad_norm_max": None} | {
        "accuracy": None, "method": "good", "error": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "close"),
    [
        ([0.12, 0.29, 0.23, 0.38], [1e-4]),  # differences of +.02 -.01 +.03 -.02
        ([0.30, 0.49, 0.41, 0.60], []),  # .20 .19 .21 .20: far apart, though both spread over .1 to .4
        ([0.10, 0.30, 0.20, 0.90], [1e-4]),  # all of it is one prompt
    ],
)
def test_the_sweep_says_which_rates_are_not_told_apart_from_the_best(plan, other, close):
    rows = [sweep_row(1e-3, [0.1, 0.3, 0.2, 0.4]), sweep_row(1e-4, other)]
    assert best_lrs(plan, rows) == {"g": 1e-3}
    assert undecided(plan, rows) == {"g": close}
    remarks = {line[2]: line[-1] for grid in grids(plan, rows) if grid.title == "Learning rates" for line in grid.lines}
    assert remarks["0.001"].startswith("chosen")
    assert (remarks["0.0001"] == "not told apart from the best") == bool(close)


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([None, None], ""), ([0.5], "0.5 [1]"), ([0.5, 1.0], "0.8 (0.5 to 1.0)"), ([0.5, None], "0.5 [1]")],
)
def test_spread_says_how_many_seeds_it_stands_for(values, text):
    assert spread(values, "{:.1f}", seeds=2) == text


def test_the_files_hold_every_round_of_every_run(plan, root, tmp_path):
    report, lines, parquet, curves = write_files(plan, read_rows(plan, root), tmp_path / "out")
    rows = pyarrow.parquet.read_table(parquet).to_pylist()
    assert len(rows) == 2 * 3 + 2 * 3 + 1
    with lines.open() as file:
        assert [float(line["reverse_kl"]) for line in csv.DictReader(file)] == [row["reverse_kl"] for row in rows]
    trained = [row for row in rows if row["round"] and row["round"] > 0]
    assert all((row["grad_norm_max"], row["steps"]) == (1.0, 2) for row in trained)
    assert "| good | 0.001 | 2 of 2 |" in report.read_text()
    drawn = [element.get("id", "") for element in ElementTree.parse(curves).iter()]
    assert sum(name.startswith("FillBetweenPolyCollection") for name in drawn) == 2 * 2, "a band per method and panel"


def test_an_unfinished_study_has_a_report_too(plan, tmp_path):
    report, lines, *_ = write_files(plan, read_rows(plan, tmp_path), tmp_path / "out")
    assert "not tried yet" in report.read_text() and "| good |  | 0 of 2 |" in report.read_text()
    assert len(lines.read_text().splitlines()) == 1


def test_damaged_training_steps_cost_the_norms_and_not_the_report(plan, root):
    train = Run.open(root, "study-s-good-s0").state.rounds[1].stages["train"].artifacts["train"]
    shard = next((root / "artifacts" / "train" / train).glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    good = cells(plan, root, "Reverse KL")["good", "0.001", "2 of 2"]
    assert good["round 1"] and good["largest gradient norm (before clipping)"] == ""
