"""Lazy Arrow datasets over shards, for queries. Only they import `pyarrow.dataset`, which imports pandas (0.25 s)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs


def dataset(paths: Sequence[Path], schema: pa.Schema) -> pads.Dataset:
    """A lazy Arrow dataset that verifies page checksums as it scans."""
    if not paths:
        return pads.dataset(schema.empty_table())
    scan = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = pads.ParquetFileFormat(default_fragment_scan_options=scan)
    return pads.dataset([str(path) for path in paths], schema=schema, format=form)


def absent_dataset(paths: Sequence[Path], schema: pa.Schema) -> pads.Dataset:
    """Like `dataset`, for files that do not exist: only a scan of them fails, and filters can prune them."""
    form, system = pads.ParquetFileFormat(), pafs.LocalFileSystem()
    fragments = [form.make_fragment(str(path), system) for path in paths]
    return pads.FileSystemDataset(fragments, schema, form, system)
