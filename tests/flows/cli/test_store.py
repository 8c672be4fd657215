"""`opd verify`, `gc`, and how the commands that look speak of what was evicted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from opd_cli import in_this_process
from small_store import flip

from storage.runs import Run
from storage.store import Store


@pytest.fixture
def opd(monkeypatch, capsys, tmp_path, example_store):
    monkeypatch.chdir(tmp_path)
    return in_this_process(monkeypatch, capsys, example_store)


def a_file(root: Path, run: str, round: int, label: str, stage: str) -> Path:
    key = Run.open(root, run).state.rounds[round].stages[label].artifacts[stage]
    return max((root / "artifacts" / stage / key).rglob("*.parquet"))


def test_verify_says_what_it_read(opd):
    result = opd("verify", "demo")
    assert (result.code, result.err) == (0, "")
    assert (
        "verified run 'demo': 16 artifacts" in result.out and "files" in result.out and "no damage found" in result.out
    )
    data = json.loads(opd("verify", "--all", "--json").out)
    assert data["artifacts"] == 17 and data["bytes"] > 0 and data["problems"] == []


def test_verify_names_the_damage_moves_it_and_names_the_command(opd, example_store):
    path = a_file(example_store, "demo", 1, "rollout", "rollout")
    flip(path, 300)
    result = opd("verify", "demo")
    assert result.code == 1
    assert f"{path}: sha256 differs" in result.err and "1 damaged piece moved to" in result.err
    assert "opd resume demo --root" in result.err
    assert not path.exists() and len(list((example_store / "quarantine").glob("*.reason.json"))) == 1
    again = opd("verify", "--all")
    assert again.code == 1 and "missing" in again.err


@pytest.mark.parametrize("args", [["verify"], ["verify", "demo", "--all"], ["verify", "nobody"]])
def test_verify_wants_one_run_or_all(opd, args):
    assert opd(*args).code == 2


def test_gc_shows_first_and_removes_when_told(opd, example_store):
    shown = opd("gc", "--keep", "rollouts=1", "--keep", "students=1")
    assert shown.code == 0
    # run other ends with round 1, which it keeps; demo ends with round 2: what only demo uses of round 1 is nothing
    assert "nothing was removed" in shown.out and "unused" in shown.out and "evicted" not in shown.out
    both = opd("gc", "--keep", "rollouts=0", "--json")
    kinds = sorted(item["kind"] for item in json.loads(both.out)["items"])
    assert kinds == ["evicted", "evicted", "unused"]
    assert opd("verify", "--all").code == 0
    done = opd("gc", "--keep", "rollouts=0", "--apply")
    assert done.code == 0 and "removed " in done.out
    assert "nothing to remove" in opd("gc", "--keep", "rollouts=0").out
    assert len(Store(example_store).list("rollout")) == 2


@pytest.mark.parametrize(
    ("keep", "says"),
    [("rollouts", "WHAT=ROUNDS"), ("rolouts=1", "the fields are rollouts"), ("students=0", "greater than or equal")],
)
def test_gc_refuses_what_it_does_not_understand(opd, keep, says):
    result = opd("gc", "--keep", keep, "--apply")
    assert result.code == 2 and says in result.err


def test_evicted_is_said_wherever_one_looks(opd, example_store):
    opd("gc", "--keep", "rollouts=0", "--keep", "signals=0", "--keep", "students=1", "--apply")
    state = json.loads(opd("status", "demo", "--json").out)
    rollout = state["rounds"][1]["stages"]["rollout"]
    assert (
        rollout["evicted"] == [f"rollout/{rollout['key']}"] and state["rounds"][0]["stages"]["prepare"]["evicted"] == []
    )
    shown = opd("status", "demo").out
    assert "rollout 2.0 (evicted)" in shown and "opd restore demo --round 1" in shown
    assert json.loads(opd("ls", "--json").out)[0]["evicted_rounds"] == [1, 2]
    assert "of 2 rounds" in opd("ls").out
    sql = "SELECT stage, count(*) AS n FROM artifacts WHERE evicted IS NOT NULL GROUP BY stage ORDER BY stage"
    gone = opd("query", sql, "--json")
    assert json.loads(gone.out) == [{"stage": s, "n": 2} for s in ("mask", "rollout", "sampled")]


@pytest.mark.parametrize("view", ["rollouts", "tokens", "supervision"])
def test_a_query_that_needs_evicted_rows_says_so_and_others_answer(opd, example_store, view):
    before = opd("query", "demo", f"SELECT count(*) AS n FROM {view} WHERE round = 2", "--json").out
    shutil.rmtree(example_store / "runs" / "other")  # it would keep round 1, its last
    opd("gc", "--keep", "rollouts=1", "--keep", "signals=1", "--apply")
    assert opd("query", "demo", f"SELECT count(*) AS n FROM {view} WHERE round = 2", "--json").out == before
    for sql in (f"SELECT count(*) AS n FROM {view}", f"SELECT * FROM {view} ORDER BY sample_id LIMIT 1"):
        result = opd("query", "demo", sql)
        assert result.code == 1 and result.out == ""
        assert "evicted" in result.err and "opd restore demo --round 1" in result.err and "round > 1" in result.err
    assert opd("query", "demo", "SELECT count(*) FROM evaluations").code == 0
