"""Every named question on the true run, against figures computed by hand from the Parquet files; the command and the notebook."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from places import CHECKOUT

import opdflow
from storage.query.questions import questions
from storage.runs import Run
from storage.store import Store

LAST = 3


@pytest.fixture(scope="module")
def store(finished) -> Store:
    return Store(finished.root)


@pytest.fixture(scope="module")
def run(finished) -> Run:
    return Run.open(finished.root, finished.name)


@pytest.fixture(scope="module")
def read(store, run):
    """The rows of a table of a round, as the stage wrote them, by sample."""

    def read(table: str, round: int = LAST) -> list[dict]:
        stage = {"rollouts": "rollout", "evaluations": "evaluate", "training_steps": "train"}.get(table, table)
        (key,) = {s.artifacts[stage] for s in run.state.rounds[round].stages.values() if stage in s.artifacts}
        rows = store.read_table(store.require(stage, key), table).to_pylist()
        return sorted(rows, key=lambda row: row.get("sample_id", ""))

    return read


@pytest.fixture(scope="module")
def samples(read) -> list[dict]:
    """The rollouts of the last round beside their signals, values as numpy arrays."""
    rows = []
    for rollout, sampled, mask, lists in zip(*map(read, ("rollouts", "sampled", "mask", "teacher_topk")), strict=True):
        assert len({row["sample_id"] for row in (rollout, sampled, mask, lists)}) == 1
        gap = np.float32(sampled["student_logprobs"]) - np.float32(sampled["teacher_logprobs"])
        mass = 1 - np.exp(np.float32(lists["tail_logmass"]))
        rows.append(rollout | {"gap": gap, "mass": mass, "reasons": mask["mask_reasons"], **sampled})
    return rows


@pytest.fixture(scope="module")
def texts(store, run) -> dict[int, tuple[str | None, str, bool]]:
    prepare = store.require("prepare", run.state.rounds[0].stages["prepare"].artifacts["prepare"])
    rows = store.read_table(prepare, "vocabulary").to_pylist()
    return {row["id"]: (row["text"], row["token"], row["special"]) for row in rows if row["tokenizer"] == "student"}


@pytest.fixture
def ask(finished):
    demo = opdflow.open(finished.root).run(finished.name)
    return lambda name, **parameters: demo.ask(name, **parameters).rows()


ELSEWHERE = {"groups", "reward_by_round"}
"""Questions to runs of other kinds than this one: those to a judged run are in tests/flows/test_judge.py."""


def test_each_question_is_checked_here():
    """A new file without a test of its figures fails."""
    functions = [n.name for n in ast.parse(Path(__file__).read_text()).body if isinstance(n, ast.FunctionDef)]
    assert {f"test_{name.replace('-', '_')}" for name in questions()} <= set(functions) | {
        f"test_{name}" for name in ELSEWHERE
    }


def test_worst_tokens(ask, samples, texts):
    found = ask("worst-tokens", limit=12)
    all_gaps = [(gap, row, place) for row in samples for place, gap in enumerate(row["gap"])]
    expected = sorted(all_gaps, key=lambda entry: -entry[0])[:12]
    assert [row["gap"] for row in found] == [pytest.approx(gap) for gap, _, _ in expected]
    whole = 0
    for line in found:
        row = next(row for row in samples if row["sample_id"] == line["sample_id"])
        place, ids = line["position"], row["completion_token_ids"]
        words = ["" if texts[i][2] else texts[i][0] for i in ids]  # one character each: a byte-level vocabulary
        if None not in words:  # no byte of it is a part of a character
            assert "".join(words) == row["completion_text"]
            assert line["before"] == "".join(words[:place])[-40:] and line["after"] == "".join(words[place + 1 :])[:40]
            whole += 1
            assert line["token"] == texts[ids[place]][0]
        assert math.log(line["teacher_p"]) == pytest.approx(row["teacher_logprobs"][place], abs=1e-4)
    assert whole > 0


def test_teacher_mass(ask, samples):
    by_range = defaultdict(list)
    for row in samples:
        for place, mass in enumerate(row["mass"]):
            by_range[2 ** int(math.log2(place + 1)) - 1].append(mass)
    found = ask("teacher-mass")
    assert [row["from_position"] for row in found] == sorted(by_range)
    for row in found:
        masses = by_range[row["from_position"]]
        assert row["tokens"] == len(masses)
        assert row["mean_mass"] == pytest.approx(np.mean(masses), abs=1e-6)
        assert row["least"] == pytest.approx(min(masses), abs=1e-6)
        assert row["share_below_90_percent"] == pytest.approx(np.mean(np.array(masses) < 0.9))


def test_overlap(finished, ask, read):
    """The run stores the teacher's list alone: there is only what its training computed."""
    (row,) = ask("overlap")
    steps = [step for step in read("training_steps") if step["overlap_ratio"] is not None]
    live = sum(step["overlap_ratio"] * step["tokens"] for step in steps) / sum(step["tokens"] for step in steps)
    assert row["not_stored"] == "student_topk" and row["overlap_ratio"] is row["advantage"] is None
    assert row["trained_overlap_ratio"] == pytest.approx(live) and 0 < live <= 1


