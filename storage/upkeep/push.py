"""`opd push`: committed artifacts and the records of runs to a remote; only what is missing, each file verified there.

Files come first, then the artifact's manifest, then the run's records, its state last: killed anywhere, the remote has whole
artifacts and whole runs, and the next push goes on. What is evicted here goes as its manifest alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from storage.artifacts.artifact import MANIFEST, Artifact, FileRecord, Manifest, artifact_directory, read_manifest
from storage.disk.failpoints import failpoint
from storage.disk.locks import shared, use_lock
from storage.disk.remote import Moved, Remote
from storage.errors import CorruptArtifact, IdentityMismatch, InputError, RunBusy
from storage.runs import RECORDS, Run, RunState, missing_from
from storage.store import Store
from storage.upkeep.remote_layout import (
    LISTED,
    TRANSFERS,
    Lanes,
    Listed,
    Name,
    Plan,
    folder_of,
    listing,
    manifest_at,
    mark,
    marked,
    require_same,
    run_at,
)
from storage.upkeep.retention import used


def push(
    store: Store,
    remote: Remote,
    runs: Sequence[Run],
    *,
    leave_out_busy: bool = False,
    again: bool = False,
    apply: bool = True,
    transfers: int = TRANSFERS,
    planned: Callable[[Plan], None] = lambda plan: None,
    moved: Moved = lambda size: None,
) -> Plan:
    """Sends runs and all that they are made from. `leave_out_busy`: a run that another process holds is left out, else RunBusy.
    `again`: files that are there already are read back, and sent again where they are damaged. Without `apply`, only the plan.
    `planned` is called with the plan before anything is written.

    Raises RemoteError, IdentityMismatch for another run of that name there, InputError for one that has gone another way,
    CorruptArtifact for what is damaged here; all but the last of these before anything is written."""
    if remote.folder is not None and _within(remote.folder, store.root):
        raise InputError(f"{remote}: is this store itself; give another folder")
    there = marked(remote)
    with ExitStack() as held:
        plan, mine = Plan(), list[Run]()
        for run in runs:
            try:
                held.enter_context(run.lock())
            except RunBusy as busy:
                if not leave_out_busy:
                    raise
                plan.left_out[run.name] = busy.holder
            else:
                mine.append(run)
        sender = _Sender(store, remote, mine, plan, again, there)
        if not apply:
            return plan
        planned(plan)
        remote.remove_leftovers()
        if not there:
            mark(remote)
        sender.lanes = Lanes(transfers, moved)
        try:
            sender.lanes.artifacts(sender.send, sorted(plan.artifacts))
        finally:
            sender.lanes.close()
        sender.send_runs()
        return plan


class _Sender:
    lanes: Lanes

    def __init__(self, store: Store, remote: Remote, runs: Sequence[Run], plan: Plan, again: bool, there: bool) -> None:
        """Fills the plan."""
        self.store, self.remote, self.plan, self.again = store, remote, plan, again
        held = {(a.stage, a.key): a for a in store.list()}
        makers: dict[str, Name] = {}
        for name, artifact in held.items():  # oldest first
            for digest in artifact.content.values():
                makers.setdefault(digest, name)
        self.needed: dict[str, set[Name]] = {}
        self.records: dict[str, dict[str, bytes]] = {}
        at_remote: dict[Name, Listed] = {}
        for run in runs:
            files = {file: (run.directory / file).read_bytes() for file in RECORDS}
            _ = run.experiment  # raises the error that names the repair, where one is damaged
            state, identity = run.state, run.identity
            other = run_at(remote, run.name) if there else None
            if other is not None:
                at_remote |= other.listed
                if other.identity != identity:
                    raise IdentityMismatch(f"{remote}: has another run {run.name!r}; push to another prefix")
                if lacks := missing_from(state, other.state):
                    if more := missing_from(other.state, state):
                        raise InputError(
                            f"run {run.name!r} has gone another way at {remote}: {lacks} is only there, {more} only here; push to"
                            " another prefix"
                        )
                    plan.notes.append(f"run {run.name!r} is ahead at the remote ({lacks}); pull it")
                    continue
            self.needed[run.name] = _all_of(state, held, makers, run)
            if again or other is None or other.files != files or set(other.listed) != self.needed[run.name]:
                self.records[run.name] = files
                plan.runs.append(run.name)
        self.entries: dict[Name, Listed] = {}
        for name in sorted(set[Name]().union(*self.needed.values())):
            self._look(name, at_remote.get(name), there)

    def _look(self, name: Name, known: Listed | None, there: bool) -> None:
        """Plans one artifact. Its bytes count unless it is there."""
        entry = Listed.of(self._manifest(name)[0])
        if known is None and there and (found := manifest_at(self.remote, name)) is not None:
            known = Listed.of(found)
        self.entries[name] = entry if known is None or known.evicted else known
        if known is not None:
            self._same(name, entry.content, known.content)
            if not self.again and (entry.evicted or not known.evicted):
                self.plan.present += 1
                return
        self.plan.artifacts[name] = entry

    def send(self, name: Name) -> None:
        """Sends one artifact: its files, then its manifest."""
        with shared(use_lock(self.store.root, *name)):
            manifest, data = self._manifest(name)
            folder = folder_of(name)
            sizes = self.remote.sizes(folder) if manifest.evicted is None else {}
            directory = artifact_directory(self.store.root, *name)
            there = manifest_at(self.remote, name)
            if there is not None and there.evicted is None:
                self._same(name, manifest.artifact.content, there.artifact.content)
                if [f.path for f in there.own_files()] != [f.path for f in manifest.own_files()]:
                    return  # made apart, with equal content and other file names

            def send(file: FileRecord) -> None:
                path = f"{folder}/{file.path}"
                failpoint("push.before_file", directory / file.path)
                if sizes.get(file.path) == file.bytes and self.remote.sha256(path, file.bytes) == file.sha256:
                    return self.lanes.moved(file.bytes)
                self.remote.upload(directory / file.path, path, file.bytes, file.sha256, self.lanes.moved)
                failpoint("push.after_file", directory / file.path)

            self.lanes.files(send, manifest.own_files())
            failpoint("push.before_manifest")
            if there is None and not self.remote.create(f"{folder}/{MANIFEST}", data):
                there = manifest_at(self.remote, name)
            if there is not None:  # evicted there, or pushed by another meanwhile
                self._same(name, manifest.artifact.content, there.artifact.content)
                if there.evicted is not None and manifest.evicted is None:
                    self.remote.replace(f"{folder}/{MANIFEST}", data)
            failpoint("push.after_manifest")

    def send_runs(self) -> None:
        """Writes the records of the runs, the state last."""
        for name, files in self.records.items():
            needs = {artifact: self.entries[artifact] for artifact in self.needed[name]}
            self.remote.replace(f"runs/{name}/{LISTED}", listing(needs))
            for file in RECORDS:
                failpoint("push.before_record")
                self.remote.replace(f"runs/{name}/{file}", files[file])

    def _manifest(self, name: Name) -> tuple[Manifest, bytes]:
        path = artifact_directory(self.store.root, *name) / MANIFEST
        data = path.read_bytes()
        return read_manifest(data, str(path), name), data

    def _same(self, name: Name, ours: dict[str, str], theirs: dict[str, str]) -> None:
        there = f"{self.remote}/{folder_of(name)}: is there with other content"
        require_same(ours, theirs, there, "push to another prefix")


def _all_of(state: RunState, held: dict[Name, Artifact], makers: dict[str, Name], run: Run) -> set[Name]:
    """The artifacts that a run names, and those that they were made from. CorruptArtifact for a finished stage's that is damaged
    or gone."""
    finished = [s for r in state.rounds for s in r.stages.values() if s.state in ("done", "cached")]
    for name in (name for stage in finished for name in stage.artifacts.items()):
        if name not in held:
            raise CorruptArtifact(f"{'/'.join(name)}: damaged or missing; `opd resume {run.name}` rebuilds it")
    found, new = set[Name](), used(state) & held.keys()
    digests = set[str]()
    while new:
        found |= new
        digests |= {digest for name in new for digest in held[name].content.values()}
        new = {
            makers[d] for name in new for d in held[name].inputs.values() if d in makers and d not in digests
        } - found
    return found


def _within(path: Path, root: Path) -> bool:
    path, root = path.resolve(), root.resolve()
    return path == root or root in path.parents
