"""A teacher behind a real `vllm serve` on this machine: its values, and a run whose server is killed in the middle."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from opd_cli import OPD, opd
from places import TINY
from scoring import tokens
from vllm_server import NAME, VllmServer

from storage.runs import Run
from storage.store import Store
from tasks.engines.hf_folder import model_rows
from tasks.engines.local import LocalModel
from tasks.engines.server import ServerModel, offers
from tasks.engines.teacher import Host, Passage, ServerTeacher, Vocabulary
from tasks.signals import Ask
from tasks.workers.runtime import TeacherServerRuntime

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(finished) -> Path:
    """The tiny experiment's teacher, after its warm-up."""
    store = Store(finished.root)
    return store.materialize(store.require("student", finished.stage(0, "warmup_teacher")["artifacts"]["student"]))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    made = VllmServer(folder, tmp_path_factory.mktemp("server") / "log")
    yield made
    made.kill()


def test_values_are_those_of_the_local_teacher(server, folder, tmp_path):
    rows = model_rows(folder)
    settings = {"server": {"urls": [server.url]}}
    host = Host("cpu", 64, settings=settings, weights="of the teacher", store=tmp_path)
    backend = ServerTeacher(model=NAME, entropy_k=rows)
    (offer,) = offers(backend, TeacherServerRuntime(urls=(server.url,)), rows)
    assert (offer.rows, offer.longest, offer.length) == (rows, rows, 64)
    served, local = ServerModel(folder, "float32", host, backend), LocalModel(folder, "float32", host)
    asked = [Passage(tokens("prompt", i, length=3 + i), tokens("completion", i, length=20)) for i in range(6)]
    ask = Ask(logprobs=True, entropy=True, top=frozenset([8]))
    served.check(asked, [str(i) for i in range(6)])
    found, expected = (model.score(asked, ask, Vocabulary(rows, rows), {}) for model in (served, local))
    assert found.keys() == expected.keys()
    for name in ("logprobs", "entropy", "top8_logprobs"):
        np.testing.assert_allclose(np.concatenate(found[name]), np.concatenate(expected[name]), atol=1e-4, err_msg=name)
    tails = (np.exp(np.concatenate(values["top8_tail"])) for values in (found, expected))
    np.testing.assert_allclose(*tails, atol=2e-6)
    assert (np.concatenate(found["top8_ids"]) == np.concatenate(expected["top8_ids"])).mean() > 0.99


def arguments(server: VllmServer) -> list[str]:
    changes = [
        f"supervise.teacher={{kind: server, model: {NAME}}}",
        f"runtime.scorer.server={{urls: [{server.url}], retries: 1, backoff: 0.1, concurrency: 1, sequences: 1}}",
        "rollout.shard_prompts=4",
        "policy.rounds=1",
    ]
    return [str(TINY), *(part for change in changes for part in ("--set", change))]


def result(root: Path) -> tuple[str | None, dict[str, dict[str, str]]]:
    state = Run.open(root, "served").state
    store = Store(root)
    signals = {a.stage: a.content for a in store.list() if a.stage in ("sampled", "mask", "teacher_topk")}
    return state.rounds[1].student_sha256, signals


@pytest.mark.promise(19, "a real vllm serve: SIGKILL in mid-shard, started again later")
@pytest.mark.timeout(3600)  # six commands and two starts of the server
def test_a_server_that_is_killed_and_started_again_changes_nothing(server, prepared_root):
    undisturbed, killed = prepared_root("undisturbed"), prepared_root("killed")
    assert f"teacher: {server.url} serves '{NAME}'" in opd("check", *arguments(server), root=undisturbed).stdout
    opd("run", *arguments(server), "--name", "served", "--no-prefect", root=undisturbed)
    expected = result(undisturbed)

    command = [str(OPD), "run", *arguments(server), "--name", "served", "--no-prefect", "--root", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finished_shards = lambda: list((killed / "artifacts" / "teacher_topk").glob("*/*.parquet"))  # noqa: E731
    while not finished_shards():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    server.kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Finished shards are kept" in said, said
    kept = {path: path.read_bytes() for path in finished_shards()}
    assert 0 < len(kept) < 8

    other = opd("resume", "served", root=killed, check=False)
    assert other.returncode != 0 and "no answer from the teacher's server" in other.stdout + other.stderr
    server.start()
    opd("resume", "served", root=killed)
    assert result(killed) == expected
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert json.loads(opd("status", "served", "--json", root=killed).stdout)["rounds"][1]["metrics"]["reverse_kl"] > 0
    opd("verify", "--all", root=killed)
