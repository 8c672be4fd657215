"""Lazy Arrow datasets over shards, for queries. Only they import `pyarrow.dataset`, which imports pandas (0.25 s)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from storage.artifacts.shards import footer_sha256_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_BLOCK = 1 << 20
"""Bytes that are read ahead of a remote's file."""


class _Verified(pafs.FSSpecHandler):  # type: ignore[misc]  # pyarrow is typed in part
    """Opens files of a remote; one whose footer has not the recorded sha256, or that cannot be read, is empty.

    No Python error may reach Arrow from here: it asks for the text of one while it holds a lock for which `Scanner.to_reader`
    waits with Python's own lock (pyarrow 26), and both wait for ever. Arrow refuses an empty file, and the catalog then reads the
    table's shards one by one, which finds the reason."""

    def __init__(self, fs: AbstractFileSystem, footers: Mapping[str, str]) -> None:
        super().__init__(fs)
        self.footers = footers

    def open_input_file(self, path: str) -> pa.NativeFile:
        try:
            file = _Quiet(self.fs.open(path, "rb", block_size=_BLOCK))
            if footer_sha256_of(file, path) == self.footers[path]:
                file.seek(0)
                return pa.PythonFile(file, mode="r")
        except Exception:  # of whatever client
            pass
        return pa.BufferReader(b"")


class _Quiet:
    """A file of a remote that ends where it cannot be read any more."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.closed = file, False
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        try:
            return self.file.read(size)
        except Exception:  # of whatever client
            return b""

    def close(self) -> None:
        self.closed = True
        with suppress(Exception):
            self.file.close()


def dataset(footers: Mapping[str, str], schema: pa.Schema, remote: AbstractFileSystem | None = None) -> pads.Dataset:
    """A lazy Arrow dataset over files (path -> sha256 of the footer), of this machine or of a `remote` file system. A scan
    verifies page checksums, and the footers of a remote's files."""
    if not footers:
        return pads.dataset(schema.empty_table())
    system = pafs.LocalFileSystem() if remote is None else pafs.PyFileSystem(_Verified(remote, footers))
    scan = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = pads.ParquetFileFormat(default_fragment_scan_options=scan)
    fragments = [form.make_fragment(path, system) for path in footers]
    return pads.FileSystemDataset(fragments, schema, form, system)


def absent_dataset(paths: Sequence[Path], schema: pa.Schema) -> pads.Dataset:
    """Like `dataset`, for files that do not exist: only a scan of them fails, and filters can prune them."""
    form, system = pads.ParquetFileFormat(), pafs.LocalFileSystem()
    fragments = [form.make_fragment(str(path), system) for path in paths]
    return pads.FileSystemDataset(fragments, schema, form, system)
