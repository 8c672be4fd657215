"""A small artifact of each kind, and ways to damage it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pyarrow as pa

from storage.artifacts import shards
from storage.store import Artifact, ArtifactSpec, Store

SHARDS = 3


def rows(shard: int, salt: int = 0, n: int = 40) -> pa.Table:
    reasons = [[(shard * 31 + i * j + salt) % 16 for j in range(20)] for i in range(n)]
    return pa.table({"sample_id": [f"p{shard}/{i}" for i in range(n)], "mask_reasons": reasons})


SPEC = ArtifactSpec.of("mask", 1, {"policy": "default"}, {"rollouts": "ab" * 32})


def build(store: Store, spec: ArtifactSpec = SPEC, salt: int = 0) -> tuple[Artifact, list[int]]:
    """Builds what is missing, as a stage does: (artifact, shards that were written)."""
    with store.building(spec) as builder:
        missing = builder.missing("mask", SHARDS)
        for shard in missing:
            store.shard_writer(spec.stage, spec.key).write_shard("mask", shard, rows(shard, salt))
        return builder.commit(tables={"mask": SHARDS}, meta={"metrics": {"n": 1}}), missing


def shard_path(store: Store, artifact: Artifact, shard: int) -> Path:
    return store.root / "artifacts" / artifact.stage / artifact.key / store.shards(artifact, "mask")[shard].file


def flip(path: Path, at: int) -> None:
    """Flips one bit; size and time stamps stay, as on a failing disk."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def quarantined(store: Store) -> list[str]:
    notes = [json.loads(path.read_text()) for path in sorted((store.root / "quarantine").glob("*.reason.json"))]
    return [f"{note['path']}: {note['reason']}" for note in notes]


def fresh(store: Store) -> Store:
    """The store as another process sees it: nothing verified yet."""
    shards._verified.clear()
    return Store(store.root)


def model(folder: Path, value: bytes = b"w") -> Path:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(value)], "data_offsets": [0, len(value)]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + value)
    (folder / "sub" / "extra.bin").write_bytes(b"extra")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STUDENT = ArtifactSpec.of("student", 1, {"lr": 0.1}, {})


def build_student(store: Store, value: bytes = b"w") -> Artifact:
    with store.building(STUDENT) as builder:
        if builder.needs_tree():
            model(builder.directory(), value)
        return builder.commit()


def forget_memory() -> None:
    """Empties fsspec's file system in memory, which a process has once."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
