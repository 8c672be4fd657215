"""`supervise.teacher: none`: a run on rewards alone asks the teacher nothing, and everything that reads runs copes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from places import CHECKOUT, PLUGINS
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.config_file import merge
from flows.cross_checks import NO_TEACHER_PASS
from flows.experiment import Experiment, experiment_of, load_experiment
from storage.errors import ConfigError
from storage.query.catalog import Catalog
from storage.query.questions import questions
from storage.runs import Run
from storage.store import Store

REWARDED = {
    "objective": {"estimator": "credit", "reward": "group"},
    "judge": {"verifiers": [{"kind": "function", "target": "judges:parity"}]},
    "rollout": {"top_p": 1.0},
    "supervise": {"teacher": {"kind": "none"}},
}


def config(over: dict[str, Any] | None = None) -> Experiment:
    return experiment_of(merge(scripted_run.EXPERIMENT, merge(REWARDED, over or {})), "test")


@pytest.fixture(autouse=True)
def _judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGINS))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"objective": {"add": "log_ratio"}}, "estimator credit reads the teacher's log-probabilities"),
        ({"objective": {"reference": {}}}, "estimator credit reads the teacher's log-probabilities"),
        ({"objective": {"beside": {}}}, "the signal 'student_topk' of this objective is made by running the teacher"),
        (
            {"teacher": {"context": "{answer} {prompt}"}, "evaluate": {"kl_prompts": 0}},
            "teacher.context: no teacher reads it",
        ),
        ({"supervise": {"student": "none"}}, "supervise.student is none"),
    ],
)
def test_what_reads_the_teacher_is_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(over)
    assert config({"objective": {"reference": {"to": "rollout"}}}).objective.reference is not None


def test_other_estimators_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.estimator direct reads the teacher"):
        experiment_of(merge(scripted_run.EXPERIMENT, {"supervise": {"teacher": {"kind": "none"}}}), "test")


def test_the_recipe_of_grpo_has_no_teacher_pass() -> None:
    recipes = {path.stem: load_experiment(path) for path in CHECKOUT.glob("configs/recipes/*.yaml")}
    assert {name for name, e in recipes.items() if not e.supervise.teacher.asked} == {"grpo"}
    alone = {n for n, e in recipes.items() if e.objective.estimator == "credit" and not e.objective.reads_teacher}
    assert alone == {"grpo"}


def test_a_run_asks_the_teacher_nothing_and_is_shown(tmp_path: Path) -> None:
    e = config({"evaluate": {"kl_prompts": 0}, "policy": {"rounds": 2}})
    root = scripted_run.prepare_root(tmp_path / "store", e)
    in_process.go(root, e)
    counts = "SELECT count(*) AS n, count(teacher_logprob) AS t, count(student_logprob) AS s FROM tokens"
    [row] = Catalog(Store(root)).query(counts).to_pylist()
    assert row["n"] == row["s"] > 0 and row["t"] == 0
    assert [r.round for r in Run.open(root, "one").state.rounds if "train" in r.stages] == [1, 2]
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(e.model_dump(mode="json")))
    page = tmp_path / "page.html"
    sample = Catalog(Store(root)).query("SELECT sample_id FROM rollouts LIMIT 1").to_pylist()[0]["sample_id"]

    def shown(*words: str) -> str:
        result = CliRunner().invoke(
            make_app(), [*words, "--root", str(root)], env={"COLUMNS": "200"}, catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    assert NO_TEACHER_PASS in shown("run", str(file), "--dry-run").replace("\n", " ")
    for words in (("status", "one"), ("status", "one", "--json"), ("show", "one"), ("show", "one", "--sample", sample)):
        shown(*words)
    shown("report", "one", "-o", str(page))
    assert page.stat().st_size > 10_000
    for name, asked in questions().items():
        if all(parameter.choices or parameter.default is not None for parameter in asked.parameters):
            shown("query", "one", name)
