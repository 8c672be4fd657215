"""Another evaluation set, and tasks of lm-eval, on a round of a true run, with real engines."""

from __future__ import annotations

import json
import shutil

import pytest
from lm_eval_tasks import needs_package, write_choices
from opd_cli import opd

from storage.query.catalog import Catalog
from storage.runs import Run
from storage.store import Store


@pytest.mark.slow
def test_a_round_is_measured_on_prompts_of_a_file_and_nothing_else_changes(finished, tmp_path):
    root = tmp_path / "store"
    shutil.copytree(finished.root, root)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in ((11, 12), (20, 30), (45, 54))]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "base", "--round", 2, "--prompts", tmp_path / "sums.jsonl"]
    done = opd(*command, root=root)
    assert "sums" in done.stdout
    before, after = finished.status["rounds"], json.loads(opd("status", "base", "--json", root=root).stdout)["rounds"]
    for then, now in zip(before, after, strict=True):
        assert then["metrics"].items() <= now["metrics"].items() and then["stages"].items() <= now["stages"].items()
        assert ("evaluate_sums" in now["stages"]) == (now["round"] == 2)
    assert after[2]["metrics"]["evaluate_sums_accuracy_greedy_n"] == 3
    sql = "SELECT round, set_name, completion_text, correct FROM set_evaluations ORDER BY prompt_id"
    answers = Catalog(Store(root), Run.open(root, "base")).query(sql).to_pylist()
    assert [(row["round"], row["set_name"]) for row in answers] == [(2, "sums")] * 3
    again = json.loads(opd(*command, "--json", root=root).stdout)
    assert again["stages_built"] == 0
    refused = opd(*command, "--verifier", "math_verify", root=root, check=False)
    assert refused.returncode == 2 and "choose another name" in refused.stderr


@pytest.mark.slow
@needs_package
def test_a_task_of_lm_eval_is_asked_of_a_rounds_student(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    root, folder = tmp_path / "store", tmp_path / "tasks"
    shutil.copytree(finished.root, root)
    folder.mkdir()
    write_choices(folder, "low", 6)
    command = ["evaluate", "base", "--round", 2, "--tasks", "sums_low", "--include-path", folder]
    assert "sums_low" in opd(*command, root=root).stdout
    status = json.loads(opd("status", "base", "--json", root=root).stdout)
    metrics = [r["metrics"] for r in status["rounds"]]
    assert ["harness_sums_low_acc" in found for found in metrics] == [r["round"] == 2 for r in status["rounds"]]
    assert metrics[2]["harness_sums_low_acc_n"] == 6
    catalog = Catalog(Store(root), Run.open(root, "base"))
    (row,) = catalog.query("SELECT round, value, n FROM harness_results WHERE metric = 'acc'").to_pylist()
    answered = catalog.query("SELECT value, answers FROM harness_samples ORDER BY doc_id").to_pylist()
    # of two choices the likelier one counts, and the sum is the first where the number is even
    right = []
    for number, sample in enumerate(answered):
        (first, _), (second, _) = json.loads(sample["answers"])
        right.append((first < second) == bool(number % 2))
    assert [bool(sample["value"]) for sample in answered] == right
    assert row == {"round": 2, "value": pytest.approx(sum(right) / 6), "n": 6}
    assert "sums_low" in opd("status", "base", root=root).stdout
    again = json.loads(opd(*command, "--json", root=root).stdout)
    assert again["stages_built"] == 0
