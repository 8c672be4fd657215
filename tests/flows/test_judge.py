"""Rewards in the main path: when they are asked for, what a config must have, and what a run with them has in the store."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from key_walk import keys_of
from places import CHECKOUT, PLUGINS
from registries import plugin_path
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.config_file import merge
from flows.cross_checks import NOT_JUDGED, needs_judge
from flows.experiment import Experiment, experiment_of, load_experiment, with_plugins
from flows.run.executor import Planner
from flows.run.progress import round_line
from flows.run.replay import replay_round
from storage.errors import ConfigError, InputError
from storage.query.catalog import Catalog
from storage.query.questions import question
from storage.runs import Run
from storage.schemas import schema_for
from storage.store import Artifact, Store
from storage.upkeep.gc import Collector
from storage.upkeep.retention import Retention
from tasks.inputs.judging import outcome_of
from tasks.train import train_work

JUDGED = scripted_run.VARIANTS["judged"]
EXACT = {"verifiers": [{"kind": "exact_match"}]}


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


def config(over: dict[str, Any]) -> Experiment:
    plain = {**scripted_run.EXPERIMENT, "objective": JUDGED["objective"], "plugins": JUDGED["plugins"]}
    return experiment_of(merge(plain, over), "test")


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (
            None,
            r"judge: this objective needs a reward of each completion.*judge: \{verifiers: \[\{kind: exact_match\}\]\}",
        ),
        ({"verifiers": []}, r"judge\.verifiers"),
        ({"verifiers": [{"kind": "exact_match", "weight": -1}]}, r"judge\.verifiers\.0\.weight.*found -1"),
        ({"verifiers": [{"kind": "exact_match"}] * 2}, "judge.*two are called 'exact_match'"),
        ({"verifiers": [{"kind": "exactmatch"}]}, r"judge\.verifiers\.0\.kind: 'exactmatch'.*exact_match"),
        ({"verifier": {"kind": "exact_match"}}, r"judge\.verifier: unknown field; did you mean.*verifiers"),
    ],
)
def test_what_is_refused_when_a_config_loads(judge: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config({"judge": judge})


@pytest.mark.parametrize(
    ("recipe", "over", "message"),
    [
        ("trace", {}, r"objective\.route: spans reads the judge's spans, but exact_match gives none"),
        (
            "sod",
            {"objective": {"add": {"segment_ends": [], "segments_of": "judge"}}},
            r"objective\.add\.segments_of: judge reads the judge's segments, but exact_match gives none",
        ),
    ],
)
def test_marks_that_no_verifier_gives_are_refused(recipe: str, over: dict[str, Any], message: str) -> None:
    data = load_experiment(CHECKOUT / f"configs/recipes/{recipe}.yaml").model_dump(mode="json")
    experiment_of(data, "test")
    with pytest.raises(ConfigError, match=message):
        experiment_of(merge(data, {"judge": EXACT, **over}), "test")


def test_a_function_that_is_not_found_is_refused_before_anything_starts() -> None:
    for target, message in (
        ("nowhere_at_all:score", "no module 'nowhere_at_all'"),
        ("judges:gradd", "has no function 'gradd'.*graded"),
        ("judges:one_argument", "takes 1 positional"),
        ("judges:needs_more", "'rubric'"),
    ):
        e = config({"judge": {"verifiers": [{"kind": "function", "target": target}]}})
        with pytest.raises(ConfigError, match=message):
            with_plugins(e)


def test_short_forms_and_modules_beside_the_config(tmp_path: Path) -> None:
    """A verifier may be named alone; the folder of a function's module is found as for an evaluation's."""
    from flows.experiment import load_experiment

    (tmp_path / "beside_judge.py").write_text("def score(completion, answer): return 1\n")
    function = {"kind": "function", "target": "beside_judge:score"}
    data = {**scripted_run.EXPERIMENT, **JUDGED, "judge": {"verifiers": ["exact_match", function]}}
    (tmp_path / "run.yaml").write_text(json.dumps(data))
    e = load_experiment(tmp_path / "run.yaml")
    assert e.judge is not None and e.judge.names == ["exact_match", "beside_judge:score"]
    assert tmp_path in e.runtime.modules
    assert with_plugins(e).judge == e.judge


def test_no_reward_is_asked_for_where_nothing_reads_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    plain = Experiment.model_validate(scripted_run.EXPERIMENT)
    given = Experiment.model_validate(scripted_run.EXPERIMENT | {"judge": EXACT})
    needing = config({"judge": EXACT})
    assert [needs_judge(e) for e in (plain, given, needing)] == [False, False, True]
    assert keys_of(given, store) == keys_of(plain, store)
    stages = [place.split("/")[1] for place in keys_of(needing, store, rounds=1) if place.startswith("1/")]
    assert list(dict.fromkeys(stages)) == ["rollout", "judge", "supervise", "train", "evaluate"]


def test_the_plan_says_that_no_rewards_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    data = {**scripted_run.EXPERIMENT, "judge": EXACT, "plugins": []}
    file.write_text(json.dumps(data))
    shown = CliRunner().invoke(make_app(), ["run", str(file), "--dry-run", "--root", str(tmp_path / "store")])
    assert shown.exit_code == 0 and NOT_JUDGED in shown.stdout.replace("\n", " ")
    file.write_text(json.dumps(data | {"judge": None}))
    shown = CliRunner().invoke(make_app(), ["run", str(file), "--dry-run", "--root", str(tmp_path / "store")])
    assert shown.exit_code == 0 and "so none are asked for" not in shown.stdout


def test_rewards_change_the_key_of_a_training_that_reads_them(tmp_path: Path) -> None:
    def artifact(stage: str, **content: str) -> Any:
        return Artifact(stage=stage, key=stage, content=content, rows={}, identity={}, inputs={}, created="", seconds=0)

    def key(objective: Any, judged: Any) -> str:
        signals = {n.name: artifact(n.name, **{n.name: n.name}) for n in objective.needs().signals}
        work = train_work(e.train, objective, student, None, rollouts, signals, 0, 1, judged=judged)
        return work.outputs["train"].key

    e, plain = config({"judge": EXACT}), Experiment.model_validate(scripted_run.EXPERIMENT)
    student, rollouts = artifact("student", weights="w"), artifact("rollout", rollouts="r")
    one, other = artifact("judge", rewards="one"), artifact("judge", rewards="other")
    assert key(e.objective, one) != key(e.objective, other)
    assert key(plain.objective, one) == key(plain.objective, None)
    with pytest.raises(InputError, match="needs the rewards of the stage `judge`"):
        key(e.objective, None)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a judged run of two rounds; its engines are scripted, its judge is real."""
    root = tmp_path_factory.mktemp("judged") / "store"
    e = scripted_run.experiment(variant="judged")
    scripted_run.prepare_root(root, e)
    in_process.run(root, variant="judged")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def test_the_rewards_of_a_run_in_sql(root: Path) -> None:
    catalog = Catalog(Store(root))
    rows = catalog.query(
        "SELECT w.round, w.sample_id, w.prompt_id, w.sample_index, w.reward, w.parts, w.failed, w.feedback, r.prompt_id AS p,"
        " r.sample_index AS i, len(r.completion_token_ids) AS n, r.completion_text AS text, w.segment_ends, w.span_kinds"
        " FROM rewards w JOIN rollouts r USING (run, round, sample_id) ORDER BY w.round, w.sample_id"
    ).to_pylist()
    assert len(rows) == 16 and {row["round"] for row in rows} == {1, 2}
    for row in rows:
        assert (row["prompt_id"], row["sample_index"]) == (row["p"], row["i"])
        if row["reward"] is None:
            assert "no finite number" in row["failed"] and row["parts"] is None
        else:
            assert row["parts"] == [row["n"] % 2, len(row["text"]) / 4]
            assert row["reward"] == row["parts"][0] + 0.5 * row["parts"][1]
            assert row["segment_ends"] == ([1, row["n"]] if row["n"] > 1 else [1]) and row["span_kinds"] == ["first"]
            assert f"in {row['n']} tokens" in row["feedback"]
    assert 0 < sum(row["reward"] is None for row in rows) < 16
    groups = catalog.query("SELECT * FROM groups ORDER BY round, prompt_id").to_pylist()
    assert len(groups) == 8
    for group in groups:
        own = [r for r in rows if (r["round"], r["prompt_id"]) == (group["round"], group["prompt_id"])]
        known = [r["reward"] for r in own if r["reward"] is not None]
        assert (group["n"], group["n_failed"]) == (len(known), 2 - len(known))
        assert group["mean"] == (pytest.approx(sum(known) / len(known)) if known else None)
        assert group["all_equal"] == (len(set(known)) < 2)
        std = abs(known[0] - known[1]) / 2**0.5 if len(known) == 2 else None
        assert group["std"] == (None if std is None else pytest.approx(std))
    state = Run.open(root, scripted_run.NAME).state
    for round in state.rounds[1:]:
        own = [group for group in groups if group["round"] == round.round]
        assert round.metrics["judge_failed"] == sum(group["n_failed"] for group in own)
        assert round.metrics["judge_groups_without_signal"] == sum(group["all_equal"] for group in own)
        known = [r["reward"] for r in rows if r["round"] == round.round and r["reward"] is not None]
        assert round.metrics["judge_reward"] == pytest.approx(sum(known) / len(known))
        assert round.metrics["judge_reward/judges:moody"] is not None
    asked = question("groups").sql(state, {"round": "1", "success": "0.9"})
    found = catalog.query(asked).to_pylist()
    assert len(found) == 4
    for row in found:
        own = [r["reward"] for r in rows if r["round"] == 1 and r["prompt_id"] == row["prompt_id"]]
        known = [reward for reward in own if reward is not None]
        rate = sum(reward >= 0.9 for reward in known) / len(known) if known else None
        assert row["success_rate"] == (None if rate is None else pytest.approx(rate))