@pytest.mark.slow
def test_overlap_of_a_run_that_stores_both_lists(finished):
    finished.opd("fork", "base@2", "--name", "both", "--set", "objective.support.kind=union", "--no-prefect")
    lab, both = opdflow.open(finished.root), Run.open(finished.root, "both").state.rounds[LAST]
    store, lists = Store(finished.root), {}
    for name in ("student_topk", "teacher_topk"):
        rows = store.read_table(store.require(name, both.stages["supervise"].artifacts[name]), name).to_pylist()
        lists[name] = {row["sample_id"]: row for row in rows}
    found = []
    for sample, mine in lists["student_topk"].items():
        its = lists["teacher_topk"][sample]
        for ids, p, q, others in zip(
            *(mine[c] for c in ("ids", "student_logprobs", "teacher_logprobs")), its["ids"], strict=True
        ):
            k = min(len(ids), len(others))
            common = np.isin(ids[:k], others[:k])
            p, q = np.float64(p[:k])[common], np.float64(q[:k])[common]
            own, other = p - np.logaddexp.reduce(p), q - np.logaddexp.reduce(q)
            advantage = np.mean(np.exp(own) * (other - own)) if common.any() else np.nan
            found.append((common.mean(), np.exp(p).sum(), np.exp(q).sum(), advantage))
    (row,) = lab.run("both").ask("overlap").rows()
    names = ("overlap_ratio", "student_mass", "teacher_mass", "advantage")
    assert [row[name] for name in names] == pytest.approx(np.nanmean(found, axis=0), rel=1e-4, abs=1e-6)
    assert row["tokens"] == len(found) and row["not_stored"] is None and row["student_mass"] > 0.5


def test_entropy_by_position(ask, samples):
    by_range = defaultdict(list)
    for row in samples:
        for place, pair in enumerate(zip(row["student_entropy"], row["teacher_entropy"], strict=True)):
            by_range[2 ** int(math.log2(place + 1)) - 1].append(pair)
    found = ask("entropy-by-position")
    assert [row["from_position"] for row in found] == sorted(by_range)
    for row in found:
        student, teacher = np.array(by_range[row["from_position"]], float).T
        assert row["tokens"] == len(student)
        assert row["student_entropy"] == pytest.approx(student.mean(), rel=1e-5)
        assert row["teacher_entropy"] == pytest.approx(teacher.mean(), rel=1e-5)
        assert row["entropy_gap"] == pytest.approx(np.abs(teacher - student).mean(), rel=1e-4)


