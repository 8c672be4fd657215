"""Trees: directories of files (model checkpoints, trainer states), in the store or in a folder of the user's."""

from __future__ import annotations

import os
import stat as stat_module
from collections.abc import Iterator
from pathlib import Path

from storage.artifacts.artifact import FileRecord, TreeRecord
from storage.artifacts.digests import (
    architecture_digest,
    file_sha256,
    files_digest,
    in_threads,
    tokenizer_digest,
    weights_digest,
)
from storage.disk.failpoints import failpoint
from storage.disk.files import fsync_directory, fsync_file, unreadable
from storage.errors import InputError, StoreError

READ_BY_ENGINES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Suffixes of files that engines read from a checkpoint's folder."""


def own_files(directory: Path) -> list[Path]:
    """Files of a tree in the store. StoreError for links and special files, whose bytes are outside the store."""
    found = []
    if directory.is_symlink():
        raise StoreError(f"{directory}: a link; a tree must be a folder in the store. Remove the link and run again")
    for folder, names, files in os.walk(directory):
        names.sort()
        for name in [*names, *sorted(files)]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat_module.S_ISREG(mode):
                found.append(path)
            elif not stat_module.S_ISDIR(mode):
                raise StoreError(
                    f"{path}: a link or special file; a tree has plain files only. Remove it and run again"
                )
    return found


def external_files(directory: Path) -> list[Path]:
    """Files of a user's folder, without hidden ones; links to files are followed (the Hub's cache consists of them)."""
    found = []
    for folder, names, files in os.walk(directory):
        names[:] = sorted(name for name in names if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return found


def record_files(directory: Path, files: list[Path], memo: Path | None) -> tuple[FileRecord, ...]:
    def record(path: Path) -> FileRecord:
        stat = path.stat()
        return FileRecord(
            path=path.relative_to(directory).as_posix(),
            sha256=file_sha256(path, memo),
            bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
        )

    return tuple(in_threads(record, files, sum(path.stat().st_size for path in files)))


def fsync_tree(directory: Path, files: list[Path]) -> None:
    failpoint("tree.before_fsync", files[0] if files else None)
    for path in files:
        fsync_file(path)
    for folder, _, _ in os.walk(directory, topdown=False):
        fsync_directory(Path(folder))


def content_digests(name: str, directory: Path, files: tuple[FileRecord, ...], memo: Path | None) -> dict[str, str]:
    """Content digests of a tree: `<name>` (its files) and, where present, `weights`, `tokenizer`, `architecture` (config.json)
    and `generation` (generation_config.json).

    The last four have plain names for the tree "model", and the prefix `<name>:` for any other tree."""
    prefix = "" if name == "model" else f"{name}:"
    result = {name: files_digest({record.path: record.sha256 for record in files})}
    if any("/" not in record.path and record.path.endswith(".safetensors") for record in files):
        result[f"{prefix}weights"] = weights_digest(directory, memo)
    for part, file in (("architecture", "config.json"), ("generation", "generation_config.json")):
        if any(record.path == file for record in files):
            result[f"{prefix}{part}"] = architecture_digest(directory, file)
    try:
        result[f"{prefix}tokenizer"] = tokenizer_digest(directory, memo)
    except InputError:
        pass  # not every tree has a tokenizer
    return result


def damaged(path: Path, record: FileRecord, memo: Path | None) -> str | None:
    """The damage of a file by its full hash (remembered in `memo`), or None."""
    try:
        stat = path.stat()
        if stat.st_size != record.bytes:
            return f"{stat.st_size} bytes instead of {record.bytes}"
        if file_sha256(path, memo) != record.sha256:
            return "sha256 differs from the recorded one"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return unreadable(error)
    return None


def damaged_by_stat(path: Path, size: int, mtime_ns: int, sha256: str, memo: Path | None) -> str | None:
    """Like `damaged`, but a file with the recorded size and mtime is not hashed; a copied store is hashed once."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return unreadable(error)
    if stat.st_size == size and stat.st_mtime_ns == mtime_ns:
        return None
    record = FileRecord(path=path.name, sha256=sha256, bytes=size, mtime_ns=mtime_ns)
    return damaged(path, record, memo)


def tree_directory(artifact_directory: Path, tree: TreeRecord) -> Path:
    return Path(tree.directory) if tree.external else artifact_directory / tree.directory


def added_files(directory: Path, tree: TreeRecord) -> list[Path]:
    """Files in a tree's folder that its record does not list; in a user's folder only those that engines read.

    StoreError for a link or special file in a tree of the store."""
    known = {directory / record.path for record in tree.files}
    if tree.external:
        return [p for p in external_files(directory) if p not in known and p.suffix in READ_BY_ENGINES]
    return [path for path in own_files(directory) if path not in known]


def damaged_files(directory: Path, tree: TreeRecord, memo: Path | None) -> Iterator[tuple[Path, str]]:
    for record in tree.files:
        path = directory / record.path
        problem = damaged(path, record, memo)
        if problem is not None:
            yield path, problem
