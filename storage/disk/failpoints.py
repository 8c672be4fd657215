"""Failpoints: named moments of real code at which a test makes this process fail. Off, each costs one falsy check.

    OPD_FAILPOINTS="shard.after_rename=kill;manifest.before_link=raise:OSError(ENOSPC)@2"

arms them for this process and, because the environment is inherited, for its workers. `@n` acts at the n-th hit alone,
otherwise every hit acts. `#r` (before `@n`) acts in rank r of several that work together alone, and counts its hits alone.
Actions, joined by `+` where several follow each other:

- `kill`: SIGKILL to this process; `killtree`: to the whole tree of processes below the one that was armed first, and it;
- `exit`, `exit:CODE`: ends this process at once, without clean-up (code 1);
- `raise:TYPE`, `raise:TYPE(ARGUMENT)`: a built-in exception or one of `storage.errors`; OSError takes an errno's name;
- `sleep:SECONDS`; `wait:FILE` until that file exists;
- `torn`: cuts the file at hand to half its size, as a write that a power cut broke.

`OPD_FAILPOINTS_LOG=FILE` counts the hits of all processes together: one line (name, pid, rank) per hit. Then `@n` is the n-th of
them all, so that a worker that is started again does not die again. A name that is not in `NAMES` is refused."""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import storage.errors
from storage.errors import ConfigError, did_you_mean

NAMES: dict[str, str] = {
    "shard.before_write": "a shard's rows are checked, nothing is written",
    "shard.before_rename": "a shard is written and fsynced under its temporary name",
    "shard.after_rename": "a shard has its name, its directory is not fsynced",
    "shard.before_sidecar": "a shard is durable, no sidecar vouches for it",
    "shard.after_sidecar": "a shard and its sidecar are durable",
    "file.before_fsync": "a small file is written under its temporary name, not fsynced",
    "file.before_append": "a line is written at the end of a file, not fsynced",
    "file.before_replace": "a small file is durable under its temporary name",
    "file.after_replace": "a small file has its name, its directory is not fsynced",
    "manifest.before_link": "a manifest is durable under its temporary name",
    "manifest.after_link": "a manifest is published, its temporary name is still there, the directory is not fsynced",
    "manifest.after_sync": "a manifest is published and durable",
    "quarantine.before_move": "the reason is written, the bad file is where it was",
    "quarantine.after_move": "the bad file is in quarantine, the directories are not fsynced",
    "builder.before_sweep": "a builder has the lock, what a killed one left is still there",
    "builder.before_collect": "all parts are made, the commit begins",
    "builder.before_trees": "the shards of a commit are checked, its trees are temporary",
    "builder.before_publish": "all parts of a commit are durable under their names, no manifest",
    "tree.begun": "a tree's temporary directory exists, empty",
    "tree.before_fsync": "a tree's files are written, none is fsynced",
    "tree.before_rename": "a tree is fsynced under its temporary name",
    "tree.after_rename": "a tree has its name, the artifact's directory is not fsynced",
    "lock.before": "a lock's file is about to be opened",
    "lock.held": "a lock is held, the holder's name is not written",
    "lock.named": "a lock is held and names its holder",
    "lock.before_release": "a lock is about to be given back",
    "run.before_publish": "a new run's directory is whole under its temporary name",
    "run.after_publish": "a new run has its name, the directory of runs is not fsynced",
    "run.before_save": "a run's state is about to be saved",
    "run.after_save": "a run's state is saved",
    "checkpoint.begun": "a checkpoint's temporary folder exists, empty",
    "checkpoint.before_write": "a process is about to write its file of a checkpoint",
    "checkpoint.after_write": "a process has written its file of a checkpoint, not fsynced",
    "checkpoint.after_sync": "a process's file of a checkpoint is durable, under the temporary name",
    "checkpoint.before_record": "all files of a checkpoint are durable, nothing names them",
    "checkpoint.before_rename": "a checkpoint is whole and durable under its temporary name",
    "checkpoint.after_rename": "a checkpoint has its name, its directory is not fsynced",
    "checkpoint.before_sweep": "a checkpoint is durable, one too many of the older ones is still there",
    "push.before_file": "a push is about to send a file",
    "push.after_file": "a push has sent a file and read it back, no manifest names it there",
    "push.before_manifest": "a push has sent all files of an artifact, not its manifest",
    "push.after_manifest": "an artifact is committed at the remote, no run there names it",
    "push.before_record": "all that a run needs is at the remote, not all of its records",
    "pull.before_file": "a pull is about to fetch a file",
    "pull.after_file": "a pull has fetched a file, durably, no manifest names it",
    "pull.before_manifest": "a pull has fetched all files of an artifact, not committed it",
    "pull.before_run": "all that a run needs is here, the run is not",
    "train.after_step": "an optimizer step is done, nothing of it is written",
}
"""Every failpoint there is, and what is true at it. Tests go through all of them; a new one is declared here."""

SPEC = "OPD_FAILPOINTS"
LOG = "OPD_FAILPOINTS_LOG"
ROOT = "OPD_FAILPOINTS_ROOT"
"""Environment variable with the pid of the process that was armed first."""

Action = Callable[[Path | None], None]
_ENTRY = re.compile(r"\s*(?P<name>[\w.]+)=(?P<actions>[^@#]+?)(?:#(?P<rank>\d+))?(?:@(?P<hit>[1-9]\d*))?\s*")
_EXCEPTION = re.compile(r"(?P<type>\w+)(?:\((?P<argument>.*)\))?")


