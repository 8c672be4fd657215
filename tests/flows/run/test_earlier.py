"""A run of 0.1.0 whose tokenizer was read otherwise than its file says is not found again, and `opd status` says so."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from opd_cli import OPD
from places import CHECKOUT, DATA

from flows.experiment import load_experiment
from flows.run.earlier import outdated_prompts
from flows.run.runner import plan
from storage.runs import Run

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
        assert outdated_prompts(run.state, root) == []
    assert outdated_prompts(Run.open(root, "base").state, root) == []
