"""Lazy Arrow datasets over shards, for queries. Only they import `pyarrow.dataset`, which imports pandas (0.25 s)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from storage.artifacts.shards import footer_sha256_of
from storage.errors import CorruptArtifact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_BLOCK = 1 << 20
"""Bytes that are read ahead of a remote's file."""


class _Verified(pafs.FSSpecHandler):  # type: ignore[misc]  # pyarrow is typed in part
    """Opens only files whose footer has the recorded sha256."""

    def __init__(self, fs: AbstractFileSystem, footers: Mapping[str, str], here: bool) -> None:
        super().__init__(fs)
        self.footers, self.here = footers, here

    def open_input_file(self, path: str) -> pa.NativeFile:
        file = pa.OSFile(path) if self.here else pa.PythonFile(self.fs.open(path, "rb", block_size=_BLOCK), mode="r")
        try:
            found = footer_sha256_of(file, path)
        except CorruptArtifact as error:
            raise OSError(str(error)) from error
        if found != self.footers[path]:
            raise OSError(f"{path}: its footer differs from the recorded one")
        file.seek(0)
        return file


def dataset(footers: Mapping[str, str], schema: pa.Schema, remote: AbstractFileSystem | None = None) -> pads.Dataset:
    """A lazy Arrow dataset over files (path -> sha256 of the footer), of this machine or of a `remote` file system. A scan
    verifies the footer of each file that it opens, and page checksums."""
    if not footers:
        return pads.dataset(schema.empty_table())
    if remote is None:
        from fsspec.implementations.local import LocalFileSystem

        system = pafs.PyFileSystem(_Verified(LocalFileSystem(), footers, here=True))
    else:
        system = pafs.PyFileSystem(_Verified(remote, footers, here=False))
    scan = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = pads.ParquetFileFormat(default_fragment_scan_options=scan)
    fragments = [form.make_fragment(path, system) for path in footers]
    return pads.FileSystemDataset(fragments, schema, form, system)


def absent_dataset(paths: Sequence[Path], schema: pa.Schema) -> pads.Dataset:
    """Like `dataset`, for files that do not exist: only a scan of them fails, and filters can prune them."""
    form, system = pads.ParquetFileFormat(), pafs.LocalFileSystem()
    fragments = [form.make_fragment(str(path), system) for path in paths]
    return pads.FileSystemDataset(fragments, schema, form, system)
