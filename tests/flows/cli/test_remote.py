"""`opd push`, `opd pull`, and commands that read a pushed store where it is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import fsspec
import pytest
from opd_cli import in_this_process
from small_store import forget_memory

from storage.disk.locks import alone
from storage.runs import Run
from storage.store import Store

REMOTE = "memory://bucket/runs"


@pytest.fixture
def opd(monkeypatch, capsys, tmp_path, example_store) -> Iterator:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield in_this_process(monkeypatch, capsys, example_store)
    forget_memory()


def test_push_and_pull_say_what_they_do(opd, tmp_path, example_store):
    planned = opd("push", "demo", tmp_path / "backup", "--dry-run")
    assert planned.code == 0 and "would push to" in planned.out and not (tmp_path / "backup").exists()
    sent = opd("push", "demo", tmp_path / "backup")
    assert sent.code == 0 and "demo; 16 artifacts, 41 files" in sent.out, sent
    again = json.loads(opd("push", "demo", tmp_path / "backup", "--json").out)
    assert (again["artifacts"], again["already_there"], again["runs"]) == (0, 16, [])
    other = tmp_path / "elsewhere" / "store"
    fetched = json.loads(opd("pull", "--all", tmp_path / "backup", "--json", root=other).out)
    assert fetched["runs"] == ["demo"] and fetched["bytes"] > 0 and fetched["artifacts"] == 16
    assert opd("verify", "demo", root=other).code == 0
    assert opd("status", "demo", "--json", root=other).code == 0


def test_what_is_asked_wrongly(opd, tmp_path, example_store):
    for args, said in (
        (("push", "demo"), "opd push NAME REMOTE | opd push --all REMOTE"),
        (("push", "demo", "x", "--all"), "opd push --all REMOTE"),
        (("push", "dmo", "x"), "did you mean 'demo'"),
        (("push", "demo", "nothing://x/y"), "unknown protocol"),
        (("push", "demo", "gs://x/y"), "pip install 'opdflow[gcs]'"),
        (("push", "demo", example_store), "is this store itself"),
        (("pull", "demo", tmp_path / "nowhere"), "no store is there"),
    ):
        result = opd(*args)
        assert result.code == 2 and said in result.err and result.err.count("\n") == 1, (args, result)
    assert opd("pull", "demo", tmp_path / "nowhere", root=tmp_path / "new").code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_all_leaves_out_what_is_running(opd, tmp_path, example_store):
    with alone(Run.open(example_store, "demo").directory / "run.lock"):
        assert opd("push", "demo", REMOTE).code == 75
        result = opd("push", "--all", REMOTE)
    assert result.code == 75 and "'demo'" in result.err and "other; " in result.out
    assert opd("push", "--all", REMOTE).code == 0


READ = (
    ("query", "SELECT run, round, accuracy_greedy FROM rounds ORDER BY ALL", "--json"),
    ("query", "demo", "SELECT sum(teacher_logprob) AS s, count(*) AS n FROM tokens WHERE round = 2", "--json"),
    ("query", "demo", "worst-tokens", "round=2", "--json"),
    ("query", "demo", "SELECT sample_id, mask_reasons FROM supervision ORDER BY ALL", "--csv"),
    ("ls", "--json"),
    ("status", "demo"),
    ("compare", "demo", "--json"),
    ("show", "demo", "--sample", "p1/2/0"),
)


def test_what_reads_a_store_reads_a_remote(opd, example_store, tmp_path):
    assert opd("push", "--all", REMOTE).code == 0
    for args in READ:
        here, there = opd(*args), opd(*args, root=REMOTE)
        assert there.code == here.code == 0, (args, there.err)
        if args[0] != "status":
            assert there.out == here.out, args
    status = opd("status", "demo", root=REMOTE).out
    assert f"at {REMOTE}" in status and f"pull demo {REMOTE}" in status and "cache" not in status
    assert opd("report", "demo", "-o", tmp_path / "page.html", root=REMOTE).code == 0
    assert "accuracy" in (tmp_path / "page.html").read_text()


def test_a_remote_is_read_as_it_is_now_and_never_written(opd, example_store):
    run = Run.open(example_store, "demo")
    whole = run.state
    with run.lock():
        earlier = whole.model_copy(deep=True)
        earlier.rounds = earlier.rounds[:2]
        run.save(earlier)
    opd("push", "demo", REMOTE)
    count = ("query", "SELECT count(*) AS n FROM rounds", "--json")
    assert json.loads(opd(*count, root=REMOTE).out) == [{"n": 2}]
    with run.lock():
        run.save(whole)
    opd("push", "demo", REMOTE)
    files = dict(fsspec.filesystem("memory").store)
    assert json.loads(opd(*count, root=REMOTE).out) == [{"n": 3}]
    for args in (("gc",), ("resume", "demo"), ("verify", "demo"), ("export", "demo", "x")):
        refused = opd(*args, root=REMOTE)
        assert refused.code == 2 and refused.err.count("\n") == 1, (args, refused)
    assert dict(fsspec.filesystem("memory").store) == files
    assert opd("query", "SELECT 1", root="memory://bucket/nothing").code == 2


def test_damage_at_a_remote_is_not_read(opd, example_store):
    opd("push", "demo", REMOTE)
    memory = fsspec.filesystem("memory")
    key = Run.open(example_store, "demo").state.rounds[1].stages["rollout"].artifacts["rollout"]
    shard = min(path for path in memory.find(f"/bucket/runs/artifacts/rollout/{key}") if path.endswith("parquet"))
    data = bytearray(memory.cat_file(shard))
    data[len(data) - 30] ^= 1  # in the footer
    memory.pipe_file(shard, bytes(data))
    result = opd("query", "demo", "SELECT count(completion_text) FROM rollouts WHERE round = 1", root=REMOTE)
    assert result.code in (1, 2) and key in result.err, result
    assert opd("query", "demo", "SELECT count(*) FROM rollouts WHERE round = 2", root=REMOTE).code == 0
    assert Store(example_store).get("rollout", key) is not None
