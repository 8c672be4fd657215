"""Run directories: which experiment a name stands for, which keys each round used, and who is working on it.

`<root>/runs/<name>/` holds `experiment.yaml` (resolved), `identity.json`, `state.json`, `logs/<stage>.log`, `run.lock`.
The data lies in the artifact store; a run only says which artifacts are its own."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from storage import locks
from storage.errors import CorruptArtifact, IdentityMismatch, InputError, RunBusy
from storage.failpoints import failpoint
from storage.files import explain_full_disk, fsync_directory, replace_atomically, temporary_name, utc_now
from storage.identity import canonical_json

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_LARGEST_DIFFERENCE = 12


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class StageState(_State):
    """One stage of one round. `artifacts`: artifact stage name -> key; `key` is the first of them."""

    key: str | None = None
    state: Literal["done", "cached", "running", "failed", "pending"] = "pending"
    seconds: float | None = None
    rows: int | None = None
    error: str | None = None
    artifacts: dict[str, str] = {}
    started: str | None = None


class RoundState(_State):
    """One round. Round 0 is the student before distillation."""

    round: int
    student_sha256: str | None = None
    metrics: dict[str, float | None] = {}
    stages: dict[str, StageState] = {}


class RunState(_State):
    """What `opd status` shows."""

    name: str
    status: Literal["new", "running", "stopped", "failed", "finished"] = "new"
    rounds: list[RoundState] = []
    updated: str = ""
    forked_from: str | None = None


class Run:
    """One named run. Made by `Run.create` or `Run.open`, which check the name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = directory.name

    @classmethod
    def create(cls, root: Path | str, name: str, experiment: dict[str, Any], identity: dict[str, Any]) -> Run:
        """A new run, or the existing one of this name if it has the same identity (its files are left alone).

        `experiment` is the resolved config as plain YAML values, `identity` the part that fixes results.
        Raises IdentityMismatch with the difference for a name that is taken by another identity."""
        directory = _directory(root, name)
        plain = json.loads(canonical_json(identity))
        if not directory.exists() and _make(directory, name, experiment, plain):
            return cls(directory)
        run = cls.open(root, name)
        if run.identity != plain:
            raise IdentityMismatch(
                f"run {name!r} exists with another identity; choose another --name, or fork it. It differs in:\n"
                + "\n".join(_difference(run.identity, plain))
            )
        return run

    @classmethod
    def open(cls, root: Path | str, name: str) -> Run:
        """The run of that name. InputError if there is none, with the nearest name."""
        directory = _directory(root, name)
        if not (directory / "state.json").is_file():
            names = [run.name for run in cls.list(root)]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names[:20]) or 'none'}"
            raise InputError(f"no run {name!r} under {directory.parent}; {hint}")
        return cls(directory)

    @classmethod
    def list(cls, root: Path | str) -> list[Run]:
        """Every run under the root, by name. What is no run's directory is passed over."""
        folder = Path(root).absolute() / "runs"
        if not folder.is_dir():
            return []
        found = []
        for path in sorted(folder.iterdir()):
            if RUN_NAME.fullmatch(path.name) and not path.is_symlink() and (path / "state.json").is_file():
                found.append(cls(path))
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes this process the only one to work on the run. RunBusy at once, naming the holder, if another does."""

        def busy(holder: str) -> NoReturn:
            raise RunBusy(f"run {self.name!r} is held by {holder}; wait for it, or `opd stop {self.name}`", holder)

        with locks.locked(self.directory / "run.lock", busy):
            yield

    def holder(self) -> str | None:
        """Who works on the run now, as text; None if nobody does."""
        holder = self.holder_info()
        return None if holder is None else str(holder)

    def holder_info(self) -> locks.Holder | None:
        """Who works on the run now: pid, host, command, since."""
        return locks.holder(self.directory / "run.lock")

    @property
    def experiment(self) -> dict[str, Any]:
        """The resolved config, as it was last saved."""
        path = self.directory / "experiment.yaml"
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise CorruptArtifact(f"{path}: unreadable ({error}); run the config again under another name") from error
        if not isinstance(content, dict):
            raise CorruptArtifact(f"{path}: not a mapping; run the config again under another name")
        return content

    def save_experiment(self, experiment: dict[str, Any]) -> None:
        """Replaces the resolved config: runtime and run policy may change between calls. Hold the lock."""
        replace_atomically(self.directory / "experiment.yaml", _yaml(experiment))

    @property
    def identity(self) -> dict[str, Any]:
        path = self.directory / "identity.json"
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptArtifact(f"{path}: unreadable ({error}); run the config again under another name") from error
        return dict(content)

    @property
    def state(self) -> RunState:
        """The state as it was last saved."""
        path = self.directory / "state.json"
        try:
            return RunState.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CorruptArtifact(
                f"{path}: unreadable ({error}). The artifacts are not affected: remove the file's directory and run the"
                " config again, finished stages are found in the store"
            ) from error

    def save(self, state: RunState) -> None:
        """Replaces the state atomically and stamps `updated`. Hold the lock."""
        state.updated = utc_now()
        failpoint("run.before_save", self.directory / "state.json")
        replace_atomically(self.directory / "state.json", state.model_dump_json(indent=1).encode())
        failpoint("run.after_save")

    def log_path(self, stage: str) -> Path:
        """Where a stage logs; the folder exists. InputError for a name that is no stage's."""
        if not _STAGE_NAME.fullmatch(stage):
            raise InputError(f"stage {stage!r}: must match {_STAGE_NAME.pattern}")
        folder = self.directory / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{stage}.log"


def find_use(root: Path | str, stage: str, key: str) -> tuple[str, int] | None:
    """A run and a round of it that used an artifact; None if no run did."""
    for run in Run.list(root):
        try:
            rounds = run.state.rounds
        except CorruptArtifact:
            continue
        for round in rounds:
            if any((stage, key) in record.artifacts.items() for record in round.stages.values()):
                return run.name, round.round
    return None


def _directory(root: Path | str, name: str) -> Path:
    if not RUN_NAME.fullmatch(name):
        raise InputError(
            f"run name {name!r}: must be 1 to 64 of letters, digits, dot, underscore, dash, the first a letter or digit"
        )
    directory = Path(root).absolute() / "runs" / name
    if directory.is_symlink():
        raise InputError(f"{directory}: a symbolic link; run directories must lie in the store themselves")
    return directory


def _make(directory: Path, name: str, experiment: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Publishes a whole run directory, or returns False if another process was faster."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / temporary_name()
    with explain_full_disk(directory):
        try:
            (temporary / "logs").mkdir(parents=True)
            replace_atomically(temporary / "experiment.yaml", _yaml(experiment))
            replace_atomically(temporary / "identity.json", json.dumps(identity, indent=1, sort_keys=True).encode())
            state = RunState(name=name, updated=utc_now())
            replace_atomically(temporary / "state.json", state.model_dump_json(indent=1).encode())
            failpoint("run.before_publish")
            os.rename(temporary, directory)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and (directory / "state.json").is_file():
                return False
            raise
        failpoint("run.after_publish")
        fsync_directory(directory.parent)
    return True


def _yaml(experiment: dict[str, Any]) -> bytes:
    return bytes(yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True, encoding="utf-8"))


def _difference(old: Any, new: Any) -> list[str]:
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    lines = [
        f"  {name}: {before.get(name, 'absent')} in the run, {after.get(name, 'absent')} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    more = len(lines) - _LARGEST_DIFFERENCE
    return lines[:_LARGEST_DIFFERENCE] + ([f"  and {more} more"] if more > 0 else [])


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, sort_keys=True)
