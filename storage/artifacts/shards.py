"""Shards: one Parquet file each, with a sidecar that has its hash and digest. The shard is the unit of redo.

Written under a unique name straight into the artifact's directory: temporary name, fsync, rename, fsync of the
directory, then the sidecar. A shard without a sidecar was never finished; one that differs from its sidecar is damaged."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from storage.artifacts.artifact import ShardRecord, artifact_directory
from storage.artifacts.digests import file_sha256, table_digest
from storage.artifacts.numerics import INTERMEDIATE
from storage.artifacts.packed import is_packed, packed_schema, parts, unpack
from storage.disk.failpoints import failpoint
from storage.disk.files import (
    explain_full_disk,
    fsync_directory,
    fsync_file,
    make_directory,
    replace_atomically,
    seal,
    temporary_name,
    unique,
    unreadable,
    unseal,
)
from storage.errors import CorruptArtifact, StoreError
from storage.schemas import TableSchema, declared, validate_table

SIDECAR = ".sidecar.json"
# Covered by the file's hash, but no part of what a shard contains: wall time differs in every repetition, and columns added
# later must leave the digests of earlier versions as they are.
_MEASURED = {"training_steps": ("seconds", "drift", "masked_tokens")}
_SHARD_FILE = re.compile(r"(?P<table>[a-z][a-z0-9_]*)-(?P<shard>\d{5,})-[0-9a-f]{12}\.parquet")
_MAGIC = b"PAR1"

_verified: set[tuple[str, int, int, int, str]] = set()


class ShardWriter:
    """Writes shards of one unfinished artifact. Takes no lock: worker processes use it under their parent's."""

    def __init__(self, root: Path, stage: str, key: str) -> None:
        self.root = root
        self.stage = stage
        self.key = key
        self.path = artifact_directory(root, stage, key)

    def intermediate(self) -> IntermediateShards:
        """The artifact's intermediate shards: one worker writes them, another reads them; they are not committed."""
        return IntermediateShards(self.root, self.stage, self.key)

    def table_schema(self, table: str) -> TableSchema:
        """The declaration of a table. StoreError for one that is not declared in `storage.schemas`."""
        return declared(table)

    def write_shard(self, table: str, shard: int, data: pa.Table, schema: TableSchema | None = None) -> ShardRecord:
        """Writes one shard durably. `data` must have the columns that `table` is declared with: in `storage.schemas`, or for a
        plugin's table by `schema`. Or they are packed (`storage.artifacts.packed`); the digest is that of the declared columns.

        Raises StoreError for other columns, an unknown table or an artifact that is not being built; NotEnoughSpace."""
        if isinstance(shard, bool) or shard < 0:
            raise StoreError(f"{table}: shard number {shard!r}; shards count from 0")
        schema = schema or self.table_schema(table)
        layout = packed_schema(schema) if is_packed(data.column_names) else None
        rows = validate_table(table, data, layout or schema).replace_schema_metadata(None)
        if not self.path.is_dir():
            raise StoreError(f"{self.path}: this artifact is not being built; write shards inside `Store.building`")
        name = f"{table}-{shard:05d}-{unique()}.parquet"
        temporary, final = self.path / temporary_name(name), self.path / name
        failpoint("shard.before_write")
        with explain_full_disk(final):
            try:
                write_parquet(rows, temporary)
                digest, footer = file_sha256(temporary), footer_sha256(temporary)
                stat = temporary.stat()
                failpoint("shard.before_rename", temporary)
                os.rename(temporary, final)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            failpoint("shard.after_rename", final)
            fsync_directory(self.path)
        failpoint("shard.before_sidecar", final)
        record = ShardRecord(
            table=table,
            shard=shard,
            file=name,
            sha256=digest,
            bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            footer_sha256=footer,
            rows=rows.num_rows,
            row_digest=row_digest(table, rows if layout is None else _unpacked(rows)),
            schema_version=schema.version,
        )
        replace_atomically(sidecar(final), seal(record.model_dump(mode="json")))
        failpoint("shard.after_sidecar", final)
        return record


