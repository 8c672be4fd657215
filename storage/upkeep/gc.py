"""Collection: removes what no run needs, and never what is in use.

First a plan, which changes nothing. Then each item is checked again under the locks of builders and readers, and removed.
The store is valid after a crash at any moment: an eviction is marked, durably, before the first file is removed; anything
else is renamed in one step to a temporary name, which the next collection removes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from storage.artifacts.artifact import KEY, MANIFEST, Manifest, artifact_directory, load_manifest
from storage.artifacts.numerics import BY_SHARD, NUMERICS
from storage.artifacts.shards import SIDECAR
from storage.disk.files import TEMPORARY, fsync_directory, remove, replace_atomically, utc_now
from storage.disk.locks import alone, build_lock, holder, locked, use_lock
from storage.errors import CorruptArtifact, RunBusy, StoreError
from storage.runs import Run, RunState
from storage.store import Store
from storage.text import counted
from storage.upkeep.retention import Name, Retention, droppable, role_of_stage, used

TEMPORARY_SECONDS = 3600.0
"""Age at which a temporary file is unused: files are written at once and renamed."""
HELD = "held.lock"
"""A temporary folder in which this lock is held is in use, whatever its age."""
KEPT_REPLAY = "replay-"
"""Prefix of the folders that `opd replay --keep` leaves in the store's root."""
_STAMP = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{12}-")

Kind = Literal["evicted", "unused", "unfinished", "left over", "temporary", "quarantine"]
MEANING: dict[Kind, str] = {
    "evicted": "data of rounds past a run's policy.retain; the manifest stays",
    "unused": "artifacts that no run refers to",
    "unfinished": "unfinished artifacts that no run refers to",
    "left over": "files in artifacts that their manifests do not list",
    "temporary": "temporary files of dead processes, and folders of `opd replay --keep`",
    "quarantine": "damaged pieces quarantined long ago",
}
RetentionOf = Callable[[Run], Retention]


@dataclass(frozen=True)
class Item:
    """One removable thing. `artifact`: the artifact whose locks protect it; None if only its age counts."""

    kind: Kind
    path: Path
    bytes: int
    artifact: Name | None = None


@dataclass
class Plan:
    """The removable items, and the running runs (name -> holder), which keep everything."""

    items: list[Item] = field(default_factory=list)
    busy: dict[str, str] = field(default_factory=dict)
    unrepeatable: set[Name] = field(default_factory=set)
    """Those to be evicted that were sampled so that they cannot be made again bit for bit (`repeatable`)."""

    def bytes(self, kind: Kind | None = None) -> int:
        return sum(item.bytes for item in self.items if kind in (None, item.kind))


def run_retention(run: Run) -> Retention:
    """A run's own `policy.retain`."""
    return Retention.of(run.experiment, f"run {run.name}")


