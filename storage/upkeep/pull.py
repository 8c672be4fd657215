"""`opd pull`: runs and all that they need from a remote, each file verified; a run appears only when everything is here.

An artifact's files come under temporary names, then its manifest; the run's records come last. Killed anywhere, the store has
whole artifacts and whole runs, and the next pull goes on with the files that it already has."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from storage.artifacts.artifact import MANIFEST, FileRecord, artifact_directory, load_manifest
from storage.artifacts.builder import unfinished_work
from storage.artifacts.trees import damaged
from storage.disk.failpoints import failpoint
from storage.disk.files import (
    explain_full_disk,
    fsync_directory,
    make_directory,
    publish_exclusively,
    quarantine,
    remove,
    replace_atomically,
    require_space,
)
from storage.disk.locks import build_lock, locked, shared, use_lock
from storage.disk.remote import Moved, Remote, RemoteError
from storage.errors import CorruptArtifact, IdentityMismatch, InputError
from storage.runs import RECORDS, Run, missing_from, publish_records, replace_records, run_directory
from storage.store import Store
from storage.upkeep.remote_layout import (
    TRANSFERS,
    Lanes,
    Name,
    Plan,
    RemoteRun,
    folder_of,
    manifest_at,
    require_run,
    require_same,
    require_store,
    run_at,
    run_names,
)

_OTHER_FILES = 256
"""File descriptors that a pull needs beside one per artifact of a run."""


def pull(
    store: Store,
    remote: Remote,
    names: Sequence[str] | None,
    *,
    apply: bool = True,
    transfers: int = TRANSFERS,
    planned: Callable[[Plan], None] = lambda plan: None,
    moved: Moved = lambda size: None,
    waiting: Callable[[str], None] = lambda holder: None,
) -> Plan:
    """Fetches runs, by default all that are there whole, and what they need. What is evicted here stays evicted. Without `apply`,
    only the plan. `planned` is called with the plan before anything is written; `waiting` with the holder of an artifact that
    another process builds.

    Raises RemoteError, RunBusy where another process holds a run, IdentityMismatch for another run of that name here, InputError
    for one that has gone another way, NotEnoughSpace; all but damage at the remote before anything is written."""
    require_store(remote)
    if names is None:
        found = [run for name in run_names(remote) if (run := run_at(remote, name)) is not None]
    else:
        found = [require_run(remote, name) for name in names]
    with ExitStack() as held:
        plan = Plan()
        fetcher = _Fetcher(store, remote, plan, waiting)
        for run in found:
            fetcher.look(run, held)
        if not apply:
            return plan
        require_space(store.root, plan.bytes, f"what is pulled from {remote}")
        planned(plan)
        store.remove_leftovers()
        fetcher.lanes = Lanes(transfers, moved)
        try:
            for run in found:
                fetcher.fetch(run)
        finally:
            fetcher.lanes.close()
        return plan


class _Fetcher:
    lanes: Lanes

    def __init__(self, store: Store, remote: Remote, plan: Plan, waiting: Callable[[str], None]) -> None:
        self.store, self.remote, self.plan, self.waiting = store, remote, plan, waiting
        self.runs: dict[str, Run | None] = {}
        """Runs whose records are fetched -> the run of that name that is here, whose lock is held."""
        self.looked: set[Name] = set()

    def look(self, there: RemoteRun, held: ExitStack) -> None:
        """Plans one run. Takes its lock where it is here."""
        if run_directory(self.store.root, there.name).exists():
            run = Run.open(self.store.root, there.name)
            held.enter_context(run.lock())
            if run.identity != there.identity:
                raise IdentityMismatch(f"another run {run.name!r} is in this store; pull into another --root")
            mine = run.state
            if lacks := missing_from(there.state, mine):
                if more := missing_from(mine, there.state):
                    raise InputError(
                        f"run {run.name!r} has gone another way at {self.remote}: {more} is only there, {lacks} only here; pull"
                        " into another --root"
                    )
                self.plan.notes.append(f"run {run.name!r} is ahead here ({lacks}); push it")
                return
            if missing_from(mine, there.state):
                self.runs[run.name] = run
        else:
            self.runs[there.name] = None
        self.plan.runs += [there.name] if there.name in self.runs else []
        for name, entry in there.listed.items():
            if name in self.looked:
                continue
            self.looked.add(name)
            artifact = self.store.get(*name)
            if artifact is not None:
                self._same(name, artifact.content, entry.content)
                self.plan.present += 1
            else:
                self.plan.artifacts[name] = entry

    def fetch(self, there: RemoteRun) -> None:
        """Fetches what a run needs, then its records. Until then no collection removes any of it."""
        names = sorted(there.listed.keys() & self.plan.artifacts.keys())
        with ExitStack() as held:
            if there.name in self.runs:
                _allow_files(len(there.listed))
                for name in sorted(there.listed):
                    held.enter_context(shared(use_lock(self.store.root, *name)))
                names = sorted(name for name in there.listed if self.store.get(*name) is None)
            self.lanes.artifacts(lambda name: self._fetch(name, there), names)
            if there.name not in self.runs:
                return
            failpoint("pull.before_run")
            run = self.runs[there.name]
            if run is not None:
                replace_records(run, there.files)
            elif not publish_records(self.store.root, there.name, {file: there.files[file] for file in RECORDS}):
                raise InputError(f"run {there.name!r} was made here meanwhile; pull again")

    def _fetch(self, name: Name, there: RemoteRun) -> None:
        root, directory = self.store.root, artifact_directory(self.store.root, *name)
        with locked(build_lock(root, *name), self.waiting):
            if (artifact := self.store.get(*name)) is not None:  # built meanwhile
                return self._same(name, artifact.content, there.listed[name].content)
            manifest = manifest_at(self.remote, name)
            if manifest is None:
                raise RemoteError(
                    f"{self.remote}/{folder_of(name)}/{MANIFEST}: missing, but the run {there.name!r} needs it"
                )
            self._same(name, there.listed[name].content, manifest.artifact.content)
            with explain_full_disk(directory):
                make_directory(directory)

            def fetch(file: FileRecord) -> None:
                target = directory / file.path
                failpoint("pull.before_file", target)
                if damaged(target, file, None) is None:
                    self.lanes.moved(file.bytes)
                else:
                    where = f"{folder_of(name)}/{file.path}"
                    self.remote.download(where, target, directory, file.bytes, file.sha256, self.lanes.moved)
                os.utime(target, ns=(file.mtime_ns, file.mtime_ns))  # so that planning need not hash it
                failpoint("pull.after_file", target)

            self.lanes.files(fetch, manifest.own_files())
            for folder in sorted({(directory / file.path).parent for file in manifest.own_files()}):
                fsync_directory(folder)
            failpoint("pull.before_manifest")
            try:
                before = load_manifest(directory)
            except CorruptArtifact as error:
                quarantine(root, directory / MANIFEST, str(error))
                before = None
            if before is not None:  # damaged here
                replace_atomically(directory / MANIFEST, manifest.dump())
            else:
                publish_exclusively(directory / MANIFEST, manifest.dump())
            for path in unfinished_work(directory):
                remove(path)

    def _same(self, name: Name, ours: dict[str, str], theirs: dict[str, str]) -> None:
        here = f"{'/'.join(name)}: has other content here than at {self.remote}"
        require_same(ours, theirs, here, "pull into another --root")


def _allow_files(artifacts: int) -> None:
    """Lets this process hold a lock for each artifact of a run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = artifacts + _OTHER_FILES
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