class IntermediateShards(ShardWriter):
    """The intermediate shards of one unfinished artifact, in a subfolder. They survive a kill and are removed at the commit."""

    def __init__(self, root: Path, stage: str, key: str) -> None:
        super().__init__(root, stage, key)
        self.path = self.path / INTERMEDIATE

    def write_shard(self, table: str, shard: int, data: pa.Table, schema: TableSchema | None = None) -> ShardRecord:
        if not self.path.is_dir() and self.path.parent.is_dir():
            make_directory(self.path)
        return super().write_shard(table, shard, data, schema)

    def read(self, table: str, shard: int) -> pa.Table | None:
        """The rows of a shard, verified; None where it is missing or damaged."""
        for path, record in sidecars(self.path, table, shard):
            if record is not None and check_file(path, record.bytes, record.sha256) is None:
                return read_parquet(path)
        return None

    def forget(self, table: str, shard: int) -> None:
        """Remove a shard, if it is there."""
        for path, _ in list(sidecars(self.path, table, shard)):
            sidecar(path).unlink(missing_ok=True)  # first: a shard without a sidecar is ignored
            path.unlink(missing_ok=True)

    def require(self, table: str, shard: int) -> pa.Table:
        """The rows of a shard, verified. CorruptArtifact where it is missing or damaged."""
        rows = self.read(table, shard)
        if rows is None:
            raise CorruptArtifact(
                f"{self.path}: shard {shard} of {table} is missing or damaged; run again: it is made again"
            )
        return rows


def row_digest(table: str, rows: pa.Table) -> str:
    """Digest of a shard's rows, without the columns that measure the machine."""
    return table_digest(without_measured(table, rows))


def without_measured(table: str, rows: pa.Table) -> pa.Table:
    """The columns that must be equal in every repetition."""
    return rows.drop_columns([name for name in _MEASURED.get(table, ()) if name in rows.column_names])


def write_parquet(table: pa.Table, path: Path) -> None:
    """zstd, a checksum in every page, fsynced. Lists of a packed table are split into planes of bytes."""
    how: dict[str, Any] = {}
    if is_packed(table.column_names):
        lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
        how["column_encoding"] = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists}
        how["use_dictionary"] = [name for name in table.column_names if name not in lists]
    pq.write_table(table, path, compression="zstd", write_page_checksum=True, **how)
    fsync_file(path)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one file (of a packed table the declared columns) and verifies the checksum of every page read. CorruptArtifact when
    one does not match."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if is_packed(names := file.schema_arrow.names):
            wanted = list(parts(names)) if columns is None else columns
            needed = {argument for name in wanted for argument in parts(names)[name].arguments}
            return unpack(file.read(columns=sorted(needed)), wanted, names)
        return file.read(columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise CorruptArtifact(f"{path}: unreadable Parquet ({error})") from error


def _unpacked(rows: pa.Table) -> pa.Table:
    return unpack(rows, list(parts(rows.column_names)), rows.column_names)


def sidecar(shard: Path) -> Path:
    return shard.with_name(shard.name + SIDECAR)


def sidecars(
    directory: Path, table: str | None = None, shard: int | None = None
) -> Iterator[tuple[Path, ShardRecord | None]]:
    """Each sidecar of an unfinished artifact, or each of one shard: (the shard's path, its record or None where that is
    unreadable)."""
    named = "[!.]*" if table is None or shard is None else f"{table}-{shard:05d}-*"
    for path in sorted(directory.glob(f"{named}{SIDECAR}")):
        file = path.with_name(path.name.removesuffix(SIDECAR))
        match = _SHARD_FILE.fullmatch(file.name)
        if match is None:
            continue
        try:
            record = ShardRecord.model_validate(unseal(path))
        except (CorruptArtifact, ValidationError):
            yield file, None
            continue
        fits = (record.table, record.shard, record.file) == (match["table"], int(match["shard"]), file.name)
        yield file, record if fits else None


def check_file(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a file, or None. Hashed in full the first time in a process, then trusted by its stat."""
    try:
        stat = path.stat()
        if stat.st_size != size:
            return f"{stat.st_size} bytes instead of {size}"
        stamp = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, sha256)
        if stamp in _verified:
            return None
        if file_sha256(path) != sha256:
            return "sha256 differs from the recorded one"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return unreadable(error)
    _verified.add(stamp)
    return None


def footer_sha256(path: Path) -> str:
    """sha256 of a Parquet file's footer: what page checksums do not cover. CorruptArtifact where there is none."""
    with open(path, "rb") as file:
        return footer_sha256_of(file, path)


def footer_problem(path: Path, recorded: str) -> str | None:
    """What is wrong with a Parquet file whose footer must have the sha256 `recorded`; None: nothing."""
    try:
        return None if footer_sha256(path) == recorded else "its footer differs"
    except FileNotFoundError:
        return "missing"
    except CorruptArtifact as error:
        return str(error)
    except OSError as error:
        return unreadable(error)


def footer_sha256_of(file: BinaryIO | pa.NativeFile, path: Path | str) -> str:
    """The same of an open file; `path` is for the message."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != _MAGIC or length + 12 > size:
        raise CorruptArtifact(f"{path}: truncated, or not a Parquet file ({size} bytes)")
    file.seek(size - 8 - length)
    return hashlib.sha256(file.read(length + 8)).hexdigest()
