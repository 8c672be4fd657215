"""Checkpoints of unfinished work: folders of files that count only when they are whole.

One process, or several together, write into a folder with a temporary name; each makes its files durable. Then one of them
adds a sealed record that names every file with its hash, and gives the folder its name. Nothing says which is the latest:
the newest that is whole is looked for, by full hashes, so there is no pointer that could be torn, and nothing of a file is
read before its hash is known to be the recorded one. Damaged ones go to quarantine."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.artifact import FileRecord
from storage.digests import file_sha256
from storage.errors import CorruptArtifact
from storage.failpoints import failpoint
from storage.files import (
    explain_full_disk,
    fsync_directory,
    fsync_file,
    quarantine,
    remove_leftovers,
    replace_atomically,
    seal,
    temporary_name,
    unseal,
    utc_now,
)
from storage.identity import canonical_json
from storage.trees import damaged

CHECKPOINT = "checkpoint-"
"""How the names of checkpoints begin, in the folder of the artifact that is being made."""
RECORD = "checkpoint.json"
KEPT = 2
"""The newest are kept: the last one, and the one before it, should the disk damage that."""
_NAME = re.compile(CHECKPOINT + r"(?P<group>[0-9a-f]{8})-(?P<step>\d{8})")


class _Record(BaseModel):
    """`checkpoint.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    artifact: str
    """Key of the artifact that is being made: a checkpoint belongs to no other."""
    settings: dict[str, Any]
    step: int
    created: str
    files: tuple[FileRecord, ...]
    content: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole. `content` is what its writer gave to `commit`."""

    step: int
    created: str
    files: tuple[Path, ...]
    content: dict[str, Any]


class Checkpoints:
    """Those of one artifact that were made at equal `settings` (numerics, say). Others stay, and are not used."""

    def __init__(self, root: Path, folder: Path, settings: Mapping[str, Any]) -> None:
        self.root, self.folder, self.settings = root, folder, dict(settings)
        self._group = hashlib.sha256(canonical_json(self.settings).encode("ascii")).hexdigest()[:8]

    def begin(self) -> Path:
        """An empty folder for the files of the next one."""
        path = self.folder / temporary_name("checkpoint")
        with explain_full_disk(path):
            path.mkdir()
        failpoint("checkpoint.begun")
        return path

    def commit(self, temporary: Path, step: int, files: Iterable[FileRecord], content: Mapping[str, Any]) -> None:
        """Makes it count, when all its files are there (`write_file`), and removes those that are older than `KEPT`."""
        record = _Record(
            artifact=self.folder.name,
            settings=self.settings,
            step=step,
            created=utc_now(),
            files=tuple(files),
            content=dict(content),
        )
        failpoint("checkpoint.before_record")
        replace_atomically(temporary / RECORD, seal(record.model_dump(mode="json")))
        path = self.folder / f"{CHECKPOINT}{self._group}-{step:08d}"
        failpoint("checkpoint.before_rename", temporary / RECORD)
        os.rename(temporary, path)
        failpoint("checkpoint.after_rename", path / RECORD)
        fsync_directory(self.folder)
        failpoint("checkpoint.before_sweep", path / RECORD)
        for _, old in self._found()[KEPT:]:
            remove(old)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that is whole, and what there is to say about the others. Damaged ones go to quarantine."""
        remove_leftovers(self.folder, places=("",))
        said: list[str] = []
        for step, path in self._found():
            try:
                return self._whole(path, step), said
            except CorruptArtifact as error:
                quarantine(self.root, path, f"a damaged checkpoint: {error}")
                said.append(f"the checkpoint of step {step} is damaged and in quarantine: {error}")
        return None, said + self._others()

    def _found(self) -> list[tuple[int, Path]]:
        """Those of this group, newest first."""
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        mine = [(int(match["step"]), path) for match, path in named if match and match["group"] == self._group]
        return sorted(mine, reverse=True)

    def _whole(self, path: Path, step: int) -> Checkpoint:
        """CorruptArtifact for anything that is not exactly what was written."""
        record = self._record(path)
        if (record.artifact, record.step, record.settings) != (self.folder.name, step, self.settings):
            raise CorruptArtifact(f"{path / RECORD}: it is the record of another checkpoint")
        for file in record.files:
            problem = damaged(path / file.path, file, None)
            if problem is not None:
                raise CorruptArtifact(f"{path / file.path}: {problem}")
        return Checkpoint(step, record.created, tuple(path / file.path for file in record.files), record.content)

    def _record(self, path: Path) -> _Record:
        try:
            return _Record.model_validate(unseal(path / RECORD))
        except (OSError, ValidationError) as error:
            raise CorruptArtifact(f"{path / RECORD}: not a checkpoint's record ({error})") from error

    def _others(self) -> list[str]:
        """Where none can be used: what was made at other settings, and which settings these are."""
        for path in sorted(self.folder.glob(f"{CHECKPOINT}*"), reverse=True):
            try:
                record = self._record(path)
            except CorruptArtifact:
                continue
            names = sorted(record.settings.keys() | self.settings.keys())
            changed = [
                f"{name} {record.settings.get(name)!r}, now {self.settings.get(name)!r}"
                for name in names
                if record.settings.get(name) != self.settings.get(name)
            ]
            return [
                f"the checkpoint of step {record.step} was made with other settings ({'; '.join(changed)}) and is not used;"
                " with the old settings the run goes on from it"
            ]
        return []


def write_file(path: Path, write: Callable[[Path], None]) -> FileRecord:
    """Writes one file of a checkpoint and makes it durable. NotEnoughSpace when the disk is full."""
    failpoint("checkpoint.before_write")
    with explain_full_disk(path):
        write(path)
        failpoint("checkpoint.after_write", path)
        fsync_file(path)
    stat = path.stat()
    record = FileRecord(path=path.name, sha256=file_sha256(path, None), bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
    failpoint("checkpoint.after_sync", path)
    return record


def remove(path: Path) -> None:
    """Removes one: out of its place in one rename, so that no half of it is ever met."""
    going = path.with_name(temporary_name("checkpoint"))
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)
