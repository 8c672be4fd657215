"""`policy.evaluate_every`: which rounds are evaluated, what is shown of the others, and how they are evaluated later. Whole runs
with scripted engines in this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from rich.console import Console

from flows.cli.report import print_report
from flows.experiment import Experiment
from flows.run.compare import compared, evaluated_rounds, point
from flows.run.progress import round_line
from flows.run.replay import replay_round
from flows.run.runner import fork_experiment, plan, run_experiment
from storage.artifacts import shards
from storage.errors import InputError
from storage.query.catalog import Catalog
from storage.runs import Run, RunState
from storage.store import Store

NAME = scripted_run.NAME


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return scripted_run.prepare_root(tmp_path / "store")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunState]:
    """The same run with every round evaluated."""
    root = scripted_run.prepare_root(tmp_path_factory.mktemp("whole") / "store")
    return root, go(root, experiment(every=1))


def experiment(rounds: int = 3, every: int = 2) -> Experiment:
    return Experiment.model_validate(scripted_run.EXPERIMENT | {"policy": {"rounds": rounds, "evaluate_every": every}})


def go(root: Path, e: Experiment, name: str = NAME, **how: Any) -> RunState:
    shards._verified.clear()
    pool: Any = in_process.InProcess()
    return run_experiment(e, name=name, root=root, prefect=False, workers=pool, **how)[0]


def evaluated(state: RunState) -> list[int]:
    return [r.round for r in state.rounds if r.evaluated]


def contents(root: Path) -> dict[str, Any]:
    return {f"{a.stage}/{a.key}": a.content for a in Store(root).list()}


def test_every_second_round_and_the_last_and_the_students_are_the_same(
    root: Path, whole: tuple[Path, RunState]
) -> None:
    state = go(root, experiment())
    assert evaluated(state) == [0, 2, 3] and [r.round for r in state.rounds if r.unevaluated] == [1]
    assert (state.status, state.rounds_done) == ("finished", 3)
    other, every = whole
    assert evaluated(every) == [0, 1, 2, 3]
    assert [r.student_sha256 for r in state.rounds] == [r.student_sha256 for r in every.rounds]
    assert contents(root).items() < contents(other).items(), "the cadence changes no key and no content"
    assert len(contents(other)) - len(contents(root)) == 1


def test_a_round_left_out_is_shown_as_such_everywhere(root: Path) -> None:
    state = go(root, experiment())
    out = io.StringIO()
    print_report(state, root, out=Console(file=out, width=300))
    (line,) = [line for line in out.getvalue().splitlines() if "not evaluated" in line and "│ 1 " in line]
    assert "%" not in line and "opd evaluate trial --round" in out.getvalue().replace("\n", " ")
    assert round_line(state.rounds[1]) == "round 1:  not evaluated"
    sql = "SELECT round, accuracy_greedy IS NULL AS a, reverse_kl_n IS NULL AS n, artifact IS NULL AS k FROM rounds"
    found = Catalog(Store(root)).query(sql + " ORDER BY round").to_pylist()
    assert [tuple(row.values()) for row in found] == [
        (0, False, False, False), (1, True, True, True), (2, False, False, False), (3, False, False, False),
    ]  # fmt: skip
    with pytest.raises(InputError, match="round 1 was not evaluated"):
        replay_round(Run.open(root, NAME), root, 1, ("evaluate",), [], False, lambda line: None)
    with pytest.raises(InputError, match="evaluated are 0, 2, 3"):
        point(root, f"{NAME}@1")
    assert [p.round.round for p in evaluated_rounds(root, NAME)] == [0, 2, 3]


@pytest.mark.parametrize("later", ["command", "resume"])
def test_a_round_left_out_can_be_evaluated_later(root: Path, whole: tuple[Path, RunState], later: str) -> None:
    go(root, experiment())
    how = {"rounds": 3, "evaluated": {1}.__contains__} if later == "command" else {}
    state = go(root, experiment(every=2 if later == "command" else 1), **how)
    assert evaluated(state) == [0, 1, 2, 3] and state.status == "finished"
    other, every = whole
    assert contents(root) == contents(other)
    assert [r.metrics for r in state.rounds] == [r.metrics for r in every.rounds]
    assert evaluated(go(root, experiment())) == [0, 1, 2, 3], "what is evaluated stays so"


def test_a_pause_evaluates_its_last_round_and_a_tick_of_a_schedule_does_not(root: Path) -> None:
    assert evaluated(go(root, experiment(), rounds=1)) == [0, 1]
    assert evaluated(go(root, experiment(rounds=4, every=3), "ticks", further=1)) == [0, 1], "it is in the store"
    assert evaluated(go(root, experiment(rounds=4, every=3), "ticks", further=1)) == [0, 1]
    state = go(root, experiment(rounds=4, every=3), "ticks", further=2)
    assert evaluated(state) == [0, 1, 3, 4] and state.status == "finished"


def test_a_run_goes_on_from_an_unevaluated_round(root: Path) -> None:
    ticks = experiment(rounds=5, every=5)
    for done in (1, 2):
        state = go(root, ticks, further=1)
        assert (state.rounds_done, evaluated(state), state.status) == (done, [0], "stopped")
    assert {line.state for line in plan(ticks, root, 2) if line.stage != "evaluate"} == {"cached"}
    fork = go(root, fork_experiment(NAME, 2, root, ["seed=7"]), "fork", rounds=3)
    assert (fork.rounds_done, evaluated(fork)) == (3, [0, 3])


def test_a_lost_state_is_rebuilt_with_its_gaps(root: Path) -> None:
    before = go(root, experiment())
    (root / "runs" / NAME / "state.json").unlink()
    after = go(root, experiment())
    assert (evaluated(after), after.status, after.rounds_done) == (evaluated(before), "finished", 3)
    assert [r.student_sha256 for r in after.rounds] == [r.student_sha256 for r in before.rounds]


def test_two_rounds_are_compared_by_prompt(root: Path) -> None:
    go(root, experiment())
    store, rounds = Store(root), evaluated_rounds(root, NAME)
    found = compared(store, rounds[1], rounds[0]).figures["reverse_kl"]
    sql = (
        "SELECT difference, se, prompts, told_apart FROM differences WHERE metric = 'reverse_kl' AND run = other_run"
        " AND round = 2 AND other_round = 0"
    )
    (row,) = Catalog(store).query(sql).to_pylist()
    assert row["difference"] == pytest.approx(found.value) and row["se"] == pytest.approx(found.se)
    assert (row["prompts"], row["told_apart"]) == (found.prompts, found.told_apart) == (4, found.told_apart)
