"""`opd evaluate NAME --stress`: verifiers that form alone impresses, and those that it does not."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_store import commit, evaluation, prepared, rollouts, stage
from places import TINY
from registries import plugin_path
from rich.console import Console
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.cli.stressed import print_stress
from flows.experiment import load_experiment
from flows.run.stress import SAMPLES, Stress, Stressed, stress
from storage.errors import ConfigError, InputError
from storage.runs import RoundState, Run
from storage.store import Store
from tasks.inputs.transformations import NEUTRAL, TRANSFORMATIONS

STEPS = "Step 1: a pen costs 2.\nStep 2: Bob walks 20 metres.\n#### {}"
ANSWERS = 20
NUMBER = {"kind": "exact_match", "extract": r"#### (.*)$"}
LONGER = {"kind": "function", "target": "judges:longer"}


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


def add_run(root: Path, name: str = "one", *changes: str) -> Run:
    """A run whose round 1 has held-out completions of three steps (of the prompts below `ANSWERS` right: all have the answer a)
    and of one line, and rollouts of eight tokens; its round 0 has neither."""
    store = Store(root)
    texts = [STEPS.format("a" if n < ANSWERS else "b") if n < 25 else "a" for n in range(30)]
    rows = [row | {"completion_text": texts[int(row["prompt_id"][4:])]} for row in evaluation(1)]
    tables = rollouts(name, 1, 12, 8)
    made = {
        "rollout": stage(rollout=commit(store, "rollout", name, {"rollouts": tables["rollouts"]})),
        "evaluate": stage(evaluate=commit(store, "evaluate", name, {"evaluations": rows})),
    }
    run = Run.create(root, name, load_experiment(TINY, list(changes)).model_dump(mode="json"), {"name": name})
    with run.lock():
        state = run.state
        state.status = "finished"
        state.rounds = [
            RoundState(round=0, student_sha256="0" * 64, stages={"prepare": stage(prepare=prepared(store))}),
            RoundState(round=1, student_sha256="1" * 64, stages=made),
        ]
        run.save(state)
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stress") / "store"


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    judge = json.dumps({"verifiers": [LONGER, {"kind": "function", "target": "judges:graded"}]})
    return add_run(root, "one", f"evaluate.verifier={json.dumps(NUMBER)}", f"judge={judge}")


@pytest.fixture(scope="module")
def result(run: Run, root: Path) -> Stress:
    return stress(run, 1, Store(root))


def by_name(rows: tuple[Stressed, ...]) -> dict[tuple[str, str], Stressed]:
    return {(row.verifier, row.transformation): row for row in rows}


def test_a_verifier_that_reads_the_answer_alone_never_changes(result: Stress) -> None:
    found = by_name(result.rows)
    own = {how: row for (name, how), row in found.items() if name == "exact_match"}
    assert set(own) == {"again", *TRANSFORMATIONS}
    assert all((row.changed, row.changed_se, row.reward_change) == (0, 0, 0) for row in own.values())
    assert {how: (row.n, row.unchanged) for how, row in own.items()} == {
        "again": (30, 0), "renumber": (25, 5), "reorder": (25, 5), "pad": (30, 0), "confident": (25, 5),
    }  # fmt: skip
    assert own["pad"].reward == pytest.approx(ANSWERS / 30) and own["renumber"].reward == pytest.approx(ANSWERS / 25)
    assert {(row.completions, row.prompts, row.no_verdict) for row in own.values()} == {
        ("held-out", 30, 0),
        ("held-out", 25, 0),
    }


def test_a_verifier_that_compares_the_whole_text_is_told_by_how_often_and_its_error(run: Run, root: Path) -> None:
    """exact_match without a pattern: five completions are the answer alone, and wrong with a line before it."""
    rows = stress(run, 1, Store(root), verifier="exact_match").rows
    held = [row for row in rows if row.completions == "held-out"]
    assert {row.completions for row in rows} == {"held-out", "rollouts"}
    padded = next(row for row in held if row.transformation == "pad")
    moved = np.array([-1.0] * 5 + [0.0] * 25)
    assert padded.changed == pytest.approx(5 / 30) and padded.lower == pytest.approx(5 / 30) and padded.higher == 0
    assert padded.reward_change == pytest.approx(moved.mean())
    assert padded.changed_se == pytest.approx(moved.std(ddof=1) / 30**0.5)
    assert next(row for row in held if row.transformation == "again").changed == 0


def test_a_reward_that_grows_with_the_length_rises(result: Stress) -> None:
    """judges:longer is len / 8; its 12 completions answer 12 prompts. judges:graded reads tokens, and is left out."""
    found = by_name(result.rows)
    padded = found["judges:longer", "pad"]
    assert padded.completions == "rollouts" and padded.n + padded.unchanged == 12
    assert padded.changed == padded.higher == 1 and padded.lower == 0
    assert padded.reward_change is not None and padded.reward_change >= (len(NEUTRAL) + 1) / 8
    assert not [name for name, _ in found if name == "judges:graded"]
    assert any("judges:graded: left out, it reads token_ids and tokens" in note for note in result.notes)


def test_a_verifier_without_a_verdict_is_counted(root: Path) -> None:
    judge = json.dumps({"verifiers": [{"kind": "function", "target": "judges:named"}]})
    run = add_run(root, "failing", "evaluate.verifier=null", f"judge={judge}")
    rows = stress(run, 1, Store(root)).rows
    assert {row.verifier for row in rows} == {"judges:named"}
    assert all(row.n == 0 and row.changed is row.changed_se is row.reward_change is None for row in rows)
    assert next(row for row in rows if row.transformation == "again").no_verdict == 12


def test_the_same_completions_are_chosen_at_every_call(run: Run, root: Path, result: Stress) -> None:
    one, two = (stress(run, 1, Store(root), limit=7) for _ in range(2))
    assert one == two and {row.n + row.unchanged + row.no_verdict for row in one.rows} == {7}
    assert "held-out: 7 of 30 completions, those whose ids have the smallest sha256" in one.notes
    assert SAMPLES > 30 and not [note for note in result.notes if "sha256" in note]


@pytest.mark.parametrize(
    ("round", "verifier", "error", "message"),
    [
        (0, None, InputError, "nothing to test: exact_match: round 0 has no held-out completions"),
        (1, "none", InputError, "no verifier to test.*--verifier"),
        (1, "exact", ConfigError, "unknown kind 'exact'"),
        (1, "exact_match:(", ConfigError, "not a regular expression"),
        (1, "function:judges:nothing", ConfigError, "judges.*has no function 'nothing'"),
    ],
)
def test_what_is_refused(run: Run, root: Path, round: int, verifier: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        stress(run, round, Store(root), verifier)


def test_a_run_without_a_verifier_is_refused(root: Path) -> None:
    run = add_run(root, "bare", "evaluate.verifier=null")
    with pytest.raises(InputError, match="run 'bare' has no verifier to test"):
        stress(run, 1, Store(root))


def call(root: Path, *arguments: str) -> Any:
    return CliRunner().invoke(make_app(), ["evaluate", *arguments, "--root", str(root)])


def test_the_command(root: Path, result: Stress) -> None:
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    shown = call(root, "one@1", "--stress")
    assert shown.exit_code == 0 and "unchanged" in shown.stdout and "judges:graded: left out" in shown.stdout
    assert "0.0% ± 0.0%" in shown.stdout and "100.0% ± 0.0%" in shown.stdout
    told = json.loads(call(root, "one", "--stress", "--json").stdout)
    assert told == json.loads(json.dumps(result.as_json())) and told["round"] == 1
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before, "nothing is stored"
    for wrong in (("--prompts", "x.jsonl"), ("--set-name", "x"), ("--round", "0", "--round", "1")):
        refused = call(root, "one", "--stress", *wrong)
        assert isinstance(refused.exception, ConfigError) and "--stress" in str(refused.exception)


def test_the_table_fits_a_terminal_of_80_columns(result: Stress) -> None:
    """Every row on one line, with all of its figures; only the legend and the notes wrap."""
    file = io.StringIO()
    print_stress(result, False, Console(width=80, file=file))
    tables = [
        line for line in file.getvalue().splitlines() if line.split(" ")[0] in ("again", "change", *TRANSFORMATIONS)
    ]
    assert max(map(len, tables)) <= 80
    rows = [line.split() for line in tables if not line.startswith("change ")]
    wanted = [(row.transformation, f"{row.n:,}", f"{row.unchanged:,}", f"{row.no_verdict:,}") for row in result.rows]
    assert [(row[0], *row[-3:]) for row in rows] == wanted
