"""Run directories: which experiment a name stands for, which keys each round used, and who is working on it.

`<root>/runs/<name>/` holds `experiment.yaml` (resolved), `identity.json`, `state.json`, `logs/<stage>.log`, `run.lock`.
The first three carry a checksum that covers the run's name too: what the disk changed, and what is another run's, is
refused. The data lies in the artifact store; a run only says which artifacts are its own."""

from __future__ import annotations

import difflib
import hashlib
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

from storage.disk import locks
from storage.disk.failpoints import failpoint
from storage.disk.files import (
    explain_full_disk,
    fsync_directory,
    replace_atomically,
    seal,
    temporary_name,
    unseal,
    utc_now,
)
from storage.errors import CorruptArtifact, IdentityMismatch, InputError, RunBusy
from storage.identity import canonical_json

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_LARGEST_DIFFERENCE = 12
_EXPERIMENT, _IDENTITY, _STATE = RECORDS = ("experiment.yaml", "identity.json", "state.json")
"""The files that make a folder a run's. One that is missing is damage."""
_MARK = b"# sha256 of the run's name and of what stands above: "


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

    @property
    def evaluated(self) -> bool:
        """Whether its last stage is finished."""
        return "evaluate" in self.stages and self.stages["evaluate"].state in ("done", "cached")


class RunState(_State):
    """What `opd status` shows."""

    name: str
    status: Literal["new", "running", "stopped", "failed", "finished"] = "new"
    """`stopped`: interrupted, or at the end of a round before the last one of the config."""
    rounds: list[RoundState] = []
    updated: str = ""
    forked_from: str | None = None

    @property
    def rounds_done(self) -> int:
        """The last round whose student is known and evaluated; 0 if there is none after round 0."""
        done = [r.round for r in self.rounds if r.student_sha256 and r.evaluated]
        return max(done, default=0)

    @property
    def last_trained(self) -> RoundState | None:
        """The last round whose student is known, evaluated or not."""
        return max((r for r in self.rounds if r.student_sha256), key=lambda r: r.round, default=None)


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
        if not _is_run(directory):
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
            if RUN_NAME.fullmatch(path.name) and not path.is_symlink() and _is_run(path):
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
        """The resolved config, as it was last saved. CorruptArtifact when it is not what was written."""
        path = self.directory / _EXPERIMENT
        try:
            data = path.read_bytes()
            *_, last = data.splitlines(keepends=True) or [b""]
            body = data.removesuffix(last)
            if not last.startswith(_MARK):
                raise ValueError(
                    "its last line is no checksum: it was cut off, edited or written by an earlier version"
                )
            if last != _checksum(self.name, body):
                raise ValueError("its checksum does not fit: it is damaged, edited or another run's")
            return dict(yaml.safe_load(body))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise CorruptArtifact(
                f"{path}: {error}. To write it anew: `opd run CONFIG --name {self.name}` with the config that the run was made"
                " with, or with this file itself once you have looked it through. What fixes results is compared with"
                f" {_IDENTITY}, and nothing is made again. To change runtime or policy on purpose: `opd resume {self.name}"
                " --set`; anything else: `opd fork`"
            ) from error

    def save_experiment(self, experiment: dict[str, Any]) -> None:
        """Replaces the resolved config: runtime and run policy may change between calls. Hold the lock."""
        replace_atomically(self.directory / _EXPERIMENT, _experiment(self.name, experiment))

    @property
    def identity(self) -> dict[str, Any]:
        """What the name stands for. CorruptArtifact when it is not what was written."""
        return dict(self._unsealed(_IDENTITY, "writes it again from the experiment")["identity"])

    def save_identity(self, identity: dict[str, Any]) -> None:
        """Writes a lost identity again. Hold the lock."""
        replace_atomically(self.directory / _IDENTITY, _identity(self.name, json.loads(canonical_json(identity))))

    @property
    def state(self) -> RunState:
        """The state as it was last saved. CorruptArtifact when it is not what was written."""
        again = "sets it aside and makes it again from what the store has"
        try:
            return RunState.model_validate(self._unsealed(_STATE, again))
        except ValidationError as error:
            raise CorruptArtifact(f"{self.directory / _STATE}: {error}; `opd resume {self.name}` {again}") from error

    def save(self, state: RunState) -> None:
        """Replaces the state atomically and stamps `updated`. Hold the lock."""
        state.updated = utc_now()
        failpoint("run.before_save", self.directory / _STATE)
        replace_atomically(self.directory / _STATE, _state(state))
        failpoint("run.after_save")

    def _unsealed(self, file: str, again: str) -> dict[str, Any]:
        path, found = self.directory / file, "missing"
        try:
            content = unseal(path)
            if content.get("name") == self.name:
                return content
            found = f"it is that of the run {content.get('name')!r}"
        except CorruptArtifact as error:
            found = str(error).removeprefix(f"{path}: ")
        except FileNotFoundError:
            pass
        raise CorruptArtifact(f"{path}: {found}. `opd resume {self.name}` {again}; no artifact is affected")

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
            replace_atomically(temporary / _EXPERIMENT, _experiment(name, experiment))
            replace_atomically(temporary / _IDENTITY, _identity(name, identity))
            replace_atomically(temporary / _STATE, _state(RunState(name=name, updated=utc_now())))
            failpoint("run.before_publish")
            os.rename(temporary, directory)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and _is_run(directory):
                return False
            raise
        failpoint("run.after_publish")
        fsync_directory(directory.parent)
    return True


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in RECORDS)


def _experiment(name: str, experiment: dict[str, Any]) -> bytes:
    body = bytes(yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True, encoding="utf-8"))
    return body + _checksum(name, body)


def _checksum(name: str, body: bytes) -> bytes:
    """The last line of an experiment's file: it speaks for the run's name and for every byte above it."""
    return _MARK + hashlib.sha256(name.encode() + b"\n" + body).hexdigest().encode() + b"\n"


def _identity(name: str, identity: dict[str, Any]) -> bytes:
    return seal({"name": name, "identity": identity})


def _state(state: RunState) -> bytes:
    return seal(json.loads(state.model_dump_json()))  # a figure that is no number is null there


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


def settled(state: RunState, holder: str | None) -> RunState:
    """The state as it is: what was left `running` by a process that is gone is not running."""
    if holder is not None or state.status != "running":
        return state
    found = state.model_copy(deep=True)
    found.status = "stopped"
    for round in found.rounds:
        for stage in round.stages.values():
            if stage.state == "running":
                stage.state, stage.error = "pending", "interrupted"
    return found
