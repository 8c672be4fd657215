"""Building one artifact: shards and trees are collected, checked against what was recorded, and committed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from storage.artifacts.artifact import (
    MANIFEST,
    Artifact,
    ArtifactSpec,
    Manifest,
    ShardRecord,
    TreeRecord,
    check_name,
    load_manifest,
    provenance,
)
from storage.artifacts.batches import BATCH, Batch, provenance_of, recorded_batches, unfinished_batches
from storage.artifacts.checkpoints import CHECKPOINT, Checkpoints
from storage.artifacts.digests import combine_digests
from storage.artifacts.numerics import INTERMEDIATE, MADE_AT, ShardNumerics, begin_repair
from storage.artifacts.shards import SIDECAR, ShardWriter, check_file, sidecar, sidecars
from storage.artifacts.trees import (
    content_digests,
    damaged_files,
    external_files,
    fsync_tree,
    own_files,
    record_files,
    tree_directory,
)
from storage.disk.failpoints import failpoint
from storage.disk.files import (
    TEMPORARY,
    explain_full_disk,
    fsync_directory,
    publish_exclusively,
    quarantine,
    remove,
    replace_atomically,
    temporary_name,
    unique,
    utc_now,
)
from storage.errors import CorruptArtifact, InputError, StoreError
from storage.identity import canonical_json
from storage.schemas import TableSchema


def unfinished_work(directory: Path, below: str = "") -> list[Path]:
    """Files that artifacts have only until they are committed: checkpoints, records of numerics and of batches, intermediate
    shards. `below`: a glob pattern from `directory` to the artifacts."""
    patterns = (f"{CHECKPOINT}*", f"*{MADE_AT}", f"*{BATCH}", INTERMEDIATE)
    return sorted(path for pattern in patterns for path in directory.glob(below + pattern))


class Builder(ShardWriter):
    """Made by `Store.building`, which holds the artifact's lock meanwhile.

    `committed` is the artifact if there is nothing to build. A damaged artifact lacks only what is damaged, an evicted one
    everything; `commit` then requires the recorded content."""

    def __init__(self, root: Path, spec: ArtifactSpec, committed: Artifact | None, recorded: Manifest | None) -> None:
        super().__init__(root, spec.stage, spec.key)
        self.spec = spec
        self.committed = committed
        self._recorded = recorded
        self._recorded_shards = frozenset(recorded.shards) if recorded is not None else frozenset()
        self._memo = root / "memo"
        self._temporary: dict[str, Path] = {}
        self._external: dict[str, Path] = {}
        self._scratch: list[Path] = []
        self._started = time.monotonic()
        self._closed = False
        self.made: Mapping[str, str] = {}
        """The digests of what this builder has made, known from `commit` on."""
        if committed is None:
            failpoint("builder.before_sweep")
            self._sweep(recorded)

    def table_schema(self, table: str) -> TableSchema:
        """The declaration of a table: that of the spec or of the recorded manifest, else the one in `storage.schemas`."""
        own = self.spec.tables or (self._recorded.tables if self._recorded is not None else {})
        return own[table].schema_of(table) if table in own else super().table_schema(table)

    @property
    def repairing(self) -> bool:
        """Whether this restores a damaged or evicted artifact, so that its content is already fixed."""
        return self.committed is None and self._recorded is not None

    @property
    def recorded(self) -> Artifact | None:
        """The record of a damaged or evicted artifact; `commit` requires its content."""
        return self._recorded.artifact if self._recorded is not None else None

    def missing(self, table: str, n_shards: int) -> list[int]:
        """Shards of 0..n_shards-1 that must be (re)built. Bad files found on the way go to quarantine."""
        if self.committed is not None:
            return []
        good, _ = self._inspect(table)
        return [shard for shard in range(n_shards) if shard not in good]

    def forget(self, table: str) -> None:
        """Removes shards that an earlier attempt wrote and did not commit, for work whose outputs must all be of one
        attempt."""
        for path, record in list(sidecars(self.path)):
            if path.name.rsplit("-", 2)[0] == table and not (record is not None and self._is_recorded(record)):
                sidecar(path).unlink(missing_ok=True)  # first: a shard without a sidecar is ignored
                path.unlink(missing_ok=True)

    def finished(self, table: str, n_shards: int) -> list[Path]:
        """The files of shards 0..n_shards-1 before they are committed, verified, each shard once however often it was
        written. CorruptArtifact when one is missing, or was damaged since it was written."""
        good, _ = self._inspect(table)
        absent = [shard for shard in range(n_shards) if shard not in good]
        if absent:
            raise CorruptArtifact(
                f"{self._name}: shards {absent[:10]} of {table} were damaged or removed after they were written; run again:"
                " only these are rebuilt"
            )
        return [self.path / good[shard].file for shard in range(n_shards)]

    def needs_tree(self, name: str = "model") -> bool:
        """Whether `directory(name)` must be filled; False where a damaged artifact still has this tree whole."""
        return self.committed is None and name not in self._kept_trees()

    def directory(self, name: str = "model") -> Path:
        """A fresh temporary directory; its files become the artifact's tree `name` at commit."""
        self._new_tree(name)
        path = self.path / temporary_name(name)
        self._temporary[name] = path  # first, so that an interruption here leaves no folder
        with explain_full_disk(path):
            path.mkdir()
        failpoint("tree.begun")
        return path

    def scratch(self) -> Path:
        """A new temporary directory whose files do not become part of the artifact."""
        path = self.path / temporary_name("scratch")
        self._scratch.append(path)
        with explain_full_disk(path):
            path.mkdir()
        return path

    def external(self, name: str, path: Path) -> None:
        """Records a tree that stays where it is (a user's checkpoint), with the hashes of its files."""
        self._new_tree(name)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder")
        self._external[name] = path.resolve()

    def checkpoints(self, settings: Mapping[str, Any]) -> Checkpoints:
        """Those of this artifact while it is unfinished, made at equal `settings`. They outlive a killed builder, and go
        when the artifact is committed."""
        return Checkpoints(self.root, self.path, settings)

    def begin_shards(self, table: str, settings: Mapping[str, Any], missing: Sequence[int], count: int) -> list[str]:
        """Records that the `missing` ones of `count` shards will be made with `settings` (numerics). Returns messages for the
        user. A repair keeps its record of shards; its intermediate shards must be of these settings too."""
        if self.committed is not None:
            return []
        if self._recorded is not None:
            return begin_repair(self.path, table, settings)
        return ShardNumerics(self.path, table).begin(settings, missing, count)

    def shard_numerics(self, table: str, count: int) -> dict[str, Any]:
        """The settings that the shards of a table were made at, for `commit(provenance=...)`."""
        return ShardNumerics(self.path, table).provenance(count)

    def batches(self, table: str, count: int) -> dict[str, Any]:
        """The batches that the shards of a sampled table were in, for `commit(provenance=...)`."""
        return provenance_of(unfinished_batches(self.path, table), count)

    def batches_to_repeat(
        self, table: str, missing: Sequence[int], provenance: Mapping[str, Any] | None
    ) -> list[Batch]:
        """The batches in which those of the `missing` shards must be sampled whose rows are recorded: by the manifest of this
        artifact, by `provenance` (of an artifact that is made again elsewhere), or by a sidecar of this attempt."""
        if self._recorded is not None:
            provenance = self._recorded.artifact.provenance
        if provenance is not None:
            return recorded_batches(provenance, missing)
        _, digests = self._inspect(table)
        lost = [shard for shard in missing if digests[shard]]
        return recorded_batches(provenance_of(unfinished_batches(self.path, table), max(lost, default=-1) + 1), lost)

    def commit(
        self,
        content: Mapping[str, str] | None = None,
        meta: Mapping[str, Any] | None = None,
        tables: Mapping[str, int] | None = None,
        provenance: Mapping[str, Any] | None = None,
        expected: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Publishes the manifest; the artifact is immutable from then on.

        `tables` maps a table to the shards expected; without it every table that has shards counts, from 0 without
        gaps. `content` adds digests to those of tables and trees; `provenance` adds what is recorded unhashed.
        `expected` are digests that its key was made from: InputError when they are others by now (a user's folder that
        changed meanwhile). If another process published first, its artifact is returned. Raises StoreError for missing shards,
        CorruptArtifact (artifact in quarantine) when a rebuilt part differs from what was recorded."""
        if self.committed is not None:
            return self.committed
        if self._closed:
            raise StoreError(f"{self._name}: its lock was released; commit inside `Store.building`")
        plain_meta, plain_provenance = self._plain("meta", meta), self._plain("provenance", provenance)
        failpoint("builder.before_collect")
        shards = self._collect(tables)
        failpoint("builder.before_trees")
        found, rows = self._table_content(shards)
        trees = self._collect_trees(found)
        clash = sorted(set(found) & set(content or {}))
        if clash:
            raise StoreError(f"{self._name}: content {clash} is computed by the store; give it another name")
        found.update(content or {})
        for name, digest in (expected or {}).items():
            if found.get(name) != digest:
                places = ", ".join(map(str, self._external.values())) or self._name
                raise InputError(f"{places}: changed while it was read; let nothing write to it, and run again")
        self.made = found
        manifest = self._manifest(shards, trees, found, rows, plain_meta, plain_provenance)
        failpoint("builder.before_publish")
        self.committed = self._publish(manifest)
        for path in unfinished_work(self.path):
            remove(path)
        return self.committed

    def close(self) -> None:
        """Called when the lock is released: nothing can be committed afterwards, and unfinished trees are removed."""
        self._closed = True
        for path in (*self._temporary.values(), *self._scratch):
            shutil.rmtree(path, ignore_errors=True)

    # --- shards ------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"{self.stage}/{self.key}"

    def _inspect(self, table: str) -> tuple[dict[int, ShardRecord], dict[int, set[str]]]:
        """(good shards, every row digest ever recorded per shard) of one table."""
        good: dict[int, ShardRecord] = {}
        digests: dict[int, set[str]] = defaultdict(set)
        for path, record in self._records(table):
            if record is None:
                self._distrust(path, "its sidecar is unreadable or belongs to another file")
                continue
            if record.schema_version != self.table_schema(table).version and not self._is_recorded(record):
                self._distrust(path, f"written with schema version {record.schema_version}")
                continue
            digests[record.shard].add(record.row_digest)
            problem = check_file(path, record.bytes, record.sha256)
            if problem is None:
                good[record.shard] = record
            elif problem != "missing":  # the sidecar stays: the rebuilt shard must reproduce its rows
                quarantine(self.root, path, f"shard {record.shard} of {table}: {problem}")
        return good, digests

    def _records(self, table: str) -> list[tuple[Path, ShardRecord | None]]:
        found = {path: record for path, record in sidecars(self.path) if path.name.rsplit("-", 2)[0] == table}
        if self._recorded is not None:
            found.update({self.path / record.file: record for record in self._recorded.shards if record.table == table})
        return sorted(found.items())

    def _is_recorded(self, record: ShardRecord) -> bool:
        return record in self._recorded_shards

    def _distrust(self, path: Path, reason: str) -> None:
        quarantine(self.root, path, reason)
        quarantine(self.root, sidecar(path), reason)

    def _tables(self, tables: Mapping[str, int] | None) -> dict[str, int]:
        if self._recorded is not None:
            before = dict.fromkeys(self._recorded.artifact.rows, 0)
            for record in self._recorded.shards:
                before[record.table] += 1
            if tables is not None and dict(tables) != before:
                self._refuse(f"it had shards {before}, the rebuild has {dict(tables)}")
            return before
        if tables is not None:
            return dict(tables)
        found: dict[str, int] = {}
        for _, shard in sidecars(self.path):
            if shard is not None:
                found[shard.table] = max(found.get(shard.table, 0), shard.shard + 1)
        return found

    def _collect(self, tables: Mapping[str, int] | None) -> dict[str, list[ShardRecord]]:
        result = {}
        for table, count in sorted(self._tables(tables).items()):
            good, digests = self._inspect(table)
            for shard in range(count):
                if len(digests[shard]) > 1:
                    self._refuse(f"shard {shard} of {table} was rebuilt with other rows than the recorded ones")
            absent = [shard for shard in range(count) if shard not in good]
            if absent:
                raise StoreError(f"{self._name}: cannot commit, {table} lacks shards {absent[:10]} of {count}")
            result[table] = [good[shard] for shard in range(count)]
        return result

    def _table_content(self, shards: dict[str, list[ShardRecord]]) -> tuple[dict[str, str], dict[str, int]]:
        content = {
            table: combine_digests([(record.rows, record.row_digest) for record in records])
            for table, records in shards.items()
        }
        return content, {table: sum(record.rows for record in records) for table, records in shards.items()}

    # --- trees -------------------------------------------------------------------------------------------------------

    def _new_tree(self, name: str) -> None:
        check_name(name, "tree")
        if self.committed is not None:
            raise StoreError(f"{self._name}: already committed")
        if name in self._temporary or name in self._external:
            raise StoreError(f"{self._name}: tree {name!r} was begun twice")

    def _kept_trees(self) -> dict[str, TreeRecord]:
        """Recorded trees that are whole, by full hashes. Bad files found on the way go to quarantine."""
        kept = {}
        for name, tree in self._recorded.trees.items() if self._recorded is not None else ():
            memo = self._memo if tree.external else None
            bad = list(damaged_files(tree_directory(self.path, tree), tree, memo))
            if not bad:
                kept[name] = tree
            for path, problem in bad:
                if problem != "missing" and not tree.external:
                    quarantine(self.root, path, f"tree {name!r}: {problem}")
        return kept

    def _collect_trees(self, content: dict[str, str]) -> dict[str, TreeRecord]:
        """Hashes, fsyncs and renames the new trees; adds their digests to `content`."""
        trees = {}
        for name, temporary in self._temporary.items():
            with explain_full_disk(temporary):
                files = own_files(temporary)
                if not files:
                    raise StoreError(f"{self._name}: the tree {name!r} is empty")
                fsync_tree(temporary, files)
                final = self.path / f"{name}-{unique()}"
                failpoint("tree.before_rename", files[0])
                os.rename(temporary, final)
                failpoint("tree.after_rename", final / files[0].relative_to(temporary))
                fsync_directory(self.path)
            records = record_files(final, own_files(final), self._memo)
            trees[name] = TreeRecord(directory=final.name, external=False, files=records)
        for name, path in self._external.items():
            records = record_files(path, external_files(path), self._memo)
            if not records:
                raise InputError(f"{path}: an empty folder")
            trees[name] = TreeRecord(directory=str(path), external=True, files=records)
        for name, tree in self._kept_trees().items():
            trees.setdefault(name, tree)
        for name, tree in trees.items():
            found = content_digests(name, tree_directory(self.path, tree), tree.files, self._memo)
            clash = sorted(set(found) & set(content))
            if clash:
                raise StoreError(f"{self._name}: tree {name!r} and another part both have the content {clash}")
            content.update(found)
        return trees

    # --- manifest ----------------------------------------------------------------------------------------------------

    def _manifest(
        self,
        shards: dict[str, list[ShardRecord]],
        trees: dict[str, TreeRecord],
        content: dict[str, str],
        rows: dict[str, int],
        meta: dict[str, Any],
        extra: dict[str, Any],
    ) -> Manifest:
        records = tuple(record for table in shards.values() for record in table)
        if self._recorded is not None:
            before = self._recorded.artifact.content
            differing = sorted(name for name in before.keys() | content.keys() if before.get(name) != content.get(name))
            if differing:
                self._refuse(f"the rebuild has another content: {', '.join(differing)}")
            again = (*self._recorded.repaired, utc_now())
            changes = {"shards": records, "trees": trees, "repaired": again, "evicted": None}
            return self._recorded.model_copy(update=changes)
        artifact = Artifact(
            stage=self.stage,
            key=self.key,
            version=self.spec.version,
            content=content,
            rows=rows,
            meta=meta,
            identity=self.spec.identity,
            inputs=self.spec.inputs,
            created=utc_now(),
            seconds=round(time.monotonic() - self._started, 3),
            provenance={**provenance(), **extra},
        )
        tables, retention = self.spec.tables, self.spec.retention
        return Manifest(artifact=artifact, shards=records, trees=trees, tables=tables, retention=retention)

    def _plain(self, what: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
        """As it will be read back from JSON, so that the artifact is the same object before and after."""
        try:
            return dict(json.loads(canonical_json({what: dict(value or {})}))[what])
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self._name}: {what} must be plain JSON, null for a missing number ({error})") from error

    def _publish(self, manifest: Manifest) -> Artifact:
        path = self.path / MANIFEST
        if self._recorded is not None:
            replace_atomically(path, manifest.dump())
            self._sweep(manifest)
            return manifest.artifact
        if publish_exclusively(path, manifest.dump()):
            return manifest.artifact
        winner = load_manifest(self.path)
        if winner is None:
            raise StoreError(f"{self._name}: its manifest vanished while it was being committed; run again")
        return winner.artifact

    def _refuse(self, what: str) -> NoReturn:
        quarantine(self.root, self.path, f"not reproduced: {what}")
        before = " after `opd gc` had evicted its data" if self._recorded and self._recorded.evicted else ""
        raise CorruptArtifact(
            f"{self._name}{before}: {what}. The artifact is in quarantine ({self.root / 'quarantine'}); run again to rebuild it"
            " whole. If this repeats, the stage is not deterministic on this machine"
        )

    def _sweep(self, manifest: Manifest | None) -> None:
        """Removes what a killed builder left: temporary files, trees and shards that no manifest or sidecar names."""
        keep = {MANIFEST}
        if manifest is not None:
            keep |= {record.file for record in manifest.shards}
            keep |= {tree.directory for tree in manifest.trees.values() if not tree.external}
        for path in self.path.iterdir():
            if path.name in keep or path.name.startswith(CHECKPOINT) or path.name == INTERMEDIATE:
                continue
            if path.name.endswith((SIDECAR, MADE_AT, BATCH)) and not path.name.startswith(TEMPORARY):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif not sidecar(path).exists():
                path.unlink(missing_ok=True)
