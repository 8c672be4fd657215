"""Differences between two artifacts that should be equal: rows, files, tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.artifacts.artifact import Artifact, TreeRecord, artifact_directory, load_manifest
from storage.artifacts.digests import table_digest, tensors_of
from storage.artifacts.shards import without_measured
from storage.artifacts.trees import tree_directory
from storage.errors import CorruptArtifact
from storage.store import Store

_SHOWN = 5
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def differences(recorded: Artifact, store: Store, made: Artifact, scratch: Store) -> list[str]:
    """Report lines, the digests first; empty if the contents are equal. If the recorded data is evicted, only the digests are
    compared."""
    parts = sorted(
        part
        for part in recorded.content.keys() | made.content.keys()
        if recorded.content.get(part) != made.content.get(part)
    )
    if not parts:
        return []
    lines = [
        f"{part}: {made.content.get(part, 'absent')[:16]} instead of {recorded.content.get(part, 'absent')[:16]}"
        for part in parts
    ]
    if store.evicted(recorded) is not None:
        return [*lines, "the recorded data is evicted, so only the digests were compared"]
    for table in sorted(recorded.rows.keys() & made.rows.keys() & set(parts)):
        lines += _tables(table, store.read_table(recorded, table), scratch.read_table(made, table))
    before, after = _trees(store, recorded), _trees(scratch, made)
    for name in sorted(before.keys() & after.keys()):
        lines += _files(*before[name], *after[name])
    return lines


def _tables(name: str, before: pa.Table, after: pa.Table) -> Iterator[str]:
    before, after = without_measured(name, before), without_measured(name, after)
    if before.num_rows != after.num_rows:
        yield f"{name}: {after.num_rows} rows instead of {before.num_rows}"
        return
    for column in before.column_names:
        if table_digest(before.select([column])) == table_digest(after.select([column])):
            continue
        pairs = enumerate(zip(before[column].to_pylist(), after[column].to_pylist(), strict=True))
        rows = [(row, old, new) for row, (old, new) in pairs if repr(old) != repr(new)]
        row, old, new = rows[0]
        yield f"{name}.{column}: {len(rows)} of {before.num_rows} rows, first row {row}: {_short(new)} not {_short(old)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _trees(store: Store, artifact: Artifact) -> dict[str, tuple[Path, TreeRecord]]:
    directory = artifact_directory(store.root, artifact.stage, artifact.key)
    manifest = load_manifest(directory)
    if manifest is None:
        raise CorruptArtifact(f"{directory}: removed during the comparison; run again")
    return {name: (tree_directory(directory, tree), tree) for name, tree in manifest.trees.items()}


def _files(base: Path, before: TreeRecord, other: Path, after: TreeRecord) -> Iterator[str]:
    old, new = ({file.path: file.sha256 for file in tree.files} for tree in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name not in old or name not in new:
            yield f"{name}: {'only in the recorded one' if name in old else 'not in the recorded one'}"
        elif name.endswith(".safetensors"):
            yield from _tensors(base / name, other / name)
        else:
            yield f"{name}: other bytes"


def _tensors(before: Path, after: Path) -> Iterator[str]:
    old, new = tensors_of(before), tensors_of(after)
    different = 0
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name][0] != new[name][0]:
            shapes = [tensors[name][0] if name in tensors else "absent" for tensors in (new, old)]
            line = f"{before.name}: {name} is {shapes[0]} instead of {shapes[1]}"
        else:
            kind, first = old[name]
            second = new[name][1]
            if first == second:
                continue
            line = f"{before.name}: {name} {_apart(kind, first, second)}"
        different += 1
        if different <= _SHOWN:
            yield line
    if different > _SHOWN:
        yield f"{before.name}: {different} of {len(old.keys() | new.keys())} tensors differ"
    if different == 0:
        yield f"{before.name}: equal tensors in another layout"


def _apart(kind: str, first: bytes, second: bytes) -> str:
    form = _NUMBERS.get(kind.partition("[")[0])
    if form is None:
        return f"{kind}: other bytes"
    a, b = (np.frombuffer(data, form).astype(np.float64) for data in (first, second))
    return f"{kind}: {int((a != b).sum())} of {a.size} values, at most {np.abs(a - b).max():.3g} apart"
