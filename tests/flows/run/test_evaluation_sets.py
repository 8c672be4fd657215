"""Named evaluation sets: measured beside the main evaluation, of which they change nothing; refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import scripted_run
from in_process import InProcess, go
from scripted_run import EXPERIMENT, NAME, prepare_root

from flows.cli.of_sets import sets_table
from flows.experiment import Experiment, load_experiment
from flows.run import prompt_checks
from flows.run.further_set import further_set, parse_verifier
from flows.run.runner import run_experiment, stored_experiment
from storage.artifacts.digests import table_digest
from storage.errors import ConfigError, InputError
from storage.query.catalog import Catalog
from storage.runs import Run
from storage.schemas import schema_for
from storage.store import Store
from tasks.evaluate import EvaluateConfig
from tasks.inputs.sources import read_rows
from tasks.prepare import prepare_work

DIGITS = {"kind": "exact_match", "extract": r"(\d+)$"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return prepare_root(tmp_path / "store")


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    """A file of three prompts with answers."""
    path = tmp_path / "hard.jsonl"
    rows = [{"id": f"eval{n}", "prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(3)]  # ids of the main set's
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prepare(root: Path, e: Experiment, one: Any) -> None:
    """The set's prompts, as `prepare_root` makes those of the run: no tokenizer is loaded."""
    store = Store(root)
    models = sorted(store.list("model"), key=lambda model: model.inputs != {} and str(model.identity))
    student, teacher = (
        next(m for m in models if m.identity == spec.identity)
        for spec in (scripted_run.model_work(side.source, e.seed).outputs["model"] for side in (e.student, e.teacher))
    )
    rows = [
        {"prompt_id": r.id, "split": "eval", "text": r.prompt, "token_ids": list(r.prompt.encode()), "answer": r.answer}
        for r in read_rows(one.prompts)[0]
    ]
    table = pa.Table.from_pylist(rows, schema=schema_for("prompts"))
    work = prepare_work(e.prompts.only(one.prompts), student, teacher, memo=store.memo, store=store)
    with store.building(work.outputs["prepare"]) as builder:
        builder.write_shard("prompts", 0, table)
        builder.write_shard(
            "vocabulary", 0, pa.table({n: [] for n in schema_for("vocabulary").names}, schema=schema_for("vocabulary"))
        )
        builder.commit(
            content={"prompts:eval": table_digest(table), "audit": "0" * 64},
            meta={"audit": {"masked_ids": [], "teacher": {"rows": scripted_run.ROWS}}},
            tables={"prompts": 1, "vocabulary": 1},
        )


def with_set(hard: Path, **more: Any) -> Experiment:
    sets = {"hard": {"prompts": {"kind": "file", "path": str(hard)}, "verifier": DIGITS} | more}
    evaluate = EXPERIMENT["evaluate"] | {"sets": sets}
    return Experiment.model_validate(EXPERIMENT | {"evaluate": evaluate, "policy": {"rounds": 1}})


def test_a_set_of_the_config_is_measured_beside_the_main_one_whose_key_stays(root: Path, hard: Path) -> None:
    e = with_set(hard)
    prepare(root, e, e.evaluate.sets["hard"])
    go(root, scripted_run.experiment(1), "plain")
    go(root, e, "sets")
    plain, state = Run.open(root, "plain").state, Run.open(root, "sets").state
    for round, before in zip(state.rounds, plain.rounds, strict=True):
        assert round.stages["evaluate"].artifacts == before.stages["evaluate"].artifacts
        assert round.stages["evaluate_hard"].artifacts != before.stages["evaluate"].artifacts
        own = {name: value for name, value in round.metrics.items() if not name.startswith("evaluate_hard_")}
        assert own == before.metrics
        assert round.metrics["evaluate_hard_accuracy_greedy_n"] == 3
        assert round.metrics["evaluate_hard_reverse_kl"] is None
    table = sets_table(state)
    assert table is not None and table.row_count == 2 and sets_table(plain) is None
    ask = lambda sql: Catalog(Store(root), Run.open(root, "plain"), Run.open(root, "sets")).query(sql).to_pylist()  # noqa: E731
    (counted,) = ask("SELECT count(*) AS n, min(set_name) AS of FROM set_evaluations WHERE run = 'sets' AND round = 1")
    assert counted == {"n": 3, "of": "hard"}
    rows = "SELECT count(*) AS n FROM {} WHERE run = '{}'"
    for view in ("evaluations", "prompts", "vocabulary", "tokens", "differences"):
        assert ask(rows.format(view, "sets")) == ask(rows.format(view, "plain")), view


