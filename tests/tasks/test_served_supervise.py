"""The stage with a teacher behind a server: a server that dies in the middle of a shard costs that shard alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scoring import InProcess, ScoringBench, model_folder
from teacher_server import TeacherServer

from storage.artifacts.shards import read_parquet
from storage.errors import ConfigError
from storage.store import Artifact, Store
from tasks.engines.server import OtherTeacher, TeacherServerError
from tasks.inputs.models import ServedModel, model_work
from tasks.losses.needs import SignalNeed
from tasks.rollout_config import RolloutConfig
from tasks.supervise import SuperviseConfig, supervise_work

SHARDS = [3, 3, 2]
NEEDS = (SignalNeed("sampled"), SignalNeed("mask"), SignalNeed("teacher_topk", 6))


class Served:
    """A student here, a teacher there, and the stage between them. `folder`: what `teacher:` names."""

    def __init__(self, root: Path, server: TeacherServer, student: Path, folder: Path) -> None:
        self.server = server
        # 32 tokens a batch: several batches a shard
        access = {"urls": [server.url], "retries": 1, "backoff": 0.01, "sequences": 2}
        self.bench = ScoringBench(Store(root / "store"), InProcess({"batch_tokens": 32, "server": access}))
        self.student = self.bench.model(student)
        if any(folder.glob("*.safetensors")):
            self.teacher = self.bench.model(folder)
        else:
            self.teacher = self.bench.make(model_work(ServedModel(path=folder, revision="1"), 0))["model"]
        self.prompts = self.bench.prompts(self.student, self.teacher, root / "data")
        self.rollouts = self.bench.rollouts(student, self.prompts, SHARDS)

    def make(self, kind: str = "server") -> dict[str, Artifact]:
        config: dict[str, Any] = {"kind": kind} | ({"model": "teacher", "entropy_k": 20} if kind == "server" else {})
        work = supervise_work(
            SuperviseConfig(teacher=config), self.rollouts, self.student, self.teacher, self.prompts, NEEDS,
            RolloutConfig(temperature=0.8, top_p=0.9),
        )  # fmt: skip
        return self.bench.make(work)

    def lists(self, artifact: Artifact) -> dict[str, list[Any]]:
        return self.bench.store.read_table(artifact, artifact.stage).to_pydict()

    def forget_models(self) -> None:
        """As a new worker begins."""
        self.bench.workers.handlers["scorer"].close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: model_folder(root, name, seed) for seed, name in enumerate(("student", "teacher", "other"), 1)}


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[TeacherServer]:
    made = TeacherServer(folders["teacher"])
    yield made
    made.kill()


@pytest.fixture
def described(folders: dict[str, Path], tmp_path: Path) -> Path:
    """The teacher's folder without its weights."""
    folder = tmp_path / "described"
    folder.mkdir()
    for file in folders["teacher"].iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_signals_are_those_of_the_local_teacher(server, folders, tmp_path):
    served = Served(tmp_path, server, folders["student"], folders["teacher"])
    found, local = served.make(), served.make("local")
    assert all(found[name].key != local[name].key for name in found)
    for name, columns in (("sampled", ("student_logprobs", "teacher_logprobs")), ("teacher_topk", ("logprobs",))):
        one, other = served.lists(found[name]), served.lists(local[name])
        assert one["sample_id"] == other["sample_id"]
        for column in columns:
            flat = (np.concatenate([np.ravel(row) for row in lists[column]]) for lists in (one, other))
            np.testing.assert_allclose(*flat, atol=3e-5)
    assert served.lists(found["mask"]) == served.lists(local["mask"])
    record = found["teacher_topk"].meta["teacher_server"]
    assert record["of"] == "checkpoint" and len(record["logprobs"]) == 30
    assert "teacher_server" not in local["teacher_topk"].meta


def test_a_server_killed_in_the_middle_of_a_shard_costs_that_shard_alone(server, folders, described, tmp_path):
    undisturbed = Served(tmp_path / "undisturbed", server, folders["student"], described)
    expected = undisturbed.make()
    requests = len(server.asked)

    served = Served(tmp_path / "killed", server, folders["student"], described)
    start = len(server.asked)
    server.script = lambda number, sequences: "die" if number == start + (requests * 2) // 3 else None
    with pytest.raises(TeacherServerError, match="Finished shards are kept"):
        served.make()
    folder = served.bench.store.root / "artifacts" / "teacher_topk" / expected["teacher_topk"].key
    before = {file.name: file.read_bytes() for file in folder.glob("*.parquet")}
    assert 0 < len(before) < len(SHARDS)
    assert all(read_parquet(folder / name, ["valid"]).num_rows == 3 for name in before)

    server.script = lambda number, sequences: None
    server.start(server.port)
    served.forget_models()
    asked = sum(len(sequences) for sequences in server.asked)
    made = served.make()
    assert {name: made[name].content for name in made} == {name: expected[name].content for name in expected}
    assert {name: (folder / name).read_bytes() for name in before} == before
    samples = {tuple(ids) for request in server.asked for ids in request}
    assert sum(len(sequences) for sequences in server.asked) - asked < len(samples) + 20


def test_another_model_after_the_restart_is_refused_and_nothing_is_lost(server, folders, described, tmp_path):
    served = Served(tmp_path, server, folders["student"], described)
    start = len(server.asked)
    server.script = lambda number, sequences: "die" if number == start + 12 else None
    with pytest.raises(TeacherServerError):
        served.make()
    server.script = lambda number, sequences: None
    server.load(folders["other"])
    server.start(server.port)
    served.forget_models()
    with pytest.raises(OtherTeacher, match="Serve the old model"):
        served.make()
    server.load(folders["teacher"])
    served.forget_models()
    made = served.make()
    rows = served.lists(made["teacher_topk"])
    assert len(rows["sample_id"]) == sum(SHARDS) and all(count == 6 for row in rows["valid"] for count in row)


def test_a_sample_that_keeps_failing_ends_the_stage_with_its_name(server, folders, tmp_path):
    served = Served(tmp_path, server, folders["student"], folders["teacher"])
    rows = served.bench.store.read_table(served.rollouts, "rollouts").to_pylist()
    prompts = served.bench.store.read_table(served.prompts, "prompts").to_pylist()
    own = {row["prompt_id"]: row["teacher_token_ids"] or row["token_ids"] for row in prompts}
    bad = [*own[rows[4]["prompt_id"]], *rows[4]["completion_token_ids"]]
    server.script = lambda number, sequences: "500" if bad in sequences else None
    with pytest.raises(TeacherServerError, match=rf"teacher, {rows[4]['sample_id']}: no answer at 2 tries"):
        served.make()
    folders_of = list((served.bench.store.root / "artifacts" / "teacher_topk").glob("*/*.parquet"))
    assert len(folders_of) == 1  # the shard before it


def test_what_a_server_cannot_give_is_refused_before_it_is_asked(server, folders, tmp_path):
    served = Served(tmp_path, server, folders["student"], folders["teacher"])
    config = SuperviseConfig(teacher={"kind": "server", "model": "teacher"})
    with pytest.raises(
        ConfigError, match=r"kind server cannot give log-probabilities of the student's candidates, which"
    ):
        supervise_work(
            config, served.rollouts, served.student, served.teacher, served.prompts, [SignalNeed("student_topk", 3)],
            RolloutConfig(),
        )  # fmt: skip
    assert not server.asked
