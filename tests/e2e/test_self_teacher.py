"""A real run whose teacher is the average of its own student below the solution: signals, weights, and a replay."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from opd_cli import opd
from places import TINY
from real_run import replays
from safetensors.numpy import load_file

from storage.runs import Run
from storage.store import Artifact, Store

TEACHER = 'teacher={source: {kind: ema, decay: 0.5, per: step}, warmup: null, context: "{solution}\\n{prompt}"}'


def gaps(store: Store, signal: Artifact) -> pa.Array:
    """|student - teacher| log-probability of every sampled token, in nats."""
    rows = store.read_table(signal, "sampled")
    sides = (pc.list_flatten(rows[f"{who}_logprobs"]) for who in ("student", "teacher"))
    return pc.abs(pc.subtract(*sides))


@pytest.mark.slow
def test_a_student_learns_from_its_own_average_and_the_round_replays(prepared_root):
    root = prepared_root()
    changes = (TEACHER, "policy.rounds=2", "supervise.encoding=packed", "supervise.tail_mass=0.4")
    sets = [word for change in changes for word in ("--set", change)]
    opd("run", TINY, "--name", "own", "--no-prefect", *sets, root=root)
    store, rounds = Store(root), Run.open(root, "own").state.rounds
    prompts = store.get("prepare", rounds[0].stages["prepare"].artifacts["prepare"])
    for row in store.read_table(prompts, "prompts").to_pylist():
        read = row["teacher_token_ids"]
        assert (read is None) == (row["split"] == "warmup")
        assert read is None or (len(read) > len(row["token_ids"]) and read[-8:] == row["token_ids"][-8:])

    signals = [store.get("sampled", r.stages["supervise"].artifacts["sampled"]) for r in rounds[1:]]
    made = [{name: store.get(name, key) for name, key in r.stages["train"].artifacts.items()} for r in rounds[1:]]
    first, second = signals
    # one model under two prompts in round 1, two models in round 2
    assert first.inputs["teacher:weights"] == first.inputs["student:weights"]
    assert pc.max(gaps(store, first)).as_py() > 0.01
    assert second.inputs["teacher:weights"] == made[0]["teacher_ema"].content["weights"]
    assert second.inputs["student:weights"] == made[0]["student"].content["weights"]
    assert second.inputs["teacher:weights"] != second.inputs["student:weights"]
    for outputs in made:
        state = load_file(store.materialize(outputs["trainer_state"], "state") / "ema.safetensors")
        exported = load_file(store.materialize(outputs["teacher_ema"]) / "model.safetensors")
        assert all((exported[name.removeprefix("ema/")] == tensor).all() for name, tensor in state.items())

    for number, entry in enumerate(rounds[1:], 1):  # packed lists of the length that the teacher's mass decides
        stored = store.read_table(
            store.get("teacher_topk", entry.stages["supervise"].artifacts["teacher_topk"]), "teacher_topk"
        )
        counts = pc.list_flatten(stored["valid"])
        assert pc.min(counts).as_py() < pc.max(counts).as_py() <= 8
        lengths = "list_sum(list_transform(teacher_topk_ids, lambda ids: len(ids)))"
        sql = f"SELECT sum({lengths})::BIGINT AS entries FROM supervision WHERE round = {number}"
        asked = opd("query", "own", sql, "--json", root=root)
        assert json.loads(asked.stdout) == [{"entries": pc.sum(counts).as_py()}] and asked.stderr == ""

    assert {"student", "trainer_state", "train", "teacher_ema"} <= replays(root, "own", 2)
