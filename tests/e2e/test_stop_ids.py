"""A base student and an instruct teacher that end their completions with different ids, on the demo task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_cli import opd
from places import TINY

from storage.query.catalog import Catalog
from storage.runs import Run
from storage.store import Store
from tasks.inputs.tokenizers import PAD, build_byte_tokenizer

OWN, TEACHER = 256, 257
"""<|pad|>, with which the student's texts end, and <|end|>, with which the teacher's do."""


@pytest.fixture(scope="module")
def pair(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of the pair: the teacher is that of the shared run, the student has learned texts that end with its own id."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = build_byte_tokenizer()
    tokenizer.eos_token = PAD
    tokenizer.save_pretrained(folder / "tokenizer")
    teacher = Store(finished.root).require("student", finished.stage(0, "warmup_teacher")["artifacts"]["student"])
    changes = {
        "base": str(TINY),
        "student": {"source": {"tokenizer": {"kind": "folder", "path": str(folder / "tokenizer")}}},
        "teacher": {"source": str(Store(finished.root).materialize(teacher)), "warmup": None},
        "prompts": {"tokenizers": {"stop_ids": "merge"}},
    }
    (folder / "pair.yaml").write_text(yaml.safe_dump(changes))
    return folder / "pair.yaml"


def run(pair: Path, name: str, *changes: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rounds, completions by round, last token and reason) of a run in the pair's own store."""
    root = pair.parent / "store"
    sets = [word for change in changes for word in ("--set", change)]
    status = json.loads(opd("run", pair, "--name", name, "--json", "--no-prefect", *sets, root=root).stdout)
    sql = "SELECT round, completion_token_ids[-1] AS last, finish_reason, completion_text, completion_token_ids FROM rollouts"
    return status["rounds"], Catalog(Store(root), Run.open(root, name)).query(sql).to_pylist()


def test_merged_stop_ids_run_through_all_stages(pair):
    rounds, completions = run(pair, "merge", "policy.rounds=1")
    assert [entry["round"] for entry in rounds] == [0, 1]
    stopped = [row for row in completions if row["finish_reason"] == "stop"]
    assert stopped and {row["last"] for row in stopped} <= {OWN, TEACHER}
    for row in completions:
        assert not {OWN, TEACHER} & set(row["completion_token_ids"][:-1])
        assert not (row["finish_reason"] == "length" and row["last"] in (OWN, TEACHER))
    checked = opd("check", pair, root=pair.parent / "store").stdout
    assert "merged into one category, which 256 stands for" in checked


@pytest.mark.slow
def test_completions_end_under_merge_and_run_to_the_limit_under_mask(pair):
    """A base student that was never taught to stop (docs/log.md has the demo's numbers)."""
    untaught = ("prompts.append_eos=false", "objective.divergence=forward_kl", "policy.rounds=4", "train.lr=3e-3")
    clipped = {}
    for policy in ("merge", "mask"):
        rounds, _ = run(pair, f"untaught-{policy}", *untaught, f"prompts.tokenizers.stop_ids={policy}")
        assert rounds[0]["metrics"]["clipped_ratio"] > 0.9
        clipped[policy] = rounds[-1]["metrics"]["clipped_ratio"]
    assert clipped["merge"] < 0.1 and clipped["mask"] > 0.9
