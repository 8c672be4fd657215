"""The stage with a teacher behind a server: whatever happens to the server costs the shard at hand at most (row 19)."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_trials import Trials, both_forms
from scoring import InProcess, ScoringBench, model_folder
from teacher_server import SLOW, TeacherServer

from storage.artifacts.shards import read_parquet
from storage.errors import ConfigError
from storage.store import Artifact, Store
from tasks.engines.server import OtherTeacher, TeacherServerError, probe_sequences
from tasks.inputs.models import ServedModel, model_work
from tasks.losses.needs import SignalNeed
from tasks.rollout_config import RolloutConfig
from tasks.supervise import SuperviseConfig, supervise_work

SHARDS = [3, 3, 2]
NEEDS = (SignalNeed("sampled"), SignalNeed("mask"), SignalNeed("teacher_topk", 6))


class Served:
    """A student here, a teacher there, and the stage between them. `folder`: what `teacher:` names."""

    def __init__(self, root: Path, server: TeacherServer, student: Path, folder: Path) -> None:
        self.connect(Store(root / "store"), server)
        self.student = self.bench.model(student)
        if any(folder.glob("*.safetensors")):
            self.teacher = self.bench.model(folder)
        else:
            self.teacher = self.bench.make(model_work(ServedModel(path=folder, revision="1"), 0))["model"]
        self.prompts = self.bench.prompts(self.student, self.teacher, root / "data")
        self.rollouts = self.bench.rollouts(student, self.prompts, SHARDS)

    def connect(self, store: Store, server: TeacherServer, **settings: float) -> None:
        """Go on with this store and this server, as a new worker begins. `settings`: of runtime.scorer.server."""
        access = {"urls": [server.url], "retries": 1, "backoff": 0.01, "sequences": 2} | settings
        # 32 tokens a batch: several batches a shard
        self.bench = ScoringBench(store, InProcess({"batch_tokens": 32, "server": access}))

    def copied(self, root: Path, server: TeacherServer, **settings: float) -> Served:
        """The same in another store."""
        shutil.copytree(self.bench.store.root, root)
        made = copy.copy(self)
        made.connect(Store(root), server, **settings)
        return made

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
    counted = [of["sampled"].meta["metrics"].get("teacher_entropy_candidates") for of in (found, local)]
    assert counted == [20, None], "entropies of a list are marked in the metrics"


STAYS = {
    "killed in mid-shard, started again later": ("die", "no answer at"),
    "every answer comes too late": ("slow", "no answer at"),
    "HTTP 500 to every request": ("500", "HTTP 500"),
    "fewer candidates than asked": ("fewer", "candidates, asked for 20"),
    "fewer sequences than asked": ("shorter", "sequences, asked for"),
    "another model than before": ("other", "Serve the old model"),
}
"""What begins at some request and lasts until somebody mends it -> how the server does it, part of the error."""
PASSES = {"one answer comes too late": "slow", "HTTP 500 to one request": "500", "one connection breaks": "drop"}
"""What happens to one request alone."""
START = 2
"""Requests before the first of a batch: what the server can give, and the proof of its model. The last one is a proof too."""


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, dict[str, Any], int]:
    """A store in which the stage is next, the contents that it must make, and the number of requests that it takes."""
    server, root = TeacherServer(folders["teacher"]), tmp_path_factory.mktemp("whole")
    served = Served(root, server, folders["student"], folders["teacher"])
    made = served.copied(root / "made", server).make()
    server.kill()
    return served, {name: artifact.content for name, artifact in made.items()}, len(server.asked)


@pytest.mark.parametrize("fault", [*STAYS, *PASSES])
@both_forms(short=1, full=12)
def test_a_fault_of_the_server_costs_the_shard_at_hand(
    whole: tuple[Served, dict, int], folders: dict[str, Path], trials: Trials, tmp_path: Path, fault: str, count: int
) -> None:
    """At a random request. One that passes changes nothing; one that stays ends the stage, which keeps its finished shards and
    goes on, when the server is mended, to the undisturbed artifacts."""
    first, expected, requests = whole

    def attempt(name: str) -> None:
        server = TeacherServer(folders["teacher"])
        at = random.Random(f"{fault} {name}").randrange(START, requests - 1)
        short = {"timeout": SLOW / 2} if "too late" in fault else {}
        try:
            if fault in PASSES:
                served = first.copied(tmp_path / name, server, retries=5, **short)
                server.script = lambda number, sequences: PASSES[fault] if number == at else None
                made = served.make()
                assert len(server.asked) > at
            else:
                served = first.copied(tmp_path / name, server, **short)
                made = ended_and_mended(served, server, folders, *STAYS[fault], at)
        finally:
            server.kill()
        assert {name: artifact.content for name, artifact in made.items()} == expected
        shutil.rmtree(tmp_path / name)

    trials(19, f"teacher's server: {fault}", map(str, range(count)), attempt)


def ended_and_mended(
    served: Served, server: TeacherServer, folders: dict[str, Path], how: str, said: str, at: int
) -> dict[str, Artifact]:
    """The stage until it ends with the error; then the server is as before, and a new worker asks for the unfinished shards
    alone."""

    def script(number: int, sequences: list[list[int]]) -> str | None:
        if how == "other" and number == at:
            server.load(folders["other"])
        return None if how == "other" or number < at else how

    server.script = script
    with pytest.raises((TeacherServerError, OtherTeacher), match=said):
        served.make()
    store = served.bench.store
    kept = {path: path.read_bytes() for path in (store.root / "artifacts" / "teacher_topk").glob("*/*.parquet")}
    rows = sum(read_parquet(path, ["valid"]).num_rows for path in kept)
    assert rows in (0, 3, 6)
    server.script = lambda number, sequences: None
    server.load(folders["teacher"])
    if how == "die":
        server.start(server.port)
    served.connect(store, server)
    before = len(server.asked)
    made = served.make()
    assert all(path.read_bytes() == data for path, data in kept.items())
    probes = [*probe_sequences(server.rows), [0, 0]]
    asked = [ids for sequences in server.asked[before:] for ids in sequences if ids not in probes]
    assert len(asked) == sum(SHARDS) - rows
    return made


@pytest.mark.promise(19, "teacher's server: killed in mid-shard, started again later")
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


@pytest.mark.promise(19, "teacher's server: another model than before")
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


@pytest.mark.promise(19, "teacher's server: HTTP 500 to one sample at every try")
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
