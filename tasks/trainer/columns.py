"""A round's samples on disk. What has an entry per token is written to one file per column, part by part, and mapped by every
rank: a step reads the pages of its own samples and drops them. What has an entry per sample stays in memory.

Parquet cannot be read like this: a step's samples are spread over all shards, and one row costs the decompression of its row
group. So the shards are read once, in order, before the first step."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch.distributed as dist

from storage.disk.files import temporary_name
from tasks.trainer.data import Ragged, Samples
from tasks.trainer.launch import NODES
from tasks.trainer.topk_lists import lists_of, support_of

_OF_LISTS = ("starts", "counts", "ids", "teacher", "student", "teacher_tail")
_PER_TOKEN = ("segments", "written", "valid", "spans")
_NOTHING = np.empty(0)


@dataclass(frozen=True)
class Collected:
    """Samples whose columns are files in `folder`. Small enough to be sent to other ranks."""

    folder: Path
    kinds: dict[str, np.dtype]
    """By column its type."""
    samples: Samples
    """Without the columns."""

    def mapped(self) -> Samples:
        """The samples with maps of the files, which may be removed afterwards."""
        maps = {name: _map(self.folder / _file(name)) for name in self.kinds}
        arrays = {
            name: np.empty(0, self.kinds[name]) if found is None else np.frombuffer(found, self.kinds[name])
            for name, found in maps.items()
        }
        samples = _with_columns(self.samples, arrays)
        return replace(samples, maps=tuple(found for found in maps.values() if found is not None))


def collect(parts: Iterable[Samples], folder: Path) -> Collected:
    """Writes the columns of all parts, at least one, into the empty `folder`, one after another. Holds one part at a time."""
    kinds: dict[str, np.dtype] = {}
    kept: list[Samples] = []
    entries: list[int] = []
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for part in parts:
            lists = lists_of(part.support)
            entries = entries or [0] * len(lists)
            for name, values in _columns(part).items():
                if name not in files:
                    files[name] = stack.enter_context(open(folder / _file(name), "wb"))
                    kinds[name] = values.dtype
                if values.dtype != kinds[name]:
                    raise TypeError(f"{name}: {values.dtype} after {kinds[name]}")
                if name.endswith(".starts"):
                    values = values + entries[int(name.partition(".")[0])]
                files[name].write(np.ascontiguousarray(values).data)
            entries = [before + len(own.ids) for before, own in zip(entries, lists, strict=True)]
            kept.append(_with_columns(part, dict.fromkeys(kinds, _NOTHING)))
            del part, lists
    return Collected(folder, kinds, _joined(kept))


@contextmanager
def shared(root: Path, make: Callable[[Path], Collected]) -> Iterator[Samples]:
    """What `make`, called on rank 0 with an empty folder under `root`, has collected, mapped on every rank. Collective.

    Where all ranks are on one node, the folder is removed as soon as they have opened its files: the system frees them when the
    last rank drops its maps or is killed. A file system of several nodes need not keep a removed file for another node, so there
    the folder stays to the end of the block; all ranks must have read all they need by then."""
    found: list[Collected | None] = [None]
    with ExitStack() as until:
        if dist.get_rank() == 0:
            found = [make(until.enter_context(_folder(root)))]
        dist.broadcast_object_list(found, src=0)
        assert found[0] is not None
        samples = found[0].mapped()
        dist.barrier()
        if int(os.environ.get(NODES, "1")) == 1:
            until.close()
        yield samples


@contextmanager
def _folder(root: Path) -> Iterator[Path]:
    folder = root / temporary_name("round")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file(column: str) -> str:
    return f"{column}.raw"


def _map(path: Path) -> mmap.mmap | None:
    """None for an empty file, which has no map."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None


def _columns(samples: Samples) -> dict[str, np.ndarray]:
    """Everything with an entry per token or per list entry, by name."""
    found = {"prompts": samples.prompts.values, "completions": samples.completions.values, "keep": samples.keep}
    found |= {f"floats.{name}": values for name, values in samples.floats.items()}
    for name in _PER_TOKEN:
        if (values := getattr(samples, name)) is not None:
            found[name] = values
    for place, lists in enumerate(lists_of(samples.support)):
        arrays = {f"{place}.{name}": getattr(lists, name) for name in _OF_LISTS}
        found |= {name: values for name, values in arrays.items() if values is not None}
    return found


def _with_columns(samples: Samples, columns: dict[str, np.ndarray]) -> Samples:
    """The inverse of `_columns`."""
    lists = []
    for place, own in enumerate(lists_of(samples.support)):
        arrays: dict[str, Any] = {name: columns.get(f"{place}.{name}") for name in _OF_LISTS}
        lists.append(replace(own, **arrays))
    return replace(
        samples,
        prompts=Ragged(columns["prompts"], samples.prompts.offsets),
        completions=Ragged(columns["completions"], samples.completions.offsets),
        keep=columns["keep"],
        floats={name: columns[f"floats.{name}"] for name in samples.floats},
        segments=columns.get("segments"),
        written=columns.get("written"),
        valid=columns.get("valid"),
        spans=columns.get("spans"),
        support=support_of(lists),
    )


def _joined(parts: list[Samples]) -> Samples:
    """One after another, without their columns. The lists are as wide as the widest."""
    first = parts[0]
    lists = zip(*(lists_of(part.support) for part in parts), strict=True)
    lost = None if first.lost is None else np.concatenate([part.lost for part in parts if part.lost is not None])
    return replace(
        first,
        ids=[name for part in parts for name in part.ids],
        prompts=Ragged(_NOTHING, _edges([part.prompts for part in parts])),
        completions=Ragged(_NOTHING, _edges([part.completions for part in parts])),
        support=support_of([replace(same[0], k=max(own.k for own in same)) for same in lists]),
        invalid=sum(part.invalid for part in parts),
        lost=lost,
    )


def _edges(parts: list[Ragged]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))])
