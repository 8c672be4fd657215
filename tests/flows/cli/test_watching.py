"""What the command line says of a run that goes on, of a round that is named, and of the sign of a difference."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from opd_cli import in_this_process
from places import TINY

import opdflow
from flows.cli.options import at_round
from flows.cli.run import Output
from flows.experiment import load_experiment
from flows.run.runner import changed_fields, fork_experiment, open_run
from storage.errors import ConfigError, InputError
from storage.runs import RoundState, Run, StageState


@pytest.fixture
def opd(monkeypatch, capsys, tmp_path, example_store):
    """Call `opd` in this process, on a copy of the example store."""
    monkeypatch.chdir(tmp_path)
    return in_this_process(monkeypatch, capsys, example_store)


@pytest.fixture
def going_on(example_store: Path):
    """Run `demo` in its third round of 5, held by this process."""
    run = Run.open(example_store, "demo")
    run.save_experiment(run.experiment | {"policy": {"rounds": 5}})
    with run.lock():
        state = run.state
        state.status = "running"
        began = (datetime.now().astimezone() - timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%S%z")
        state.rounds.append(RoundState(round=3, stages={"rollout": StageState(state="running", started=began)}))
        run.save(state)
        yield run


def test_a_run_that_goes_on_has_its_place_and_its_end(opd, going_on) -> None:
    for command in (("status", "demo"), ("ls",)):
        assert "round 3 of 5, done at about " in " ".join(opd(*command).out.split())
    found = json.loads(opd("status", "demo", "--json").out)
    assert found["pace"].startswith("round 3 of 5, done at about ") and any("opd watch" in c for c in found["next"])


def test_watch_ends_with_the_run_and_changes_nothing(opd, going_on, example_store: Path) -> None:
    files = sorted(path for path in example_store.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}

    def end() -> None:
        state = going_on.state
        state.status = "finished"
        going_on.save(state)

    assert opd("watch", "nobody").code == 2
    state_file = going_on.directory / "state.json"
    holder = Run.holder
    seen = []

    def held(run: Run) -> str | None:
        seen.append(run.name)
        if len(seen) == 3:
            end()
        return holder(run) if len(seen) < 4 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "holder", held)
        result = opd("watch", "demo", "--every", "0.2")
    assert result.code == 0 and "demo  running" in result.out and "demo  finished" in result.out
    assert {path: path.read_bytes() for path in files if path != state_file} == {
        path: text for path, text in before.items() if path != state_file
    }
    assert sorted(path for path in example_store.rglob("*") if path.is_file()) == files


def test_watch_of_a_failed_run_is_exit_1(opd, example_store: Path) -> None:
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        state.status, state.error = "failed", "no"
        run.save(state)
    assert opd("watch", "demo").code == 1 and opd("watch", "other").code == 0


def test_a_warning_is_in_status_and_its_json(opd, example_store: Path) -> None:
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        state.rounds[-1].metrics["rollout_clipped_ratio"] = 1.0
        run.save(state)
    assert "warning: round 2: 100% of the rollouts" in opd("status", "demo").out
    (line,) = json.loads(opd("status", "demo", "--json").out)["warnings"]
    assert "rollout.max_completion_length" in line


def test_a_run_that_a_rule_ended_says_so(opd, example_store: Path) -> None:
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        state.ended = "after round 2: policy.stop.accuracy: 75.0% is at least 70.0%"
        run.save(state)
    assert "demo  ended by a rule after round 2: policy.stop.accuracy" in opd("status", "demo").out
    assert "ended by a rule" in " ".join(opd("ls").out.split())
    assert {line["name"]: line["ended"] for line in json.loads(opd("ls", "--json").out)}["demo"] == state.ended


@pytest.mark.parametrize(
    ("text", "option", "found"),
    [
        ("demo", None, ("demo", None)),
        ("demo", 3, ("demo", 3)),
        ("demo@2", None, ("demo", 2)),
        ("demo@2", 2, ("demo", 2)),
    ],
)
def test_a_round_is_named_behind_the_run(text: str, option: int | None, found: tuple[str, int | None]) -> None:
    assert at_round(text, option) == found


@pytest.mark.parametrize(("text", "option"), [("demo@", None), ("demo@x", None), ("demo@-1", None), ("demo@2", 3)])
def test_two_rounds_and_no_number_are_refused(text: str, option: int | None) -> None:
    with pytest.raises(InputError):
        at_round(text, option)


def test_a_round_can_be_named_wherever_a_run_is_asked(opd, tmp_path: Path) -> None:
    assert json.loads(opd("export", "demo@1", tmp_path / "one", "--json").out)["round"] == 1
    assert opd("export", "demo@1", tmp_path / "two", "--best").code == 2
    assert "/1/0" in opd("show", "demo@1", "--json").out
    refused = opd("show", "demo@9")
    assert refused.code == 2 and "of 1, 2 it has" in refused.err
    rows = json.loads(opd("query", "demo@1", "worst-tokens", "--json").out)
    assert rows and all("/1/0" in row["sample_id"] for row in rows)
    sql = opd("query", "demo@1", "SELECT 1")
    assert sql.code == 2 and "WHERE round = 1" in sql.err
    assert opd("evaluate", "demo@9").code == 2


def test_differences_are_the_second_minus_the_first_wherever_two_runs_are_compared(opd, example_store: Path) -> None:
    """`third` has in its round 1 the evaluation of the other run's round 2, which has one prompt of four more right."""
    rounds = Run.open(example_store, "demo").state.rounds
    third = Run.create(example_store, "third", Run.open(example_store, "demo").experiment, {"seed": 3})
    with third.lock():
        state = third.state
        stages = rounds[1].stages | {"evaluate": rounds[2].stages["evaluate"]}
        state.rounds = [rounds[0], rounds[1].model_copy(update={"stages": stages, "metrics": rounds[2].metrics})]
        third.save(state)
    (line,) = json.loads(opd("compare", "demo@1", "third@1", "--json").out)
    assert line["metrics"]["accuracy_greedy"]["difference"] == pytest.approx(0.25)
    assert "second - first" in opd("compare", "demo@1", "third@1").out
    asked = json.loads(opd("query", "demo", "two-runs", "other=third", "metric=accuracy_greedy", "--json").out)
    assert [(row["round"], row["other_minus_value"]) for row in asked] == [(0, 0.0), (1, pytest.approx(0.25))]
    assert asked[1]["other_value"] - asked[1]["value"] == pytest.approx(0.25)