def test_lengths(ask, read):
    found = {(row["round"], row["mode"], row["verdict"]): row for row in ask("lengths")}
    expected = defaultdict(list)
    for number in range(LAST + 1):
        for row in read("evaluations", number):
            if row["correct"] is not None:
                expected[number, row["mode"], "right" if row["correct"] else "wrong"].append(row["tokens"])
    assert found.keys() == expected.keys() and len(found) > LAST
    for key, lengths in expected.items():
        assert (found[key]["n"], found[key]["prompts"]) == (len(lengths), len(lengths))  # one greedy answer per prompt
        assert found[key]["mean_length"] == pytest.approx(np.mean(lengths))
        if len(lengths) > 1:
            assert found[key]["se"] == pytest.approx(np.std(lengths, ddof=1) / len(lengths) ** 0.5)
    assert ask("lengths", of="rollouts") == []  # nothing judged them


def test_mask_reasons(ask, samples):
    words = {1: "special token", 2: "truncated", 4: "teacher prefix", 8: "unmapped", 16: "invalid value"}
    counts = Counter(
        ", ".join(word for bit, word in words.items() if bits & bit) or "none" for r in samples for bits in r["reasons"]
    )
    found = ask("mask-reasons")
    assert {row["reasons"]: row["tokens"] for row in found} == counts
    assert sum(row["share"] for row in found) == pytest.approx(1)
    assert {row["reasons"]: row["left_out"] for row in found} == {
        name: bool({"special token", "teacher prefix", "unmapped"} & set(name.split(", "))) for name in counts
    }


def test_outliers(ask, samples, texts):
    def check(by: str, group) -> None:
        outside, gaps = defaultdict(list), defaultdict(list)
        for row in samples:
            for place, gap in enumerate(row["gap"]):
                gaps[group(row, place)].append(gap)
                outside[group(row, place)].append(1 - min(math.exp(-gap), 1))
        total = sum(map(sum, outside.values()))
        found = ask("outliers", by=by, limit=1000)
        assert {row["group"] for row in found} == set(outside)
        for row in found:
            values = outside[row["group"]]
            assert row["tokens"] == len(values) and row["outside"] == pytest.approx(np.mean(values), abs=1e-5)
            assert row["share_of_all_outside"] == pytest.approx(sum(values) / total, abs=1e-5)
            assert row["far"] == pytest.approx(np.mean(np.array(gaps[row["group"]]) > 2.0))

    def name(row: dict, place: int) -> str:
        token = row["completion_token_ids"][place]
        return (
            f"<0x{token:02X}>" if texts[token][0] is None else texts[token][0]
        )  # ids of this vocabulary are its bytes

    check("token", name)
    check(
        "truncation",
        lambda row, _: {"length": "cut off at the length limit"}.get(row["finish_reason"], "ended by itself"),
    )
    check("length", lambda row, _: f"{2 ** int(math.log2(len(row['gap'])))} tokens and more")
    check("position", lambda _, place: f"{2 ** int(math.log2(place + 1)) - 1} and more")


def test_worse_prompts(ask, read):
    def scores(round: int) -> dict[str, tuple[float, float]]:
        rows = read("evaluations", round)
        right = {row["prompt_id"]: float(row["correct"]) for row in rows if row["mode"] == "greedy"}
        return {
            row["prompt_id"]: (right[row["prompt_id"]], row["reverse_kl_sum"] / row["tokens"])
            for row in rows
            if row["mode"] == "kl"
        }

    old, new = scores(0), scores(LAST)
    worse = {name for name in old if new[name][0] < old[name][0] or new[name][1] > old[name][1]}
    found = ask("worse-prompts", limit=1000)
    assert {row["prompt_id"] for row in found} == worse
    for row in found:
        assert (row["correct_before"], row["kl_before"]) == pytest.approx(old[row["prompt_id"]])
        assert row["kl_change"] == pytest.approx(new[row["prompt_id"]][1] - old[row["prompt_id"]][1])