@dataclass(frozen=True)
class _Armed:
    actions: tuple[Action, ...]
    hit: int | None
    rank: str | None


_armed: dict[str, list[_Armed]] | None = None
_log: Path | None = None
_hits: Counter[str] = Counter()


def failpoint(name: str, path: Path | None = None) -> None:
    """Says that the process is at this moment. `path` is the file at hand, if there is one."""
    if _armed is not None:
        _hit(name, path)


def arm(environment: Mapping[str, str] = os.environ) -> None:
    """Takes the settings from `environment` and forgets hits and earlier settings; importing this module does it once.

    ConfigError for an unknown name, action or exception."""
    global _armed, _log
    spec, log = environment.get(SPEC, ""), environment.get(LOG)
    _hits.clear()
    _armed, _log = None, Path(log) if log else None
    if spec or log:
        _armed = parse(spec)
        os.environ.setdefault(ROOT, str(os.getpid()))
    else:
        os.environ.pop(ROOT, None)


def parse(spec: str) -> dict[str, list[_Armed]]:
    """What a setting arms, by name. ConfigError for what is not understood."""
    found: dict[str, list[_Armed]] = {}
    for entry in filter(str.strip, spec.split(";")):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ConfigError(f"{SPEC}: {entry.strip()!r} is not NAME=ACTION, NAME=ACTION#RANK or NAME=ACTION@HIT")
        known(match["name"])
        actions = tuple(_action(text.strip()) for text in match["actions"].split("+"))
        found.setdefault(match["name"], []).append(
            _Armed(actions, int(match["hit"]) if match["hit"] else None, match["rank"])
        )
    return found


def known(name: str) -> str:
    """The name, if there is such a failpoint; else ConfigError with the nearest."""
    if name not in NAMES:
        hint = did_you_mean(name, NAMES, f"names: {', '.join(NAMES)}")
        raise ConfigError(f"{SPEC}: no failpoint {name!r}; {hint}")
    return name


def _hit(name: str, path: Path | None) -> None:
    rank = os.environ.get("RANK", "0")
    of_all, of_rank = _count(known(name), rank)
    for armed in (_armed or {}).get(name, ()):
        if armed.rank in (None, rank) and armed.hit in (None, of_all if armed.rank is None else of_rank):
            for action in armed.actions:
                action(path)


def _count(name: str, rank: str) -> tuple[int, int]:
    """The number of this hit, from 1, among all and among those of this rank: of all processes where there is a log."""
    if _log is None:
        _hits[name] += 1
        return _hits[name], _hits[name]
    descriptor = os.open(_log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        lines = os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode().splitlines()
        os.write(descriptor, f"{name} {os.getpid()} {rank}\n".encode())
    finally:
        os.close(descriptor)
    before = [line.split() for line in lines]
    return 1 + sum(hit[0] == name for hit in before), 1 + sum((hit[0], hit[2]) == (name, rank) for hit in before)


# --- actions ---------------------------------------------------------------------------------------------------------


def _action(text: str) -> Action:
    kind, _, argument = text.partition(":")
    if kind == "raise":
        error = _exception(argument)
        return lambda path: _raise(error())
    try:
        if kind == "sleep":
            seconds = float(argument)
            return lambda path: time.sleep(seconds)
        if kind == "exit":
            code = int(argument or 1)
            return lambda path: os._exit(code)
    except ValueError:
        raise ConfigError(f"{SPEC}: {text!r}: {argument!r} is not a number") from None
    if kind == "wait" and argument:
        return lambda path: _wait(Path(argument))
    plain: dict[str, Action] = {"kill": _kill, "killtree": _kill_tree, "torn": _tear}
    if kind in plain and not argument:
        return plain[kind]
    raise ConfigError(f"{SPEC}: no action {text!r}; there are {', '.join(plain)}, exit, raise:, sleep:, wait:")


def _exception(text: str) -> Callable[[], BaseException]:
    match = _EXCEPTION.fullmatch(text)
    kind = match and (getattr(storage.errors, match["type"], None) or getattr(builtins, match["type"], None))
    if not match or not isinstance(kind, type) or not issubclass(kind, BaseException):
        raise ConfigError(f"{SPEC}: raise:{text}: no exception of that name among the built-in ones and storage.errors")
    argument = match["argument"]
    if issubclass(kind, OSError):
        number = getattr(errno, argument or "", None)
        if not isinstance(number, int):
            raise ConfigError(f"{SPEC}: raise:{text}: no errno {argument!r}; write raise:OSError(ENOSPC), say")
        return lambda: kind(number, os.strerror(number))
    return lambda: kind(argument or "a failpoint")


def _raise(error: BaseException) -> NoReturn:
    raise error


def _wait(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def _tear(path: Path | None) -> None:
    if path is not None and path.is_file():
        os.truncate(path, path.stat().st_size // 2)


def _kill(path: Path | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_tree(path: Path | None) -> None:
    """The root first, so that it cannot report what happens to its workers; this process last."""
    import psutil

    root = int(os.environ.get(ROOT, os.getpid()))
    tree = [process.pid for process in psutil.Process(root).children(recursive=True)] if psutil.pid_exists(root) else []
    for pid in [root, *tree]:
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    _kill(path)


arm()