def test_python_and_the_command_line_agree_on_a_run_whose_process_is_gone(opd, example_store: Path) -> None:
    run = Run.open(example_store, "demo")
    state = run.state
    state.status = "running"
    run.save(state)  # nobody holds it
    lab = opdflow.open(example_store)
    shown = {line["name"]: line for line in json.loads(opd("ls", "--json").out)}
    assert lab.run("demo").status == shown["demo"]["status"] == "stopped"
    assert {row["run"]: row["status"] for row in lab.runs} == {name: line["status"] for name, line in shown.items()}
    assert {row["run"]: row["rounds"] for row in lab.runs} == {name: line["round"] for name, line in shown.items()}
    assert "stopped, round 2" in repr(lab.run("demo"))


def test_a_round_that_is_not_there_names_those_that_are(example_store: Path) -> None:
    demo = opdflow.open(example_store).run("demo")
    assert len(demo.tokens(round=1)) > 0
    with pytest.raises(InputError, match=r"round=9: run 'demo' has the rounds 0, 1, 2"):
        demo.tokens(round=9)


def test_the_list_of_questions_is_not_padded_in_a_pipe(opd) -> None:
    assert all(line == line.rstrip() for line in opd("query", "--list").out.splitlines())


def test_an_unknown_recipe_is_answered_with_the_nearest_and_all(opd) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'gkd'\?\nrecipes: .*tropd"):
        load_experiment(Path("recipe:gdk"))


def test_a_quiet_call_prints_no_json() -> None:
    for both in ({"json": True}, {"verbose": True}):
        with pytest.raises(InputError, match="--quiet"):
            Output(quiet=True, **both)


def test_what_a_repeated_fork_changes_is_named(tmp_path: Path) -> None:
    open_run(load_experiment(TINY), "base", tmp_path)
    first = fork_experiment("base", 0, tmp_path, ["train.lr=0.5"])
    run = open_run(first, "wider", tmp_path)
    again = fork_experiment("base", 0, tmp_path, ["train.lr=0.5", "policy.rounds=9"])
    assert open_run(again, "wider", tmp_path).name == "wider"
    assert changed_fields(run.experiment, first) == []
    assert changed_fields(run.experiment, again) == ["policy.rounds 9 instead of 3"]