def test_cost(ask, run):
    seconds, times = defaultdict(float), Counter()
    for round in run.state.rounds:
        for label, stage in round.stages.items():
            seconds[label] += stage.seconds
            times[label] += stage.state == "done"
    found = ask("cost")
    assert {row["stage"]: row["seconds"] for row in found} == pytest.approx(dict(seconds))
    assert {row["stage"]: row["times"] for row in found} == times
    assert sum(row["share"] for row in found) == pytest.approx(1)


def test_bytes_per_token(ask, finished, run, samples, read):
    used = {(s, k) for r in run.state.rounds for stage in r.stages.values() for s, k in stage.artifacts.items()}
    sizes = Counter()
    for stage, key in used:
        folder = finished.root / "artifacts" / stage / key
        files = [path for path in folder.rglob("*") if path.is_file()]
        sizes[stage] += sum(
            p.stat().st_size for p in files if not p.name.endswith((".json", ".lock")) or p.parent != folder
        )
    tokens = sum(len(row["completion_token_ids"]) for n in (1, 2, 3) for row in read("rollouts", n))
    found = ask("bytes-per-token")
    assert {row["kind"]: row["bytes"] for row in found} == sizes
    assert all(row["bytes_per_token"] == pytest.approx(sizes[row["kind"]] / tokens) for row in found)
    assert {row["kind"]: row["artifacts"] for row in found} == Counter(stage for stage, _ in used)


def test_two_runs(finished, run, ask):
    """A run compared with itself has the same figures, and differences of 0."""
    lab = opdflow.open(finished.root)
    assert ask("two-runs", other="base") == []
    metrics = [round.metrics["reverse_kl"] for round in run.state.rounds]
    fork = finished.opd("fork", "base@3", "--name", "again", "--no-prefect")
    assert fork.returncode == 0
    found = lab.run("again").ask("two-runs", other="base").rows()
    assert [row["value"] for row in found] == [row["other_value"] for row in found] == pytest.approx(metrics)
    assert all(row["other_minus_value"] == 0 and not row["told_apart"] and row["prompts"] == 32 for row in found)


def test_where_they_part(ask, read, texts):
    old, new = ({r["prompt_id"]: r for r in read("evaluations", n) if r["mode"] == "greedy"} for n in (0, LAST))
    found = {row["prompt_id"]: row for row in ask("where-they-part", other="base", other_round=0, limit=1000)}
    expected = {}
    for name, row in new.items():
        pair = [*zip(row["completion_token_ids"], old[name]["completion_token_ids"], strict=False), (None, None)]
        if row["completion_token_ids"] != old[name]["completion_token_ids"]:
            expected[name] = next((n for n, (a, b) in enumerate(pair[:-1]) if a != b), len(pair) - 1)
    assert {name: row["position"] for name, row in found.items()} == expected and len(expected) > 0
    for name, place in expected.items():
        ids = new[name]["completion_token_ids"]
        assert found[name]["token"] == (texts[ids[place]][0] if place < len(ids) else None)


def test_trained_on(ask, read, run):
    found = {row["round"]: row for row in ask("trained-on", round=2)}
    assert set(found) == {0, 1, 2} and found[0]["stage"] == "warmup" and found[0]["steps"] == 60
    seen: set[str] = set()
    for number in (1, 2):
        rollouts, steps = read("rollouts", number), read("training_steps", number)
        names = {row["prompt_id"] for row in rollouts}
        row = found[number]
        assert (row["prompts"], row["new_prompts"], row["completions"]) == (
            len(names),
            len(names - seen),
            len(rollouts),
        )
        assert row["tokens_written"] == sum(len(r["completion_token_ids"]) for r in rollouts)
        assert row["tokens_in_loss"] == sum(step["tokens"] for step in steps) and row["steps"] == len(steps)
        assert row["student"] == run.state.rounds[number].student_sha256[:16] and row["written_by"] == "student"
        seen |= names