def test_rewards_and_lengths_by_round_are_the_metrics_of_the_stage(root: Path) -> None:
    catalog, state = Catalog(Store(root)), Run.open(root, scripted_run.NAME).state
    found = catalog.query(question("reward-by-round").sql(state, {"success": "0.9"})).to_pylist()
    assert [row["round"] for row in found] == [1, 2]
    names = ("reward", "reward_se", "reward_n", "failed", "groups", "groups_without_signal")
    shown = ("reward", "se", "n", "failed", "groups", "without_signal")
    for row, round in zip(found, state.rounds[1:], strict=True):
        assert [row[name] for name in shown] == pytest.approx([round.metrics[f"judge_{name}"] for name in names])
        assert row["all_right"] + row["all_wrong"] + row["mixed"] <= row["groups"]
    lengths = catalog.query(question("lengths").sql(state, {"of": "rollouts", "success": "0.9"})).to_pylist()
    rows = catalog.query(
        "SELECT round, prompt_id, reward >= 0.9 AS correct, len(completion_token_ids) AS n"
        " FROM rewards JOIN rollouts USING (run, round, sample_id, prompt_id) WHERE reward IS NOT NULL"
    ).to_pylist()
    assert lengths and sum(row["n"] for row in lengths) == len(rows)
    for line in lengths:
        own = [r["n"] for r in rows if (r["round"], r["correct"]) == (line["round"], line["verdict"] == "right")]
        assert line["mean_length"] == pytest.approx(sum(own) / len(own)) and line["n"] == len(own)


