"""What planning and queries need of a manifest, without its shards one by one.

The manifest of thousands of shards takes a second to parse and check. What is needed of it is kept in the store's `memo/`, by
the manifest's path, inode, size and time, beside a digest of the sizes and times of its files: one look at each file's stat then
shows whether any has changed. Nothing but time is lost with the memo; `opd verify` does not use it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from storage.artifacts.artifact import MANIFEST, Artifact, FileRecord, Manifest, TableRecord, load_manifest
from storage.artifacts.shards import SIDECAR
from storage.disk.files import TEMPORARY, replace_atomically, seal, unseal
from storage.errors import CorruptArtifact
from storage.identity import canonical_json
from storage.schemas import TableSchema, declared

LEAST_SHARDS = 256
"""Manifests with fewer shards are read whole each time: that is as fast."""
_RACY_SECONDS = 2.0  # a file written this recently may be written again within one tick of its mtime
_Stamp = tuple[str, int, int]
"""Name, bytes and mtime_ns of a file."""


@dataclass(frozen=True)
class Summary:
    """Of a committed artifact's manifest."""

    artifact: Artifact
    evicted: str | None
    bytes: int
    """Of its files in the store; 0 once its data was evicted."""
    tables: dict[str, TableRecord]
    shards: int
    manifest: Manifest | None
    """The manifest, where it was read whole."""
    stamps: str = ""
    """Digest of the shards' stamps."""
    files: tuple[FileRecord, ...] = ()
    """The files of its trees."""

    def unchanged(self, directory: Path) -> bool:
        """Whether the files have their recorded sizes and times, by one look at the folder. False also where the memo cannot
        say."""
        if self.manifest is not None:
            return False
        try:
            if digest(_shards_in(directory)) != self.stamps:
                return False
            stats = [(os.stat(directory / file.path), file) for file in self.files]
        except OSError:
            return False
        return all((s.st_size, s.st_mtime_ns) == (file.bytes, file.mtime_ns) for s, file in stats)

    def table_schema(self, table: str) -> TableSchema:
        """The declaration of one of its tables: its own, or this program's. StoreError where there is neither."""
        return self.tables[table].schema_of(table) if table in self.tables else declared(table)


def summary(directory: Path, memo: Path) -> Summary | None:
    """Of the artifact in a folder; None if it is not committed. CorruptArtifact for a damaged manifest."""
    path = directory / MANIFEST
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    stamp = canonical_json([os.fspath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns])
    note = memo / f"manifest-{hashlib.sha256(stamp.encode()).hexdigest()[:40]}"
    with suppress(OSError, CorruptArtifact, ValidationError, KeyError, TypeError):
        return _from_memo(unseal(note), (directory.parent.name, directory.name))
    manifest = load_manifest(directory)
    if manifest is None:
        return None
    sizes = sum(file.bytes for file in manifest.own_files())
    found = Summary(manifest.artifact, manifest.evicted, sizes, manifest.tables, len(manifest.shards), manifest)
    if len(manifest.shards) >= LEAST_SHARDS and time.time() - stat.st_mtime > _RACY_SECONDS:
        with suppress(OSError):  # the memo is optional: a full or read-only disk must not stop the reader
            replace_atomically(note, seal(_for_memo(found, manifest)))
    return found


def digest(stamps: Iterable[_Stamp]) -> str:
    """Of the names, sizes and times of files."""
    lines = sorted(f"{name}\0{size}\0{mtime}" for name, size, mtime in stamps)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shards_in(directory: Path) -> Iterator[_Stamp]:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            if name.endswith(".parquet") and not name.startswith(TEMPORARY) and not name.endswith(SIDECAR):
                stat = entry.stat(follow_symlinks=False)
                yield name, stat.st_size, stat.st_mtime_ns


def _for_memo(found: Summary, manifest: Manifest) -> dict[str, Any]:
    trees = [file.model_dump() for file in manifest.own_files()][len(manifest.shards) :]
    return {
        "artifact": manifest.artifact.model_dump(mode="json"),
        "evicted": manifest.evicted,
        "bytes": found.bytes,
        "tables": {name: table.model_dump(mode="json") for name, table in manifest.tables.items()},
        "shards": found.shards,
        "stamps": digest((shard.file, shard.bytes, shard.mtime_ns) for shard in manifest.shards),
        "files": trees,
    }


def _from_memo(content: dict[str, Any], name: tuple[str, str]) -> Summary:
    artifact = Artifact.model_validate(content["artifact"])
    if (artifact.stage, artifact.key) != name:
        raise KeyError(name)
    tables = {table: TableRecord.model_validate(record) for table, record in content["tables"].items()}
    files = tuple(FileRecord.model_validate(file) for file in content["files"])
    return Summary(
        artifact, content["evicted"], content["bytes"], tables, content["shards"], None, content["stamps"], files
    )
