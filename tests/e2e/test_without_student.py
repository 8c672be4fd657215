"""`supervise.student: none` in the store of the true run: the same students without the student's pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from opd_cli import opd
from places import TINY

from storage.query.catalog import Catalog
from storage.runs import Run
from storage.store import Store

ALONE = ("--set", "supervise.student=none")


@pytest.fixture
def root(finished, tmp_path: Path) -> Path:
    return shutil.copytree(finished.root, tmp_path / "store")


def test_the_student_is_the_same_bit_for_bit_and_nothing_but_sampled_and_mask_is_made_for_it(finished, root):
    status = json.loads(opd("run", TINY, "--name", "alone", *ALONE, "--rounds", 1, "--json", root=root).stdout)
    before, after = finished.status["rounds"][1], status["rounds"][1]
    assert after["student_sha256"] == before["student_sha256"]
    assert after["metrics"]["reverse_kl"] == before["metrics"]["reverse_kl"]
    assert after["metrics"]["supervise_sampler_mismatch_max"] is None
    made = {
        stage: [entry["stages"][stage]["artifacts"] for entry in (before, after)] for stage in ("rollout", "supervise")
    }
    assert made["rollout"][0] == made["rollout"][1]
    assert {name for name, key in made["supervise"][1].items() if made["supervise"][0][name] != key} == {
        "sampled",
        "mask",
    }

    run = Catalog(Store(root), Run.open(root, "alone"))
    (tokens,) = run.query(
        "SELECT count(*) AS n, count(teacher_logprob) AS teacher, count(student_logprob) AS student,"
        " count(student_entropy) AS entropy, count(sampling_logprob) AS sampling FROM tokens"
    ).to_pylist()
    assert tokens["n"] == tokens["teacher"] == tokens["sampling"] > 0 == tokens["student"] == tokens["entropy"]
    (gaps,) = run.query(
        "SELECT count(*) FILTER (isfinite(gap)) AS n, max(abs(gap - (sampling_logprob - teacher_logprob))) AS off FROM tokens"
    ).to_pylist()
    assert gaps["n"] > 0 and gaps["off"] < 1e-6  # the distribution sampled from takes the student's place
    (rows,) = run.query(
        "SELECT count(*) AS n, count(teacher_logprobs) AS teacher, count(student_logprobs) AS student FROM supervision"
    ).to_pylist()
    assert rows == {"n": 64, "teacher": 64, "student": 0}
    (steps,) = run.query(
        "SELECT count(loss) AS loss, count(drift) AS drift FROM training_steps WHERE stage = 'train'"
    ).to_pylist()
    assert steps["loss"] > 0 == steps["drift"]

    replayed = json.loads(
        opd("replay", "alone", "--round", "1", "--stages", "supervise,train", "--json", root=root).stdout
    )
    assert len(replayed) == 6 and all(result["identical"] for result in replayed)
    opd("gc", "--keep", "signals=0", "--apply", root=root)
    opd("restore", "alone", "--round", "1", root=root)
    opd("restore", "base", "--round", "1", root=root)
    opd("verify", "--all", root=root)


def test_a_run_with_the_students_pass_is_not_continued_without_it(root):
    """Its own signals stay what they are: the config differs, and the message names the field."""
    result = opd("run", TINY, "--name", "base", *ALONE, "--no-prefect", root=root, check=False)
    assert result.returncode == 2 and "supervise.student" in result.stderr