def test_what_the_page_says(root: Path) -> None:
    """Its functions return what may be returned, its columns are those of the table, its statements answer."""
    page = (CHECKOUT / "docs" / "rewards.md").read_text()
    code, sql = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("python", "sql"))
    given: dict[str, Any] = {}
    exec(code, given)
    assert outcome_of(given["short"]("x", None), 1).reward == 1.0
    whole = outcome_of(given["steps"]("1 7", "7", ["1\n", "???", "7"]), 3)
    assert (whole.reward, whole.segments, whole.spans) == (1.0, (1,), ((1, 2, "error"),))
    table = page.partition("Table `rewards`")[2].partition("The view")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == list(schema_for("rewards").names)
    catalog = Catalog(Store(root))
    rows = [catalog.query(statement).to_pylist() for statement in sql.split(";") if statement.strip()]
    assert [len(found) for found in rows[:2]] == [2, 2] and len(rows) == 3
    told = set(Run.open(root, scripted_run.NAME).state.rounds[1].metrics)
    cells = re.findall(r"^\| (`judge_.*?) \|", page, re.MULTILINE)
    names = {name.replace("NAME", "judges:graded") for cell in cells for name in re.findall(r"`(.*?)`", cell)}
    assert names and names <= told


def test_status_has_the_reward_of_every_round(root: Path) -> None:
    command = ["status", scripted_run.NAME, "--root", str(root)]
    shown = CliRunner().invoke(make_app(), command, env={"COLUMNS": "200"}, catch_exceptions=False).stdout
    rounds = Run.open(root, scripted_run.NAME).state.rounds
    rewards = [f"{r.metrics['judge_reward']:.3f} ± {r.metrics['judge_reward_se']:.3f}" for r in rounds[1:]]
    assert "reward" in shown and all(reward in shown for reward in rewards)
    assert all(f"reward {reward}" in round_line(r) for reward, r in zip(rewards, rounds[1:], strict=True))
    assert "reward" not in round_line(rounds[0])
    diagnosed = shown.partition("no signal")[2].partition("round 0 is the student")[0]
    cells = [line.split("│")[1:-1] for line in diagnosed.splitlines() if line.count("│") > 1]
    rows = {row[0].strip(): row for row in cells}
    assert {number: row[1].strip() for number, row in rows.items()} == {
        str(r.round): f"{r.metrics['judge_groups_without_signal']:.0f}" for r in rounds[1:]
    }


