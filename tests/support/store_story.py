"""All that the store does, as one short story for a process that may be killed anywhere in it and begins again."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from small_store import SHARDS, STUDENT, build, model, rows

from storage.artifacts.batches import BatchLog
from storage.artifacts.checkpoints import write_file
from storage.artifacts.shards import SIDECAR
from storage.disk import failpoints
from storage.disk.failpoints import failpoint
from storage.disk.remote import Remote
from storage.runs import RoundState, Run, StageState
from storage.store import Artifact, ArtifactSpec, Store
from storage.upkeep.pull import pull
from storage.upkeep.push import push

STEPS = 4
OLD = ArtifactSpec.of("mask", 1, {"policy": "old"}, {"rollouts": "cd" * 32})
"""Committed before the story begins, and damaged since."""
SAMPLED = ArtifactSpec.of("mask", 1, {"policy": "sampled"}, {"rollouts": "ef" * 32})


def before(root: Path) -> None:
    """What the story finds."""
    store = Store(root)
    artifact, _ = build(store, OLD, salt=3)
    path = root / "artifacts" / "mask" / OLD.key / store.shards(artifact, "mask")[1].file
    path.write_bytes(path.read_bytes()[:-5])


def story(root: Path) -> None:
    """A run that makes three artifacts and repairs a fourth, is pushed to a folder, and pulled into another store."""
    store = Store(root)
    run = Run.create(root, "story", {"seed": 0}, {"seed": 0})
    with run.lock():
        store.remove_leftovers()
        state = run.state
        state.status, state.rounds = "running", [RoundState(round=0)]
        run.save(state)
        made = [build(store)[0], learn(store), sample(store), build(store, OLD, salt=3)[0]]
        for number, artifact in enumerate(made):
            state.rounds[0].stages[f"stage_{number}"] = StageState(
                state="done", artifacts={artifact.stage: artifact.key}
            )
        state.status = "finished"
        run.save(state)
    remote = Remote(f"file://{_beside(root, 'remote')}")
    push(store, remote, [run])
    pull(Store(_beside(root, "pulled")), remote, [run.name])


def _beside(root: Path, what: str) -> Path:
    return root.with_name(f"{root.name}-{what}")


def learn(store: Store) -> Artifact:
    """A student that takes four steps, each saved: it goes on after the last one that was."""
    with store.building(STUDENT) as builder:
        if builder.committed is not None:
            return builder.committed
        kept = builder.checkpoints({"threads": 1})
        found, _ = kept.newest()
        value = found.files[0].read_bytes() if found is not None else b""
        assert len(value) == (found.step if found is not None else 0)
        while len(value) < STEPS:
            value += bytes([len(value)])
            failpoint("train.after_step")
            folder = kept.begin()
            kept.commit(folder, len(value), [write_file(folder / "value", partial(_write, value))], {})
        if builder.needs_tree():
            model(builder.directory(), value)
        return builder.commit()


def sample(store: Store) -> Artifact:
    """Shards that are sampled in a batch, whose record is durable before each of them."""
    with store.building(SAMPLED) as builder:
        log = BatchLog(builder.path, "mask")
        for shard in builder.missing("mask", SHARDS):
            log.add(shard, shard)
            log.writing(shard)
            builder.write_shard("mask", shard, rows(shard, salt=5))
        batches = builder.batches("mask", SHARDS) if builder.committed is None else None
        return builder.commit(tables={"mask": SHARDS}, provenance=batches)


def _write(value: bytes, path: Path) -> None:
    path.write_bytes(value)


def told(root: Path) -> dict[str, Any]:
    """How it must end, whatever happened on the way: in the store, and in the one that was pulled."""
    here, there = _told(root), _told(_beside(root, "pulled"))
    assert here == there
    for path in (root / "artifacts").rglob("*"):
        if path.is_file() and not path.name.endswith(SIDECAR):
            for other in ("remote", "pulled"):
                assert (_beside(root, other) / path.relative_to(root)).read_bytes() == path.read_bytes()
    assert [*_beside(root, "remote").rglob(".tmp-*"), *_beside(root, "pulled").rglob(".tmp-*")] == []
    return here


def _told(root: Path) -> dict[str, Any]:
    store, state = Store(root), Run.open(root, "story").state
    artifacts = store.list()
    assert [store.verify(artifact) for artifact in artifacts] == [[]] * len(artifacts)
    masks = [store.read_table(artifact, "mask").to_pylist() for artifact in artifacts if artifact.stage == "mask"]
    model = store.materialize(next(a for a in artifacts if a.key == STUDENT.key))
    return {
        "state": (state.status, state.rounds),
        "contents": sorted((a.stage, a.key, sorted(a.content.items())) for a in artifacts),
        "rows": sorted(masks, key=str),
        "files": sorted(path.name for path in model.iterdir()),
    }


def process(root: str, spec: str, log: str) -> None:
    """The story in a process of its own, with failpoints."""
    os.environ.update({failpoints.SPEC: spec, failpoints.LOG: log})
    failpoints.arm()
    story(Path(root))
