"""Locks and races with real processes: what a second `opd` on the same machine meets."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from places import CHECKOUT

from storage.disk import locks
from storage.disk.files import publish_exclusively
from storage.errors import StoreError
from storage.store import Artifact, ArtifactSpec, Store

SPEC = ArtifactSpec.of("mask", 1, {"race": True}, {})
PATIENCE = 60.0

BUILD = """
import json, sys, time
import pyarrow as pa
from storage.store import ArtifactSpec, Store
store = Store(sys.argv[1])
spec = ArtifactSpec.of("mask", 1, {"race": True}, {})
written = 0
with store.building(spec, lambda holder: print("waiting for", holder, flush=True)) as builder:
    for shard in builder.missing("mask", 4):
        time.sleep(float(sys.argv[2]))
        rows = [[shard, i] for i in range(5)]
        data = pa.table({"sample_id": [f"{shard}/{i}" for i in range(5)], "mask_reasons": rows})
        builder.write_shard("mask", shard, data)
        written += 1
    artifact = builder.commit(tables={"mask": 4})
print(json.dumps({"written": written, "content": artifact.content}))
"""

HOLD = """
import sys, time
from pathlib import Path
from storage.disk import locks
with locks.locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    child = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def refuse(holder: str) -> None:
    raise BlockingIOError(holder)


def test_one_process_builds_and_the_others_wait_and_reuse(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with ExitStack() as stack:
        with store.building(SPEC):  # until all of them wait; nothing is committed here
            children = [stack.enter_context(process(BUILD, tmp_path, 0.05)) for _ in range(3)]
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline().startswith(f"waiting for pid {os.getpid()} on ")
        results = [json.loads(child.communicate(timeout=PATIENCE)[0]) for child in children]  # one line: told once
    assert sorted(result["written"] for result in results) == [0, 0, 4]
    assert len({json.dumps(result["content"], sort_keys=True) for result in results}) == 1
    assert len(store.shards(store.list()[0], "mask")) == 4


def test_a_killed_builder_leaves_its_shards_and_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with process(BUILD, root, 0.3) as child:
        until(lambda: list(root.glob("artifacts/mask/*/mask-00001-*.sidecar.json")))
        child.send_signal(signal.SIGKILL)
        child.wait()
    store, waited = Store(root), []
    with store.building(SPEC, waited.append) as builder:
        missing = builder.missing("mask", 4)
        for shard in missing:
            rows = [[shard, i] for i in range(5)]
            data = pa.table({"sample_id": [f"{shard}/{i}" for i in range(5)], "mask_reasons": rows})
            builder.write_shard("mask", shard, data)
        artifact = builder.commit(tables={"mask": 4})
    assert waited == []
    assert 0 not in missing
    assert 1 not in missing
    assert 3 in missing
    with process(BUILD, tmp_path / "other", 0) as undisturbed:
        assert json.loads(undisturbed.communicate(timeout=PATIENCE)[0])["content"] == artifact.content


def test_of_many_racers_exactly_one_publishes(tmp_path: Path) -> None:
    for attempt in range(20):
        path, barrier = tmp_path / f"{attempt}.json", threading.Barrier(8)

        def race(number: int, path: Path = path, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return publish_exclusively(path, str(number).encode() * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(race, range(8)))
        assert sum(won) == 1
        assert path.read_bytes() == str(won.index(True)).encode() * 1000
    assert len(list(tmp_path.iterdir())) == 20


def test_without_locks_the_loser_gets_the_committed_artifact(tmp_path: Path) -> None:
    """Locks save work; the manifest's exclusive creation protects correctness."""
    first, second = Store(tmp_path), Store(tmp_path)
    data = pa.table({"sample_id": ["a"], "mask_reasons": [[1]]})
    with first.building(SPEC) as slow:
        slow.write_shard("mask", 0, data)
        (tmp_path / "locks" / f"mask-{SPEC.key}.lock").unlink()  # as if locking did not work

        def overtake() -> Artifact:
            with second.building(SPEC) as fast:
                fast.write_shard("mask", 0, data)
                return fast.commit(meta={"who": "fast"})

        with ThreadPoolExecutor(1) as pool:
            winner = pool.submit(overtake).result()
        assert slow.commit(meta={"who": "slow"}) == winner
    assert first.verify(winner) == []


def test_the_holder_is_named_while_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    assert locks.holder(path) is None
    with process(HOLD, path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        found = locks.holder(path)
        assert found is not None
        assert found.pid == child.pid
        assert str(tmp_path) in found.command
        with pytest.raises(BlockingIOError, match=f"pid {child.pid} on "), locks.locked(path, refuse):
            pass
        child.kill()
        child.wait()
        assert str(child.pid) in path.read_text()  # its name is still there, but it counts no longer
        assert locks.holder(path) is None
        with locks.locked(path, refuse):
            mine = locks.holder(path)
            assert mine is not None
            assert mine.pid == os.getpid()
    assert locks.holder(path) is None


def test_looking_at_a_lock_never_makes_it_busy(tmp_path: Path) -> None:
    path, stop = tmp_path / "lock", threading.Event()
    path.touch()

    def look() -> None:
        while not stop.is_set():
            locks.holder(path)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(50):
            with locks.locked(path, refuse):
                pass
    finally:
        stop.set()
        for thread in lookers:
            thread.join()


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    seen: list[int] = []

    def work(number: int) -> None:
        with locks.locked(tmp_path / "lock", lambda holder: None):
            inside.append(number)
            time.sleep(0.01)
            seen.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert seen == [1, 1, 1, 1]


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    script = """
import os, sys, time
from pathlib import Path
from storage.disk import locks
with locks.locked(Path(sys.argv[1]), print):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    time.sleep(600)
"""
    path = tmp_path / "lock"
    with process(script, path) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            parent.kill()
            parent.wait()
            assert locks.holder(path) is None
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_root_where_locks_do_not_exclude_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", lambda descriptor, operation: None)
    with pytest.raises(StoreError, match="do not exclude"):
        Store(tmp_path)
    assert list(tmp_path.glob(".tmp-*")) == []
