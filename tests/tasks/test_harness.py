"""Tasks of lm-eval on a small checkpoint: with the real package, a real worker and tasks of a folder, without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_eval_tasks import CHOICE, needs_package, write_choices
from small_models import checkpoint

from storage.errors import ConfigError, InputError
from storage.query.catalog import Catalog
from storage.store import Artifact, Store
from tasks.harness import harness_work, metrics_of
from tasks.inputs import harness
from tasks.inputs.harness import HarnessConfig, HarnessTask, find_tasks
from tasks.inputs.models import CheckpointModel, model_work
from tasks.stage import Context, Student
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

WRITTEN = """
task: sums_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 4}}
process_results: !function judging.judged
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: sums
task: [sums_low, sums_high]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
JUDGING = "def judged(doc, results):\n    return {'right': float(results[0] == str(doc['label']))}\n"
DOCUMENTS = {"low": 6, "high": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks with choices, a group of both, and one with written answers."""
    place = tmp_path / "tasks"
    place.mkdir()
    for name, count in DOCUMENTS.items():
        write_choices(place, name, count)
    (place / "written.yaml").write_text(WRITTEN.format(data=place / "low.jsonl"))
    (place / "group.yaml").write_text(GROUP)
    (place / "judging.py").write_text(JUDGING)
    return place


@pytest.fixture
def student(tmp_path: Path) -> tuple[Store, Student]:
    store = Store(tmp_path / "store")
    path = checkpoint(tmp_path / "model")
    work = model_work(CheckpointModel(kind="checkpoint", path=path), seed=0, memo=store.memo)
    with store.building(work.outputs["model"]) as builder:
        work.build({"model": builder}, context(store, WorkerPool(RuntimeConfig(device="cpu"), tmp_path)))
        assert builder.committed is not None
        return store, Student(builder.committed)


def context(store: Store, pool: WorkerPool) -> Context:
    return Context(store, pool.runtime, pool, lambda *_: None, lambda line: None)


@pytest.fixture
def pool(tmp_path: Path, monkeypatch) -> Iterator[WorkerPool]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    logs = tmp_path / "logs"
    logs.mkdir()
    with WorkerPool(RuntimeConfig(device="cpu", threads=1), logs) as found:
        yield found


def built(store: Store, pool: WorkerPool, task: HarnessTask, student: Student) -> Artifact:
    work = harness_work(task, student)
    with store.building(work.outputs["harness"]) as builder:
        if builder.committed is None:
            work.build({"harness": builder}, context(store, pool))
        assert builder.committed is not None
        return builder.committed


@pytest.mark.slow  # imports of lm-eval here and in a worker: 30 s
@needs_package
def test_results_are_in_the_store_with_the_errors_of_lm_eval(student, folder, pool) -> None:
    store, model = student
    config = HarnessConfig(task="sums", limit=None, num_fewshot=None, chat_template=False)
    group, written = find_tasks(["sums", "sums_written"], config, folder)
    made = built(store, pool, group, model)
    rows = {(row["task"], row["metric"]): row for row in store.read_table(made, "harness_results").to_pylist()}
    for name, count in DOCUMENTS.items():
        row = rows[f"sums_{name}", "acc"]
        assert row["n"] == count and row["task_version"] == "3" and row["higher_is_better"] is True
        share = row["value"]
        assert row["se"] == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
    low, high, whole = (rows[name, "acc"]["value"] for name in ("sums_low", "sums_high", "sums"))
    assert whole == pytest.approx((6 * low + 4 * high) / 10) and rows["sums", "acc"]["n"] == 10
    metrics = made.meta["metrics"]
    assert metrics["acc"] == whole and metrics["acc_n"] == 10 and metrics["acc/sums_low"] == low
    samples = store.read_table(made, "harness_samples").to_pylist()
    assert len(samples) == 10 and {row["request"] for row in samples} == {f"{n}+{n}=" for n in range(6)}
    assert sum(row["value"] for row in samples) == pytest.approx(10 * whole)
    likelihoods = [json.loads(row["answers"]) for row in samples]
    assert all(len(pair) == 2 and all(answer[0] < 0 for answer in pair) for pair in likelihoods)

    made = built(store, pool, written, model)  # the worker and its model are there already
    assert made.meta["metrics"]["right_n"] == 6
    (counted,) = (
        Catalog(store).query("SELECT count(*) AS n FROM harness_samples WHERE task = 'sums_written'").to_pylist()
    )
    assert counted["n"] == 6
    assert len(list(pool.logs.glob("harness*.log"))) == 1


@pytest.mark.slow
@needs_package
def test_a_key_changes_with_what_the_result_depends_on(student, folder, pool) -> None:
    _, model = student
    plain = HarnessConfig(task="", limit=None, num_fewshot=None, chat_template=False)

    def key(name: str, config: HarnessConfig = plain) -> str:
        (task,) = find_tasks([name], config, folder)
        return harness_work(task, model).outputs["harness"].key

    keys = {name: key(name) for name in ("sums", "sums_low", "sums_high", "sums_written")}
    assert len(set(keys.values())) == 4
    assert key("sums") == keys["sums"]
    limited = plain.model_copy(update={"limit": 2})
    few = key("sums_low", limited)
    assert few != keys["sums_low"]
    with (folder / "low.jsonl").open("a") as file:
        file.write(json.dumps({"question": "8+8=", "choices": ["16", "8"], "label": 0}) + "\n")
    assert key("sums_low") != keys["sums_low"] and key("sums") != keys["sums"] and key("sums_high") == keys["sums_high"]
    assert key("sums_low", limited) == few  # its documents are those of before
    before = key("sums_written")
    (folder / "judging.py").write_text(JUDGING.replace("==", "!="))
    assert key("sums_written") != before


@pytest.mark.slow
@needs_package
@pytest.mark.parametrize(
    ("name", "message"),
    [("sums_lwo", "did you mean 'sums_low'"), ("sums_lost", "cannot load it .*lost.jsonl"), ("sums_unsafe", "sandbox")],
)
def test_a_task_that_cannot_be_run_is_refused(folder: Path, pool, name: str, message: str) -> None:
    (folder / "lost.yaml").write_text(CHOICE.format(name="sums_lost", data=folder / "lost.jsonl"))
    unsafe = CHOICE.format(name="sums_unsafe", data=folder / "low.jsonl") + "unsafe_code: true\n"
    (folder / "unsafe.yaml").write_text(unsafe)
    config = HarnessConfig(task=name, limit=None, num_fewshot=None, chat_template=False)
    with pytest.raises(InputError, match=message):
        find_tasks([name], config, folder)


def test_without_the_package_one_line_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    config = HarnessConfig(task="gsm8k", limit=None, num_fewshot=None, chat_template=False)
    with pytest.raises(ConfigError) as error:
        find_tasks(["gsm8k"], config, None)
    assert "pip install 'opdflow[lm-eval]'" in str(error.value) and "\n" not in str(error.value)


def test_metrics_are_named_by_task_and_filter() -> None:
    def row(task: str, metric: str, filter: str, value: float, se: float | None, n: int) -> dict:
        return {"task": task, "metric": metric, "filter": filter, "value": value, "se": se, "n": n}

    found = metrics_of(
        "arith",
        [
            row("arith", "acc", "none", 0.5, 0.1, 20),
            row("arith_low", "acc", "none", 0.4, None, 8),
            row("arith", "exact_match", "strict-match", 0.2, 0.05, 20),
        ],
    )
    assert found == {
        "acc": 0.5, "acc_se": 0.1, "acc_n": 20.0,
        "acc/arith_low": 0.4, "acc/arith_low_se": None, "acc/arith_low_n": 8.0,
        "exact_match,strict-match": 0.2, "exact_match,strict-match_se": 0.05, "exact_match,strict-match_n": 20.0,
    }  # fmt: skip
