"""Run directories: a run's experiment, the keys that each round used, and the process that holds the run.

`<root>/runs/<name>/` has `experiment.yaml` (resolved), `identity.json`, `state.json`, `logs/<stage>.log`, `run.lock`.
The first three carry a checksum that also covers the run's name, so that damaged files and files of another run are
refused. The data is in the artifact store; a run only records which artifacts it uses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
    unsealed,
    utc_now,
)
from storage.disk.yaml_text import Dumper
from storage.errors import CorruptArtifact, IdentityMismatch, InputError, RunBusy, did_you_mean
from storage.identity import canonical_json

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_LARGEST_DIFFERENCE = 12
_EXPERIMENT, _IDENTITY, _STATE = RECORDS = ("experiment.yaml", "identity.json", "state.json")
"""A folder with any of these is a run; a missing one is damage."""
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

    @property
    def unevaluated(self) -> bool:
        """Whether its student is known and its evaluation was never begun: `policy.evaluate_every` left it out."""
        return self.student_sha256 is not None and "evaluate" not in self.stages


class RunState(_State):
    """State of a run, as `opd status` shows it."""

    name: str
    status: Literal["new", "running", "stopped", "failed", "finished"] = "new"
    """`stopped`: interrupted, or at the end of a round before the last one of the config."""
    rounds: list[RoundState] = []
    updated: str = ""
    forked_from: str | None = None
    ended: str | None = None
    """The rule of `policy.stop` that ended the run before `policy.rounds`."""
    error: str | None = None
    """Why the last call failed, in a stage or outside of all; `updated` is when. None for any other status."""

    @property
    def rounds_done(self) -> int:
        """The last round whose student is known and evaluated, or not to be evaluated; 0 if there is none after round 0."""
        done = [r.round for r in self.rounds if r.student_sha256 and (r.evaluated or r.unevaluated)]
        return max(done, default=0)

    @property
    def failed_at_start(self) -> bool:
        """Whether it failed before a stage past `prepare` was done."""
        made = [name for r in self.rounds for name, stage in r.stages.items() if stage.state in ("done", "cached")]
        return self.status == "failed" and all(name.startswith(("model", "prepare")) for name in made)

    @property
    def last_trained(self) -> RoundState | None:
        """The last round whose student is known, evaluated or not."""
        return max((r for r in self.rounds if r.student_sha256), key=lambda r: r.round, default=None)


class Run:
    """One named run. Use `Run.create` or `Run.open`, which check the name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = directory.name

    @classmethod
    def create(cls, root: Path | str, name: str, experiment: dict[str, Any], identity: dict[str, Any]) -> Run:
        """A new run, or the existing one of this name with the same identity (its files are left alone). One that failed at its
        start takes the new config: what failed there was most often the config.

        `experiment`: the resolved config as plain YAML values. `identity`: the part that determines results.
        Raises IdentityMismatch, listing the differences, if the existing run has another identity."""
        directory = _directory(root, name)
        plain = json.loads(canonical_json(identity))
        if not directory.exists() and _make(directory, name, experiment, plain):
            return cls(directory)
        run = cls.open(root, name)
        if run.identity != plain and not run._begun_anew(experiment, plain):
            raise IdentityMismatch(
                f"run {name!r} exists with another identity; choose another --name, or fork it. Differences:\n"
                + "\n".join(_difference(run.identity, plain))
            )
        return run

    def _begun_anew(self, experiment: dict[str, Any], identity: dict[str, Any]) -> bool:
        """Replaces the records of a run that failed at its start; False for any other."""
        with suppress(CorruptArtifact):
            if self.state.failed_at_start:
                with self.lock():
                    if self.state.failed_at_start:  # nobody was faster
                        replace_records(self, _records(self.name, experiment, identity))
                        return True
        return False

    @classmethod
    def open(cls, root: Path | str, name: str) -> Run:
        """The run of that name. InputError, with the nearest name, if there is none."""
        directory = _directory(root, name)
        if not _is_run(directory):
            names = [run.name for run in cls.list(root)]
            hint = did_you_mean(name, names, f"runs: {', '.join(names[:20]) or 'none'}")
            raise InputError(f"no run {name!r} under {directory.parent}; {hint}")
        return cls(directory)

    @classmethod
    def list(cls, root: Path | str) -> list[Run]:
        """All runs under the root, sorted by name. Other folders are skipped."""
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
        """Holds the run's lock. RunBusy at once, naming the holder, if another process has it."""

        def busy(holder: str) -> NoReturn:
            raise RunBusy(f"run {self.name!r} is held by {holder}; wait for it, or `opd stop {self.name}`", holder)

        with locks.locked(self.directory / "run.lock", busy):
            yield

    def holder(self) -> str | None:
        """Description of the process that holds the run; None if there is none."""
        holder = self.holder_info()
        return None if holder is None else str(holder)

    def holder_info(self) -> locks.Holder | None:
        """The process that holds the run: pid, host, command, start time; None if there is none."""
        return locks.holder(self.directory / "run.lock")

    @property
    def experiment(self) -> dict[str, Any]:
        """The resolved config as last saved. CorruptArtifact if the file is damaged."""
        path = self.directory / _EXPERIMENT
        try:
            return _experiment_of(self.name, path.read_bytes())
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise CorruptArtifact(
                f"{path}: {error}. Restore it with `opd run CONFIG --name {self.name}` and the original config (or this file,"
                f" after checking it); it is compared with {_IDENTITY}, and no stage reruns. To change runtime or policy:"
                f" `opd resume {self.name} --set`; other fields: `opd fork`"
            ) from error

    def save_experiment(self, experiment: dict[str, Any]) -> None:
        """Replaces the resolved config (runtime and policy may change between calls). Call with the lock held."""
        replace_atomically(self.directory / _EXPERIMENT, _experiment(self.name, experiment))

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the config that determines results. CorruptArtifact if the file is damaged."""
        return dict(self._unsealed(_IDENTITY, "rebuilds it from the experiment")["identity"])

    def save_identity(self, identity: dict[str, Any]) -> None:
        """Writes the identity. Call with the lock held."""
        replace_atomically(self.directory / _IDENTITY, _identity(self.name, json.loads(canonical_json(identity))))

    @property
    def state(self) -> RunState:
        """The state as last saved. CorruptArtifact if the file is damaged."""
        repair = "moves it to quarantine and rebuilds it from the store"
        try:
            return RunState.model_validate(self._unsealed(_STATE, repair))
        except ValidationError as error:
            raise CorruptArtifact(f"{self.directory / _STATE}: {error}; `opd resume {self.name}` {repair}") from error

    def save(self, state: RunState) -> None:
        """Replaces the state atomically and sets `updated`. Call with the lock held."""
        state.updated = utc_now()
        failpoint("run.before_save", self.directory / _STATE)
        replace_atomically(self.directory / _STATE, _state(state))
        failpoint("run.after_save")

    def _unsealed(self, file: str, repair: str) -> dict[str, Any]:
        path, problem = self.directory / file, "missing"
        try:
            content = unseal(path)
            if content.get("name") == self.name:
                return content
            problem = f"it belongs to the run {content.get('name')!r}"
        except CorruptArtifact as error:
            problem = str(error).removeprefix(f"{path}: ")
        except FileNotFoundError:
            pass
        raise CorruptArtifact(f"{path}: {problem}. `opd resume {self.name}` {repair}; no artifact is affected")

    def log_path(self, stage: str) -> Path:
        """The log file of a stage; its folder exists. InputError for an invalid stage name."""
        if not _STAGE_NAME.fullmatch(stage):
            raise InputError(f"stage {stage!r}: must match {_STAGE_NAME.pattern}")
        folder = self.directory / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{stage}.log"


def run_directory(root: Path | str, name: str) -> Path:
    """The folder of a run. InputError for a name that no run can have, or a folder that is a link."""
    return _directory(root, name)


def read_records(name: str, files: Mapping[str, bytes], where: str) -> tuple[RunState, dict[str, Any]]:
    """State and identity in the `RECORDS` of a run, as bytes by file name. CorruptArtifact, with `where` they are from, if one is
    damaged or of another run."""
    found = {}
    try:
        _experiment_of(name, files[_EXPERIMENT])
        for file in (_IDENTITY, _STATE):
            found[file] = unsealed(f"{where}/{file}", files[file])
            if found[file].get("name") != name:
                raise CorruptArtifact(f"{where}/{file}: it belongs to the run {found[file].get('name')!r}")
        return RunState.model_validate(found[_STATE]), dict(found[_IDENTITY]["identity"])
    except (KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CorruptArtifact(f"{where}: the records of the run are damaged: {str(error).splitlines()[0]}") from error


def publish_records(root: Path | str, name: str, files: Mapping[str, bytes]) -> bool:
    """A new run of these records, complete at once; False if there is a run of that name."""
    directory = _directory(root, name)
    return not directory.exists() and _publish(directory, files)


def replace_records(run: Run, files: Mapping[str, bytes]) -> None:
    """Replaces the records of a run, the state last. Call with the lock held."""
    for file in RECORDS:
        if files[file] != (run.directory / file).read_bytes():
            replace_atomically(run.directory / file, files[file])


def missing_from(state: RunState, other: RunState) -> str | None:
    """The first result of `other` that `state` does not have; None where `state` is equal or goes on from it."""
    rounds = {round.round: round for round in state.rounds}
    for round in other.rounds:
        mine = rounds.get(round.round)
        if round.student_sha256 and (mine is None or mine.student_sha256 != round.student_sha256):
            return f"the student of round {round.round}"
        for label, stage in round.stages.items():
            if stage.state in ("done", "cached"):
                here = mine.stages.get(label) if mine is not None else None
                if here is None or here.artifacts != stage.artifacts:
                    return f"{label} of round {round.round}"
    return None


def find_use(root: Path | str, stage: str, key: str) -> tuple[str, int] | None:
    """A run and a round that used an artifact; None if there is none."""
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
        raise InputError(f"{directory}: a symbolic link; run directories must be inside the store")
    return directory


def _make(directory: Path, name: str, experiment: dict[str, Any], identity: dict[str, Any]) -> bool:
    return _publish(directory, _records(name, experiment, identity))


def _records(name: str, experiment: dict[str, Any], identity: dict[str, Any]) -> dict[str, bytes]:
    """The files of a new run."""
    state = _state(RunState(name=name, updated=utc_now()))
    return {_EXPERIMENT: _experiment(name, experiment), _IDENTITY: _identity(name, identity), _STATE: state}


def _publish(directory: Path, files: Mapping[str, bytes]) -> bool:
    """Publishes a complete run directory, or returns False if another process did so first."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / temporary_name()
    with explain_full_disk(directory):
        try:
            (temporary / "logs").mkdir(parents=True)
            for file in RECORDS:
                replace_atomically(temporary / file, files[file])
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
    body = bytes(yaml.dump(experiment, Dumper=Dumper, sort_keys=False, allow_unicode=True, encoding="utf-8"))
    return body + _checksum(name, body)


