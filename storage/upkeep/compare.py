"""Differences between two artifacts that should be equal: rows, files, tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Differences:
    """What differs, a line each, the digests first. `largest`: the largest absolute difference of two numbers, where nothing
    but numbers differs; else null."""

    lines: tuple[str, ...] = ()
    largest: float | None = None

    def __bool__(self) -> bool:
        return bool(self.lines)


_Line = tuple[str, float]
"""A line of the report, and how far numbers are apart; infinite where something else differs."""


def differences(recorded: Artifact, store: Store, made: Artifact, scratch: Store) -> Differences:
    """How the content of `made` differs from the recorded one. If the recorded data is evicted, only the digests are compared."""
    parts = sorted(
        part
        for part in recorded.content.keys() | made.content.keys()
        if recorded.content.get(part) != made.content.get(part)
    )
    if not parts:
        return Differences()
    digests = [
        f"{part}: {made.content.get(part, 'absent')[:16]} instead of {recorded.content.get(part, 'absent')[:16]}"
        for part in parts
    ]
    if store.evicted(recorded) is not None:
        return Differences((*digests, "the recorded data is evicted, so only the digests were compared"))
    lines: list[_Line] = []
    for table in sorted(recorded.rows.keys() & made.rows.keys() & set(parts)):
        lines += _tables(table, store.read_table(recorded, table), scratch.read_table(made, table))
    before, after = _trees(store, recorded), _trees(scratch, made)
    for name in sorted(before.keys() & after.keys()):
        lines += _files(*before[name], *after[name])
    largest = max((apart for _, apart in lines), default=math.inf)
    return Differences((*digests, *(text for text, _ in lines)), largest if math.isfinite(largest) else None)


def _tables(name: str, before: pa.Table, after: pa.Table) -> Iterator[_Line]:
    before, after = without_measured(name, before), without_measured(name, after)
    if before.num_rows != after.num_rows:
        yield f"{name}: {after.num_rows} rows instead of {before.num_rows}", math.inf
        return
    for column in before.column_names:
        if table_digest(before.select([column])) == table_digest(after.select([column])):
            continue
        pairs = enumerate(zip(before[column].to_pylist(), after[column].to_pylist(), strict=True))
        rows = [(row, old, new) for row, (old, new) in pairs if repr(old) != repr(new)]
        row, old, new = rows[0]
        text = (
            f"{name}.{column}: {len(rows)} of {before.num_rows} rows, first row {row}: {_short(new)} not {_short(old)}"
        )
        yield text, max(_values_apart(old, new) for _, old, new in rows)


def _values_apart(old: object, new: object) -> float:
    """The largest difference of two numbers or of two lists of numbers; infinite for anything else."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return max((_values_apart(*pair) for pair in zip(old, new, strict=True)), default=0.0)
    if isinstance(old, float) and isinstance(new, float):
        return 0.0 if repr(old) == repr(new) else abs(old - new)
    return 0.0 if old == new else math.inf


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _trees(store: Store, artifact: Artifact) -> dict[str, tuple[Path, TreeRecord]]:
    directory = artifact_directory(store.root, artifact.stage, artifact.key)
    manifest = load_manifest(directory)
    if manifest is None:
        raise CorruptArtifact(f"{directory}: removed during the comparison; run again")
    return {name: (tree_directory(directory, tree), tree) for name, tree in manifest.trees.items()}


def _files(base: Path, before: TreeRecord, other: Path, after: TreeRecord) -> Iterator[_Line]:
    old, new = ({file.path: file.sha256 for file in tree.files} for tree in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name not in old or name not in new:
            yield f"{name}: {'only in the recorded one' if name in old else 'not in the recorded one'}", math.inf
        elif name.endswith(".safetensors"):
            yield from _tensors(base / name, other / name)
        else:
            yield f"{name}: other bytes", math.inf


def _tensors(before: Path, after: Path) -> Iterator[_Line]:
    old, new = tensors_of(before), tensors_of(after)
    different, largest = 0, 0.0
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name][0] != new[name][0]:
            shapes = [tensors[name][0] if name in tensors else "absent" for tensors in (new, old)]
            line, apart = f"{before.name}: {name} is {shapes[0]} instead of {shapes[1]}", math.inf
        else:
            kind, first = old[name]
            second = new[name][1]
            if first == second:
                continue
            text, apart = _tensor_apart(kind, first, second)
            line = f"{before.name}: {name} {text}"
        different, largest = different + 1, max(largest, apart)
        if different <= _SHOWN:
            yield line, apart
    if different > _SHOWN:
        yield f"{before.name}: {different} of {len(old.keys() | new.keys())} tensors differ", largest
    if different == 0:
        yield f"{before.name}: equal tensors in another layout", math.inf


def _tensor_apart(kind: str, first: bytes, second: bytes) -> _Line:
    form = _NUMBERS.get(kind.partition("[")[0])
    if form is None:
        return f"{kind}: other bytes", math.inf
    a, b = (np.frombuffer(data, form).astype(np.float64) for data in (first, second))
    apart = float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())
    return f"{kind}: {int((a != b).sum())} of {a.size} values, at most {apart:.3g} apart", apart
