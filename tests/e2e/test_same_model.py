"""Teacher = student: the whole pipeline must see no difference between them."""

from __future__ import annotations

import json

import pyarrow.compute as pc
import pytest
from opd_cli import opd
from places import TINY

from storage.store import Store


@pytest.mark.slow
def test_a_student_that_is_its_own_teacher_has_no_divergence_anywhere(finished, tmp_path):
    model = tmp_path / "model"
    finished.opd("export", "base", model)
    root = tmp_path / "store"
    changes = [
        f"{side}={{source: {{kind: checkpoint, path: {model}}}, warmup: null}}" for side in ("student", "teacher")
    ]
    changes += ["train.lr=0", "policy.rounds=1"]  # Adam would walk along rounding errors
    arguments = [part for change in changes for part in ("--set", change)]
    status = json.loads(opd("run", TINY, "--name", "self", "--no-prefect", "--json", *arguments, root=root).stdout)

    first, second = status["rounds"]
    assert abs(first["metrics"]["reverse_kl"]) < 1e-6
    assert abs(second["metrics"]["train_loss"]) < 1e-6
    assert abs(second["metrics"]["reverse_kl"]) < 1e-6

    store = Store(root)
    (signal,) = store.list("sampled")
    table = store.read_table(signal, "sampled")
    gaps = pc.subtract(pc.list_flatten(table["student_logprobs"]), pc.list_flatten(table["teacher_logprobs"]))
    assert pc.max(pc.abs(gaps)).as_py() < 1e-6
