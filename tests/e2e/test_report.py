"""The page of the true run: what it shows is what the store has."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from page_reader import PageReader


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "base.html"
    said = finished.opd("report", "base", "-o", file).stdout
    assert str(file) in said
    return file


@pytest.fixture(scope="module")
def shown(written) -> PageReader:
    return PageReader(written.read_bytes())


def test_it_is_small_whole_and_alone(written, shown):
    assert 200_000 < written.stat().st_size < 5_000_000
    assert {"runs", "rounds", "steps", "time", "prompts", "tokens", "config", "filters"} <= shown.ids
    assert shown.loaded() == [] and shown.executed() == shown.allowed()


def test_its_figures_are_those_of_the_status(finished, shown):
    charts = {chart["title"]: chart["runs"]["base"] for chart in shown.data["charts"]["rounds"]}
    for title, metric in (("accuracy", "accuracy_greedy"), ("reverse KL (nats per token)", "reverse_kl")):
        expected = [[r["round"], r["metrics"][metric], r["metrics"][f"{metric}_se"]] for r in finished.status["rounds"]]
        assert [pytest.approx(point, rel=1e-4) for point in expected] == charts[title]
    for round in finished.status["rounds"]:
        assert f"{round['metrics']['reverse_kl']:.4f} ± {round['metrics']['reverse_kl_se']:.4f}" in shown.text
        assert round["student_sha256"][:16] in shown.text
        for stage in round["stages"].values():
            assert all(f"{kind}/{key}" in shown.text for kind, key in stage["artifacts"].items())
    assert (
        "finished" in shown.text and "divergence reverse kl, support teacher topk (k = 8), outside bucket" in shown.text
    )


def test_its_curves_are_the_table_of_steps(finished, shown):
    steps = finished.query("SELECT step, loss, grad_norm FROM training_steps WHERE stage = 'train' ORDER BY step")
    charts = {chart["title"]: chart["runs"]["base"] for chart in shown.data["charts"]["steps"]}
    assert charts["loss"] == [[row["step"], pytest.approx(row["loss"], rel=1e-4)] for row in steps]
    assert charts["gradient norm"] == [[row["step"], pytest.approx(row["grad_norm"], rel=1e-4)] for row in steps]


def test_its_tokens_are_those_that_were_written(finished, shown):
    rows = finished.query(
        "SELECT sample_id, position, token, student_logprob, teacher_logprob, gap, text_offset, completion_text"
        " FROM tokens JOIN rollouts USING (run, round, sample_id) WHERE round = 3 ORDER BY sample_id, position"
    )
    data = shown.data
    for found in [each for each in data["completions"] if each["round"] == 3]:
        mine = [row for row in rows if row["sample_id"] == found["id"]]
        assert [data["words"][word] for word in found["name"]] == [row["token"] for row in mine]
        assert found["gap"] == [pytest.approx(row["gap"], abs=1e-3) for row in mine]
        text = "".join(
            data["words"][word] for word, row in zip(found["text"], mine, strict=True) if row["token"] != "<|end|>"
        )
        assert text.replace("\u00b7", "") == mine[0]["completion_text"]
        assert all(1 - 1e-6 > sum(share for _, share in top) > 0 for top in found["teacher_top"])
        assert found["student_top"] is None  # this objective stores none
    lists = finished.query(
        "SELECT sample_id, teacher_topk_ids AS ids, teacher_topk_logprobs AS logprobs FROM supervision WHERE round = 3"
    )
    names = {
        row["id"]: row["text"] or row["token"]
        for row in finished.query("SELECT * FROM vocabulary WHERE tokenizer = 'student'")
    }
    top = {row["sample_id"]: row for row in lists}
    found = data["completions"][0]
    for place, entries in enumerate(found["teacher_top"]):
        ids, logprobs = (top[found["id"]][name][place][:5] for name in ("ids", "logprobs"))
        assert [data["words"][word] for word, _ in entries] == [names[i] for i in ids]
        assert [share for _, share in entries] == pytest.approx([math.exp(p) for p in logprobs], rel=1e-2)


def test_before_and_after_are_the_greedy_answers(finished, shown):
    rows = finished.query(
        "SELECT prompt_id, round, completion_text FROM evaluations WHERE mode = 'greedy' AND round IN (0, 3)"
        " ORDER BY md5(prompt_id), round LIMIT 40"
    )
    assert all(" ".join(row["completion_text"].split()) in shown.text for row in rows) and len(rows) == 40
    assert "20 of 32 held-out prompts" in shown.text