class Collector:
    """Plans and removes. `quarantine_days`: damaged pieces older than this are removed too. `own`: a run that this process holds
    and that has no stage under way: its retention applies, although it is running. `best`: each run's
    best round is kept.

    Raises CorruptArtifact if a run's files cannot be read, because its needs are then unknown."""

    def __init__(
        self,
        store: Store,
        retention: RetentionOf = run_retention,
        quarantine_days: float = 30.0,
        own: str | None = None,
        best: bool = True,
    ) -> None:
        self.store, self.root, self._own, self._best = store, store.root, own, best
        self._retention, self._quarantine_days = retention, quarantine_days
        self._states: dict[str, tuple[tuple[int, int, int] | None, RunState, Retention, frozenset[int]]] = {}
        self._roles: dict[Name, str | None] = {}

    def plan(self) -> Plan:
        """The plan. Changes nothing."""
        needs = self._needs()
        plan = Plan(busy=needs.busy)
        for directory in sorted((self.root / "artifacts").glob("[!.]*/*")):
            if KEY.fullmatch(directory.name) and directory.is_dir() and not directory.is_symlink():
                plan.items += self._of_artifact(directory, needs)
        plan.items += self._temporary()
        plan.items += self._old_quarantine()
        self._mark(plan)
        return plan

    def _mark(self, plan: Plan) -> None:
        for item in plan.items:
            if item.kind == "evicted" and item.artifact is not None:
                artifact = self.store.get(*item.artifact)
                if artifact is not None and not repeatable(artifact.provenance):
                    plan.unrepeatable.add(item.artifact)

    def plan_of_run(self, run: Run) -> Plan:
        """The part of a plan that is past this run's own retention: artifacts of it that no other run needs."""
        needs = self._needs()
        plan = Plan(busy=needs.busy)
        for name in sorted(used(self._state(run)[0]) - needs.whole):
            found = self._of_artifact(artifact_directory(self.root, *name), needs)
            plan.items += [item for item in found if item.kind == "evicted"]
        self._mark(plan)
        return plan

    def apply(self, plan: Plan, done: Callable[[Item], None] = lambda item: None) -> list[Item]:
        """Removes the items that are still unused; returns them. `done` is called after each.

        RunBusy if another process is collecting in this store."""

        def busy(who: str) -> None:
            raise RunBusy(f"{self.root}: another collection is running, by {who}; wait for it", who)

        removed = []
        with locked(self.root / "locks" / "gc.lock", busy):
            for item in plan.items:
                if self._apply(item):
                    removed.append(item)
                    done(item)
        return removed

    # --- what is needed ----------------------------------------------------------------------------------------------

    def _needs(self) -> _Needs:
        """The needs of all runs by their current states. A running run needs everything it names."""
        needs = _Needs()
        runs = [(run, *self._state(run)) for run in self._runs()]
        origins = [state.forked_from.rpartition("@") for _, state, *_ in runs if state.forked_from]
        for run, state, retain, kept in runs:
            named = used(state)
            who = run.holder() if run.name != self._own else None
            if who is not None:
                needs.busy[run.name] = who
            forked = {int(round) for parent, _, round in origins if parent == run.name}
            dropped = droppable(state, retain, self._role, kept, forked, self._best) if who is None else set()
            needs.named |= named
            needs.whole |= named - dropped
        return needs

    def _role(self, name: Name) -> str | None:
        """The field of `Retention` that an artifact falls under: by its stage, or for a plugin's signal by its manifest. None,
        so that it is kept, where that cannot be read."""
        if name not in self._roles:
            role = role_of_stage(name)
            if role is None:
                try:
                    manifest = load_manifest(artifact_directory(self.root, *name))
                except (CorruptArtifact, StoreError):
                    manifest = None
                role = manifest.retention if manifest is not None else None
            self._roles[name] = role
        return self._roles[name]

    def _runs(self) -> list[Run]:
        """All runs, damaged ones included: an unreadable run still needs its artifacts."""
        runs = Run.list(self.root)
        known = {run.name for run in runs}
        for path in sorted((self.root / "runs").iterdir()):
            if path.name not in known and not path.name.startswith(TEMPORARY):
                raise CorruptArtifact(
                    f"{path}: not a run's folder, so its needs are unknown and nothing is collected;"
                    " to delete the run, remove the folder"
                )
        return runs

    def _state(self, run: Run) -> tuple[RunState, Retention, frozenset[int]]:
        """State, retention and `policy.keep_rounds` of a run."""
        stat = (run.directory / "state.json").stat() if (run.directory / "state.json").exists() else None
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat is not None else None
        if stamp is None or run.name not in self._states or self._states[run.name][0] != stamp:
            state = run.state  # raises the error that names the repair, where the file is missing or damaged
            kept = (run.experiment.get("policy") or {}).get("keep_rounds") or ()
            self._states[run.name] = (stamp, state, self._retention(run), frozenset(map(int, kept)))
        return self._states[run.name][1:]

    # --- artifacts ---------------------------------------------------------------------------------------------------

    def _of_artifact(self, directory: Path, needs: _Needs) -> Iterator[Item]:
        name = (directory.parent.name, directory.name)
        try:
            manifest = load_manifest(directory)
        except CorruptArtifact:
            manifest = None
        except StoreError:  # not an artifact's folder, or a newer program's
            return
        if name not in needs.named:
            if holder(build_lock(self.root, *name)) is None:
                yield Item("unused" if manifest else "unfinished", directory, _size(directory), name)
            return
        if manifest is None:
            return  # a run will continue it
        if name not in needs.whole and manifest.evictable:
            yield Item("evicted", directory, sum(_size(path) for path in _data(directory, manifest)), name)
        loose = _loose(directory, manifest)
        if loose and holder(build_lock(self.root, *name)) is None:
            yield Item("left over", directory, sum(_size(path) for path in loose), name)

    def _apply(self, item: Item) -> bool:
        if item.artifact is None:
            return remove(item.path)
        with ExitStack() as held:
            if not held.enter_context(alone(use_lock(self.root, *item.artifact))):
                return False  # being read
            try:
                held.enter_context(locked(build_lock(self.root, *item.artifact), _give_up))
            except _HeldError:
                return False  # being built
            now = [other for other in self._of_artifact_now(item) if other.kind == item.kind]
            if not now:
                return False
            if item.kind == "evicted":
                evict(item.path)
            elif item.kind == "left over":
                manifest = load_manifest(item.path)
                for path in _loose(item.path, manifest) if manifest else ():
                    remove(path)
            else:
                remove(item.path)
        return True

    def _of_artifact_now(self, item: Item) -> list[Item]:
        """As in `plan`, by the runs' current states. Call with the build lock held."""
        if not item.path.is_dir():
            return []
        needs = self._needs()
        name = (item.path.parent.name, item.path.name)
        if item.kind in ("unused", "unfinished"):
            return [] if name in needs.named else [item]
        manifest = load_manifest(item.path)
        if manifest is None:
            return []
        if item.kind == "evicted":
            return [item] if name not in needs.whole and manifest.evictable else []
        return [item] if _loose(item.path, manifest) else []

    # --- temporary files and quarantine ------------------------------------------------------------------------------

    def _temporary(self) -> Iterator[Item]:
        before = time.time() - TEMPORARY_SECONDS
        places = ("", "artifacts/*/", "artifacts/*/*/", "runs/", "runs/*/", "quarantine/", "memo/", "locks/")
        for pattern in (*(f"{place}{TEMPORARY}*" for place in places), f"{KEPT_REPLAY}*"):
            for path in sorted(self.root.glob(pattern)):
                parent = path.parent
                artifact = (parent.parent.name, parent.name) if KEY.fullmatch(parent.name) else None
                if artifact is not None and ((parent / MANIFEST).exists() or holder(build_lock(self.root, *artifact))):
                    continue  # counted as left over, or being written
                if _newest(path) < before and not (path.is_dir() and holder(path / HELD)):
                    yield Item("temporary", path, _size(path))

    def _old_quarantine(self) -> Iterator[Item]:
        before = datetime.now(UTC) - timedelta(days=self._quarantine_days)
        for path in sorted((self.root / "quarantine").iterdir()):
            stamp = _STAMP.match(path.name)
            if stamp and datetime.strptime(stamp[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) < before:
                yield Item("quarantine", path, _size(path))


@dataclass
class _Needs:
    """`named`: artifacts that any run names. `whole`: those whose data is needed. `busy`: run -> its holder."""

    named: set[Name] = field(default_factory=set)
    whole: set[Name] = field(default_factory=set)
    busy: dict[str, str] = field(default_factory=dict)


class _HeldError(Exception):
    pass


def _give_up(who: str) -> None:
    raise _HeldError(who)


def repeatable(provenance: Mapping[str, Any]) -> bool:
    """Whether what was made with this provenance can be made again bit for bit, as far as its settings say: on a GPU a sampler's
    batches depend on timing, unless its engine was in process or batch-invariant."""
    sets = [provenance.get(NUMERICS) or {}, *(entry.get("numerics") or {} for entry in provenance.get(BY_SHARD) or ())]
    return not any(
        "sampler_max_num_seqs" in numerics
        and numerics.get("device") == "cuda"
        and not (numerics.get("sampler_in_process") or numerics.get("sampler_batch_invariant"))
        for numerics in sets
    )


def unrepeatable_note(names: Collection[Name]) -> str | None:
    """A warning about rollouts that a collection removes for good; None without any."""
    rollouts = sorted(key for stage, key in names if stage == "rollout")
    if not rollouts:
        return None
    return (
        f"warning: {counted(len(rollouts), 'rollout')} sampled on a GPU with neither runtime.sampler.in_process nor"
        f" batch_invariant ({', '.join(rollouts[:3])}{', ...' if len(rollouts) > 3 else ''}) cannot be restored or replayed bit"
        " for bit once removed; --keep rollouts=all (or policy.retain.rollouts: null) keeps them"
    )


def evict(directory: Path) -> None:
    """Marks a committed artifact evicted, durably, then deletes its data. Call with its locks held."""
    manifest = load_manifest(directory)
    if manifest is None:
        raise StoreError(f"{directory}: nothing committed to evict")
    if manifest.evicted is None:
        manifest = manifest.model_copy(update={"evicted": utc_now()})
        replace_atomically(directory / MANIFEST, manifest.dump())
    for path in _data(directory, manifest):
        remove(path)
    fsync_directory(directory)


def _data(directory: Path, manifest: Manifest) -> list[Path]:
    """Existing shards, sidecars and trees of an artifact in the store."""
    paths = [directory / f"{record.file}{end}" for record in manifest.shards for end in ("", SIDECAR)]
    paths += [directory / tree.directory for tree in manifest.trees.values() if not tree.external]
    return [path for path in paths if path.exists()]


def _loose(directory: Path, manifest: Manifest) -> list[Path]:
    """Files that the manifest does not list; for an evicted artifact also remaining data."""
    kept = {directory / MANIFEST}
    if manifest.evicted is None:
        kept |= set(_data(directory, manifest))
    return sorted(path for path in directory.iterdir() if path not in kept)


def _files(path: Path) -> Iterator[os.stat_result]:
    if path.is_symlink() or not path.is_dir():
        yield path.lstat()
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder, name).lstat()


def _size(path: Path) -> int:
    """Bytes that its removal frees: a file with another hard link frees none."""
    try:
        return sum(stat.st_size for stat in _files(path) if stat.st_nlink == 1)
    except FileNotFoundError:  # removed meanwhile
        return 0


def _newest(path: Path) -> float:
    """Time of the last write to it or anything in it; now, if it was removed meanwhile."""
    try:
        return max((stat.st_mtime for stat in _files(path)), default=path.lstat().st_mtime)
    except FileNotFoundError:
        return time.time()