def _experiment_of(name: str, data: bytes) -> dict[str, Any]:
    """The config of the run `name` in an experiment's file. ValueError if it is damaged."""
    *_, last = data.splitlines(keepends=True) or [b""]
    body = data.removesuffix(last)
    if not last.startswith(_MARK):
        raise ValueError("its last line is not a checksum: it was truncated, edited or written by an earlier version")
    if last != _checksum(name, body):
        raise ValueError("its checksum does not match: it is damaged, edited or another run's")
    return dict(yaml.safe_load(body))


def _checksum(name: str, body: bytes) -> bytes:
    """The last line of an experiment's file: a checksum over the run's name and all bytes above."""
    return _MARK + hashlib.sha256(name.encode() + b"\n" + body).hexdigest().encode() + b"\n"


def _identity(name: str, identity: dict[str, Any]) -> bytes:
    return seal({"name": name, "identity": identity})


def _state(state: RunState) -> bytes:
    absent = {"error"} if state.error is None else None  # as versions without the field wrote it
    return seal(json.loads(state.model_dump_json(exclude=absent)))  # NaN and infinities become null


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
    """The state, with `running` replaced where the process that wrote it is gone: the run is stopped, its stage pending."""
    if holder is not None or state.status != "running":
        return state
    settled = state.model_copy(deep=True)
    settled.status = "stopped"
    for round in settled.rounds:
        for stage in round.stages.values():
            if stage.state == "running":
                stage.state, stage.error = "pending", "interrupted"
    return settled
