"""Checkpoints of unfinished work: folders of files that are used only if they are whole.

One or several processes write into a folder with a temporary name; each makes its files durable. Then one of them adds a
sealed record with the hash of every file, and gives the folder its final name. There is no pointer to the latest
checkpoint that could be torn: the newest whole one is found by full hashes, and no file is read before its hash is
verified. Damaged checkpoints move to quarantine."""

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
"""Prefix of checkpoint names in the folder of the unfinished artifact."""
RECORD = "checkpoint.json"
KEPT = 2
"""Number of checkpoints kept: the last one, and the one before in case the disk damages the last."""
_NAME = re.compile(CHECKPOINT + r"(?P<step>\d{8})-[0-9a-f]{12}")


class _Record(BaseModel):
    """`checkpoint.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    artifact: str
    """Key of the unfinished artifact that the checkpoint belongs to."""
    settings: dict[str, Any]
    step: int
    created: str
    files: tuple[FileRecord, ...]
    content: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. `content` is what its writer passed to `commit`."""

    step: int
    created: str
    files: tuple[Path, ...]
    content: dict[str, Any]


class Checkpoints:
    """The checkpoints of one artifact made at equal `settings` (its numerics). Others are kept, but not used."""

    def __init__(self, root: Path, folder: Path, settings: Mapping[str, Any]) -> None:
        self.root, self.folder, self.settings = root, folder, dict(settings)

    def begin(self) -> Path:
        """An empty folder for the files of the next checkpoint."""
        path = self.folder / temporary_name("checkpoint")
        with explain_full_disk(path):
            path.mkdir()
        failpoint("checkpoint.begun")
        return path

    def commit(self, temporary: Path, step: int, files: Iterable[FileRecord], content: Mapping[str, Any]) -> None:
        """Publishes a checkpoint whose files were all written with `write_file`, and removes all but the newest `KEPT`."""
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
        """Removes all checkpoints at these settings."""
        for path in self._mine():
            remove(path)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, or None, and messages about the others.

        Damaged ones move to quarantine. If none is left, the messages also list those quarantined before: the process that
        moved them may have been killed before it could report them."""
        remove_leftovers(self.folder, places=("",))
        messages, others = list[str](), list[_Record]()
        for step, path in self._found():
            try:
                record = self._record(path, step)
                if record.settings == self.settings:
                    return self._whole(path, record), messages
                others.append(record)
            except CorruptArtifact as error:
                quarantine(self.root, path, f"a damaged checkpoint: {error}")
                messages.append(f"the checkpoint of step {step} is damaged and in quarantine: {error}")
        if not messages and (before := self._quarantined()):
            messages.append(f"damaged checkpoints of it are in quarantine from before: {', '.join(before)}")
        return None, messages + [self._unused(record) for record in others[:1]]

    def _quarantined(self) -> list[str]:
        """Names of this artifact's checkpoints in quarantine."""
        paths = (self.root / "quarantine").glob(f"*-{self.folder.parent.name}-{self.folder.name}-{CHECKPOINT}*")
        return sorted(path.name for path in paths if path.is_dir())

    def _found(self) -> list[tuple[int, Path]]:
        """All checkpoints, newest first."""
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match["step"]), path) for match, path in named if match), reverse=True)

    def _mine(self) -> list[Path]:
        """Checkpoints at equal settings, newest first."""
        found = []
        for step, path in self._found():
            with suppress(CorruptArtifact):
                if self._record(path, step).settings == self.settings:
                    found.append(path)
        return found

    def _whole(self, path: Path, record: _Record) -> Checkpoint:
        """The checkpoint, verified. CorruptArtifact if a file differs from the record."""
        for file in record.files:
            problem = damaged(path / file.path, file, None)
            if problem is not None:
                raise CorruptArtifact(f"{path / file.path}: {problem}")
        return Checkpoint(record.step, record.created, tuple(path / file.path for file in record.files), record.content)

    def _record(self, path: Path, step: int) -> _Record:
        """The record. CorruptArtifact if it is unreadable or belongs to another checkpoint."""
        try:
            record = _Record.model_validate(unseal(path / RECORD))
        except (OSError, ValidationError) as error:
            raise CorruptArtifact(f"{path / RECORD}: not a checkpoint's record ({error})") from error
        if (record.artifact, record.step) != (self.folder.name, step):
            raise CorruptArtifact(f"{path / RECORD}: the record of another checkpoint")
        return record

    def _unused(self, record: _Record) -> str:
        """The message about a checkpoint at other settings."""
        changed = [
            f"{name} {record.settings.get(name)!r}, now {self.settings.get(name)!r}"
            for name in sorted(record.settings.keys() | self.settings.keys())
            if record.settings.get(name) != self.settings.get(name)
        ]
        return (
            f"the checkpoint of step {record.step} was made with other settings ({'; '.join(changed)}) and is not used;"
            " with the old settings the run continues from it"
        )


def write_file(path: Path, write: Callable[[Path], None]) -> FileRecord:
    """Writes one file of a checkpoint and makes it durable. NotEnoughSpace if the disk is full."""
    failpoint("checkpoint.before_write")
    with explain_full_disk(path):
        write(path)
        failpoint("checkpoint.after_write", path)
        fsync_file(path)
    stat = path.stat()
    record = FileRecord(path=path.name, sha256=file_sha256(path, None), bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
    failpoint("checkpoint.after_sync", path)
    return record