def test_the_command_asks_lists_and_refuses(finished):
    listed = json.loads(finished.opd("query", "--list", "--json").stdout)
    assert [row["question"] for row in listed] == list(questions())
    found = json.loads(finished.opd("query", "base", "worst-tokens", "round=2", "limit=3", "--json").stdout)
    sql = finished.opd("query", "base", "worst-tokens", "round=2", "limit=3", "--sql").stdout
    assert "round = 2" in sql and len(found) == 3
    assert json.loads(finished.opd("query", "base", sql, "--json").stdout) == found
    refused = {
        ("worst-token",): "did you mean 'worst-tokens'?",
        ("worst-tokens", "rond=2"): "did you mean 'round'?",
        ("worst-tokens", "round=9"): "the rounds 0, 1, 2, 3",
        ("outliers", "by=tokens"): "did you mean 'token'?",
        ("outliers", "nats=x"): "a number is needed",
        ("two-runs",): "needs other=",
        ("two-runs", "other=bse"): "did you mean 'base'?",
        ("select tokn from tokens",): "did you mean 'token'?",
        ("select 1", "round=2"): "named question",
    }
    for args, reason in refused.items():
        result = finished.opd("query", "base", *args, check=False)
        assert result.returncode == 2 and reason in result.stderr and "Traceback" not in result.stderr
    result = finished.opd("query", "cost", check=False)
    assert result.returncode == 2 and "opd query NAME cost" in result.stderr


def test_show_gives_both_models_probabilities_and_alternatives(finished, samples, read):
    row = samples[5]
    shown = json.loads(finished.opd("show", "base", "--sample", row["sample_id"], "--json").stdout)
    lists = next(entry for entry in read("teacher_topk") if entry["sample_id"] == row["sample_id"])
    assert shown["completion_text"] == row["completion_text"] and shown["prompt"].endswith("<|assistant|>")
    for token, gap, logprobs in zip(shown["tokens"], row["gap"], lists["logprobs"], strict=True):
        assert token["gap"] == pytest.approx(gap)
        assert [share for _, share in token["teacher_top"]] == pytest.approx(np.exp(logprobs[:3]))
        assert token["student_top"] is None  # this objective stores no list of the student's
    worst = json.loads(finished.opd("show", "base", "--json").stdout)
    assert worst["sample_id"] == max(samples, key=lambda row: row["gap"].mean())["sample_id"]
    missing = finished.opd("show", "base", "--sample", row["sample_id"][1:], check=False)
    assert missing.returncode == 2 and row["sample_id"] in missing.stderr


def test_a_store_from_python_is_what_the_files_are(finished, samples):
    lab = opdflow.open(finished.root)
    base = lab.run("base")
    tokens = base.tokens(round=LAST)
    assert len(tokens) == sum(len(row["gap"]) for row in samples)
    frame = tokens.pandas()
    assert frame["gap"].sum() == pytest.approx(sum(row["gap"].sum() for row in samples), rel=1e-4)
    assert [row["round"] for row in base.rounds] == [0, 1, 2, 3] and "base" in lab.runs.arrow["run"].to_pylist()
    assert base.config["train"]["lr"] == 1e-3
    with pytest.raises(Exception, match="did you mean 'base'"):
        lab.run("bas")
    with pytest.raises(Exception, match="only one SELECT"):
        lab.sql("DROP VIEW tokens")


def test_the_notebook_runs(finished, monkeypatch, tmp_path, capsys):
    """Its code cells, in order, in a folder where the documented store is the true run's."""
    (tmp_path / "opd-store").symlink_to(finished.root)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((CHECKOUT / "docs" / "notebook.ipynb").read_text())
    cells = [
        ("".join(cell["source"])).replace('"demo"', '"base"').replace("'demo'", "'base'")
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]
    namespace: dict[str, object] = {}
    for cell in cells:
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
            assert value is None or repr(value)
    assert len(cells) >= 5 and all(not cell.get("outputs") for cell in notebook["cells"])