def test_show_has_the_reward_and_the_feedback(root: Path) -> None:
    sql = "SELECT sample_id, reward, feedback, failed FROM rewards WHERE round = 2 ORDER BY reward NULLS FIRST"
    rows = Catalog(Store(root)).query(sql).to_pylist()
    for row in (rows[0], rows[-1]):
        command = ["show", scripted_run.NAME, "--sample", row["sample_id"], "--root", str(root)]
        shown = CliRunner().invoke(make_app(), command, env={"COLUMNS": "200"}, catch_exceptions=False).stdout
        if row["reward"] is None:
            assert f"no reward: {row['failed']}" in " ".join(shown.split())
        else:
            assert f"reward {row['reward']:g}" in shown and "feedback: " in shown
    assert rows[0]["reward"] is None and rows[-1]["reward"] is not None


def test_it_is_planned_as_cached_collected_and_replayed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.distill import distill

    store, e = Store(root), with_plugins(scripted_run.experiment(variant="judged"))
    planner = Planner(store)
    distill(e, planner, 2)
    assert {line.state for line in planner.lines} == {"cached"}
    assert [line.round for line in planner.lines if line.stage == "judge"] == [1, 2]
    monkeypatch.setenv("PYTHONPATH", str(PLUGINS))
    results = replay_round(
        Run.open(root, scripted_run.NAME), root, 2, ("rollout", "judge", "train"), [], False, lambda _: None
    )
    assert "judge" in {result.artifact.split("/")[0] for result in results}
    assert all(result.as_json()["identical"] for result in results), results
    retain = Retention(rollouts=0, signals=0, trainer_state=1, students=1)
    collector = Collector(store, retention=lambda _: retain)
    collector.apply(collector.plan())
    assert all(store.evicted(artifact) for artifact in store.list("rollout"))
    assert not any(store.evicted(artifact) for artifact in store.list("judge")), (
        "a function's rewards may come only once"
    )
    rows = Catalog(store).query("SELECT count(*) AS n, count(DISTINCT prompt_id) AS p FROM rewards").to_pylist()
    assert rows[0]["n"] == 16 and rows[0]["p"] >= 4


def test_a_round_without_a_judge_has_none_to_replay(tmp_path: Path) -> None:
    root = scripted_run.prepare_root(tmp_path / "store")
    in_process.run(root, 1)
    with pytest.raises(InputError, match="round 1 has no stage judge"):
        replay_round(Run.open(root, scripted_run.NAME), root, 1, ("judge",), [], False, lambda _: None)


def test_rewards_by_changed_code_are_said_to_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the plan and in the run, also under another name; once, and not of rollouts that were never judged."""
    from flows.run.runner import plan

    file = tmp_path / "edited_judge.py"
    file.write_text("def score(completion, answer): return len(completion) / 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    e = config(
        {"judge": {"verifiers": [{"kind": "function", "target": "edited_judge:score"}]}, "policy": {"rounds": 2}}
    )
    root = scripted_run.prepare_root(tmp_path / "store", e)
    assert not [text for text in in_process.go(root, e) if "judged again" in text]
    [before] = [Run.open(root, "one").state.rounds[1].stages["judge"].artifacts["judge"]]
    file.write_text("def score(completion, answer): return len(completion) / 2\n")
    notes = [(line.round, line.stage, note) for line in plan(e, root, name="one") for note in line.notes]
    assert [place[:2] for place in notes] == [(1, "judge")]
    text = notes[0][2]
    assert text.startswith("the code of 'edited_judge:score' has changed") and f"judge/{before}" in text
    for name in ("one", "other"):
        said = in_process.go(root, e, name)
        assert said.count(text) == (name == "one"), "the second run finds the new rewards"
    assert Store(root).get("judge", before) is not None
    assert Run.open(root, "one").state.rounds[1].stages["judge"].artifacts["judge"] != before
    file.write_text("def score(completion, answer): return len(completion) / 2  # other\n")
    listed, plain = [], Store.list
    monkeypatch.setattr(Store, "list", lambda self, stage=None: listed.append(stage) or plain(self, stage))
    assert [text.replace(before, "") for text in in_process.go(root, e, "third") if "judged again" in text]
    assert listed.count("judge") <= 2, "once when it is planned and once when it is made, whatever the number of rounds"
