"""Checkpoints of unfinished work: folders of files that count only when they are whole.

One process, or several together, write into a folder with a temporary name; each makes its files durable. Then one of them
adds a sealed record that names every file with its hash, and gives the folder its name. Nothing says which is the latest:
the newest that is whole is looked for, by full hashes, so there is no pointer that could be torn, and nothing of a file is
read before its hash is known to be the recorded one. Damaged ones go to quarantine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.artifacts.artifact import FileRecord
from storage.artifacts.digests import file_sha256
from storage.artifacts.trees import damaged
from storage.disk.failpoints import failpoint
from storage.disk.files import (
    explain_full_disk,
    fsync_directory,
    fsync_file,
    quarantine,
    remove,
    remove_leftovers,
    replace_atomically,
    seal,
    temporary_name,
    unique,
    unseal,
    utc_now,
)
from storage.errors import CorruptArtifact

CHECKPOINT = "checkpoint-"
"""How the names of checkpoints begin, in the folder of the artifact that is being made."""
RECORD = "checkpoint.json"
KEPT = 2
"""The newest are kept: the last one, and the one before it, should the disk damage that."""
_NAME = re.compile(CHECKPOINT + r"(?P<step>\d{8})-[0-9a-f]{12}")


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
        path = self.folder / f"{CHECKPOINT}{step:08d}-{unique()}"
        failpoint("checkpoint.before_rename", temporary / RECORD)
        os.rename(temporary, path)
        failpoint("checkpoint.after_rename", path / RECORD)
        fsync_directory(self.folder)
        failpoint("checkpoint.before_sweep", path / RECORD)
        for old in self._mine()[KEPT:]:
            remove(old)

    def discard(self) -> None:
        """Removes them: what they lead to is not wanted."""
        for path in self._mine():
            remove(path)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that is whole, and what there is to say about the others. Damaged ones go to quarantine; where none is
        left, those that went there before are told of too: who moved them may have been killed before it could."""
        remove_leftovers(self.folder, places=("",))
        said, others = list[str](), list[_Record]()
        for step, path in self._found():
            try:
                record = self._record(path, step)
                if record.settings == self.settings:
                    return self._whole(path, record), said
                others.append(record)
            except CorruptArtifact as error:
                quarantine(self.root, path, f"a damaged checkpoint: {error}")
                said.append(f"the checkpoint of step {step} is damaged and in quarantine: {error}")
        if not said and (before := self._quarantined()):
            said.append(f"damaged checkpoints of it are in quarantine from before: {', '.join(before)}")
        return None, said + [self._unused(record) for record in others[:1]]

    def _quarantined(self) -> list[str]:
        """Names in quarantine of this artifact's checkpoints."""
        found = (self.root / "quarantine").glob(f"*-{self.folder.parent.name}-{self.folder.name}-{CHECKPOINT}*")
        return sorted(path.name for path in found if path.is_dir())

    def _found(self) -> list[tuple[int, Path]]:
        """All, newest first."""
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match["step"]), path) for match, path in named if match), reverse=True)

    def _mine(self) -> list[Path]:
        """Those at equal settings, newest first."""
        found = []
        for step, path in self._found():
            with suppress(CorruptArtifact):
                if self._record(path, step).settings == self.settings:
                    found.append(path)
        return found

    def _whole(self, path: Path, record: _Record) -> Checkpoint:
        """CorruptArtifact when a file is not exactly what was written."""
        for file in record.files:
            problem = damaged(path / file.path, file, None)
            if problem is not None:
                raise CorruptArtifact(f"{path / file.path}: {problem}")
        return Checkpoint(record.step, record.created, tuple(path / file.path for file in record.files), record.content)

    def _record(self, path: Path, step: int) -> _Record:
        """CorruptArtifact when it is unreadable, or the record of another checkpoint."""
        try:
            record = _Record.model_validate(unseal(path / RECORD))
        except (OSError, ValidationError) as error:
            raise CorruptArtifact(f"{path / RECORD}: not a checkpoint's record ({error})") from error
        if (record.artifact, record.step) != (self.folder.name, step):
            raise CorruptArtifact(f"{path / RECORD}: it is the record of another checkpoint")
        return record

    def _unused(self, record: _Record) -> str:
        """Why one at other settings is not used."""
        changed = [
            f"{name} {record.settings.get(name)!r}, now {self.settings.get(name)!r}"
            for name in sorted(record.settings.keys() | self.settings.keys())
            if record.settings.get(name) != self.settings.get(name)
        ]
        return (
            f"the checkpoint of step {record.step} was made with other settings ({'; '.join(changed)}) and is not used;"
            " with the old settings the run goes on from it"
        )


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