def test_another_set_for_a_run_that_exists(root: Path, hard: Path) -> None:
    go(root, scripted_run.experiment(1), NAME)
    run = Run.open(root, NAME)
    before = run.state
    e = stored_experiment(run)
    one = further_set(run, e, "hard", str(hard), r"exact_match:(\d+)$", 2, [1])
    prepare(root, e, one.set)
    pool: Any = InProcess()
    run_experiment(
        e, name=NAME, root=root, rounds=1, prefect=False, workers=pool, evaluated=lambda _: False, on_set=one
    )
    state = Run.open(root, NAME).state
    assert "evaluate_hard" in state.rounds[1].stages and "evaluate_hard" not in state.rounds[0].stages
    assert state.rounds[1].metrics["evaluate_hard_accuracy_greedy_n"] == 2
    for then, now in zip(before.rounds, state.rounds, strict=True):
        assert then.stages.items() <= now.stages.items() and then.metrics.items() <= now.metrics.items()
        assert then.student_sha256 == now.student_sha256
    go(root, scripted_run.experiment(2), NAME)  # and the run goes on
    state = Run.open(root, NAME).state
    assert "evaluate_hard" in state.rounds[1].stages and "evaluate_hard" not in state.rounds[2].stages

    run = Run.open(root, NAME)
    further_set(run, e, "hard", str(hard), r"exact_match:(\d+)$", 2, [2])  # the same set, another round
    with pytest.raises(InputError, match=r"--set-name hard: .*another verifier or limit \(round 1\)"):
        further_set(run, e, "hard", str(hard), "math_verify", 2, [2])
    hard.write_text(hard.read_text().replace("1+1", "1+2"))
    with pytest.raises(InputError, match=r"--set-name hard: .*other prompts"):
        further_set(run, e, "hard", str(hard), r"exact_match:(\d+)$", 2, [2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"prompts": "{path: hard.jsonl, columns: {promt: q}}"}, "promt"),
        ({"prompts": "{path: hard.jsonl, columns: {answer: solution}}"}, "solution"),
        ({"prompts": "open.jsonl"}, "1 of 1 rows have no answer .*open.jsonl:1"),
        ({"verifier": "exact"}, "--verifier 'exact': unknown kind 'exact'; write exact_match"),
        ({"verifier": "exact_match:("}, "extract"),
        ({"verifier": "math_verify:soon"}, "'soon' is not a number"),
        ({"verifier": "function"}, "function:MODULE:FUNCTION"),
        ({"verifier": "function:nowhere:judge"}, "no module 'nowhere'"),
        ({"name": "Hard"}, "Hard"),
    ],
)
def test_a_set_that_cannot_be_measured_is_refused(
    root: Path, hard: Path, monkeypatch, changes: dict[str, Any], message: str
) -> None:
    (hard.parent / "open.jsonl").write_text('{"prompt": "1+1="}\n')
    monkeypatch.chdir(hard.parent)
    go(root, scripted_run.experiment(1), NAME)
    run = Run.open(root, NAME)
    given = {"name": "hard", "prompts": str(hard), "verifier": None} | changes
    with pytest.raises((ConfigError, InputError), match=message):
        further_set(run, stored_experiment(run), given["name"], given["prompts"], given["verifier"], None, [1])


def test_a_set_in_a_config_is_checked_with_it(tmp_path: Path, hard: Path) -> None:
    path = tmp_path / "config.yaml"
    sets = {"hard": {"prompts": "hard.jsonl", "verifier": "math_verify"}}
    path.write_text(json.dumps(EXPERIMENT | {"evaluate": EXPERIMENT["evaluate"] | {"sets": sets}}))
    (one,) = load_experiment(path).evaluate.sets.values()
    assert one.prompts.path == hard and one.verifier is not None and one.verifier.kind == "math_verify"
    for wrong, message in (("evaluate.greedy=false", "sets.hard: nothing to evaluate"), ("evaluate.sets.A={}", "sets")):
        with pytest.raises(ConfigError, match=message):
            load_experiment(path, [wrong])


@pytest.mark.parametrize(("row", "wrong"), [('{"prompt": "1+1="}', True), ('{"prompt": "1+1=", "answer": "2"}', False)])
def test_a_row_without_an_answer_is_refused_before_an_engine_starts(hard: Path, row: str, wrong: bool) -> None:
    hard.write_text(row + "\n")
    known = SimpleNamespace(experiment=with_set(hard))
    found = list(prompt_checks.evaluation_sets(known))  # type: ignore[arg-type]
    assert [(f.refused, "evaluate.sets.hard.prompts: 1 of 1 rows" in f.text) for f in found] == [(True, True)] * wrong


def test_identity_is_that_of_before_where_there_is_no_set() -> None:
    from storage.identity import canonical_json

    assert b"sets" not in canonical_json(EvaluateConfig()).encode()


def test_verifiers_are_written_in_one_word() -> None:
    assert parse_verifier("none") is None
    assert parse_verifier("math_verify") == {"kind": "math_verify"}
    assert parse_verifier("math_verify:5") == {"kind": "math_verify", "timeout": 5.0}
    assert parse_verifier(r"exact_match:#(\d+):$") == {"kind": "exact_match", "extract": r"#(\d+):$"}
    assert parse_verifier("function:mine:judge") == {"kind": "function", "target": "mine:judge"}
