"""What of a run of 0.1.0 is not found again, because it was made otherwise, is said by `opd status`: only where it is so."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from opd_cli import OPD
from places import CHECKOUT, DATA, TINY

from flows.cli.options import console
from flows.cli.report import report
from flows.experiment import Experiment, load_experiment
from flows.run.earlier import outdated
from flows.run.runner import plan
from storage.artifacts.artifact import ArtifactSpec
from storage.runs import RoundState, Run, RunState, StageState
from storage.store import Store
from tasks.inputs.sources import source_identity

AFFECTED = DATA / "v0.1-affected"


def unpacked(archive: Path, tmp_path: Path) -> Path:
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    return tmp_path / "store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return unpacked(AFFECTED / "store.tar.xz", tmp_path)


def states(root: Path, config: Path) -> dict[str, str]:
    return {line.stage: line.state for line in plan(load_experiment(config), root)}


def test_its_prompts_are_not_found_again(root):
    assert states(root, AFFECTED / "affected.yaml") == {
        "model": "cached", "model_teacher": "cached", "prepare": "run", "evaluate": "pending",
    }  # fmt: skip


def test_status_says_so_and_why(root):
    command = [str(OPD), "status", "affected", "--json", "--root", str(root)]
    status = json.loads(subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout)
    (reason,) = status["outdated"]
    assert "Qwen2Tokenizer" in reason and str(root) in reason


def test_a_run_of_the_same_version_with_another_model_is_as_it_was(tmp_path):
    root = unpacked(DATA / "v0.1" / "store.tar.xz", tmp_path)
    for run in Run.list(root):
        assert outdated(run.state, root) == []
    assert outdated(Run.open(root, "base").state, root) == []


def run_of(root: Path, experiment: Experiment, rounds: list[dict[str, tuple[str, dict]]]) -> RunState:
    """A run whose rounds have stages: label -> (artifact's stage, its identity)."""
    store = Store(root)
    run = Run.create(root, "old", experiment.model_dump(mode="json"), experiment.identity())
    state = run.state
    for number, stages in enumerate(rounds):
        made = {}
        for label, (stage, identity) in stages.items():
            with store.building(ArtifactSpec.of(stage, 1, identity, {"round": str(number), "label": label})) as builder:
                artifact = builder.commit()
            made[label] = StageState(state="done", key=artifact.key, artifacts={stage: artifact.key})
        state.rounds.append(RoundState(round=number, stages=made))
    run.save(state)
    return state


LORA = ["train.lora={r: 4}", "train.dtype=bfloat16", "rollout.dtype=bfloat16", "supervise.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        (LORA, {"lora_forward": "merged"}, "LoRA in 16 bits"),
        (["student.source.config.attention_dropout=0.1"], {"dropout": "off"}, "dropout in the model's config"),
    ],
)
def test_trainings_that_an_earlier_version_made_otherwise(tmp_path, fields, field, text):
    old, new = ("train", {"config": {}}), ("train", {"config": {}} | field)
    state = run_of(tmp_path, load_experiment(TINY, fields), [{}, {"train": old}, {"train": old}, {"train": new}])
    (reason,) = outdated(state, tmp_path)
    assert reason.startswith("train of round 1, train of round 2: ") and text in reason
    (line,) = [str(part) for part in report(state, tmp_path, None, console()) if text in str(part)]
    assert "resume old" in line and "\n" not in line


@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["train.lora={r: 4}"],
        LORA[1:],
        ["student.source.config.attention_dropout=0.1", "train.dropout=true"],
        ["teacher.source.config.attention_dropout=0.1"],
    ],
)
def test_nothing_is_said_of_trainings_that_are_the_same(tmp_path, fields):
    state = run_of(tmp_path, load_experiment(TINY, fields), [{}, {"train": ("train", {"config": {}})}])
    assert outdated(state, tmp_path) == []


def test_a_warm_up_of_the_teacher_is_named(tmp_path):
    warm = ["teacher.warmup={steps: 1, lr: 1e-3}", "teacher.source.config.attention_dropout=0.1"]
    warm += ["prompts.warmup={kind: addition, count: 4}"]
    state = run_of(tmp_path, load_experiment(TINY, warm), [{"warmup_teacher": ("warmup", {"config": {}})}])
    (reason,) = outdated(state, tmp_path)
    assert reason.startswith("warmup_teacher: ")


def test_rows_that_are_read_otherwise_are_said_while_the_file_is_the_same(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["1+1=", "1+2="], "answer": [2.0, 3.0]}), path)
    experiment = load_experiment(TINY, [f"prompts.eval={{kind: file, path: {path}}}"])
    now = source_identity(experiment.prompts.eval)
    old = {name: value for name, value in now.items() if name != "reading"}
    assert now["reading"] == ["numbers"]
    state = run_of(tmp_path / "old", experiment, [{"prepare": ("prepare", {"eval": old})}])
    (reason,) = outdated(state, tmp_path / "old")
    assert reason.startswith("prompts.eval: ") and str(path) in reason and "2.0" in reason
    assert (
        outdated(run_of(tmp_path / "new", experiment, [{"prepare": ("prepare", {"eval": now})}]), tmp_path / "new")
        == []
    )
    pq.write_table(pa.table({"prompt": ["1+1="], "answer": [2.0]}), path)
    assert outdated(state, tmp_path / "old") == []
    path.unlink()
    assert outdated(state, tmp_path / "old") == []
