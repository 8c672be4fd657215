"""The artifact store: the interface to all results of stages.

Layout under the root: `artifacts/<stage>/<key>/` (unfinished without `manifest.json`, immutable with it), `runs/`,
`quarantine/`, `locks/`, `memo/` (remembered file hashes). Readers use manifests, never directory listings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from storage.artifacts.artifact import (
    MANIFEST,
    Artifact,
    ArtifactSpec,
    Manifest,
    ShardRecord,
    TreeRecord,
    artifact_directory,
    load_manifest,
)
from storage.artifacts.builder import Builder, unfinished_work
from storage.artifacts.digests import in_threads
from storage.artifacts.shards import ShardWriter, check_file, footer_problem, read_parquet
from storage.artifacts.summary import Summary, summary
from storage.artifacts.trees import added_files, damaged, damaged_by_stat, tree_directory
from storage.artifacts.verify import Verified, move_damaged, verify_artifact
from storage.disk.files import (
    explain_full_disk,
    fsync_directory,
    make_directory,
    quarantine,
    remove,
    remove_leftovers,
    require_space,
    scheme,
)
from storage.disk.locks import alone, build_lock, locked, probe, shared, use_lock
from storage.disk.remote import Remote, mirrored
from storage.errors import CorruptArtifact, Evicted, InputError, OpdError, StoreError
from storage.runs import find_use
from storage.schemas import TableSchema

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

__all__ = ["Artifact", "ArtifactSpec", "Builder", "ReadShard", "ShardRecord", "ShardWriter", "Store"]

ReadShard = Callable[[Sequence[str] | None], pa.Table]
"""Reads the named columns of one shard (None: all)."""
Shards = list[ShardRecord]
_Found = TypeVar("_Found", Manifest, Summary)
Problems = list[str]
_AGAIN = "run again; only the damaged part is rebuilt"


class Store:
    """A store in a local directory, which is created if missing.

    Raises StoreError if the file system has no working flock or hard links."""

    def __init__(self, root: Path | str) -> None:
        """InputError for a root that looks like a URL, StoreError for one that cannot hold a store."""
        if found := scheme(root):
            raise InputError(f"{root}: a store is a folder of this machine, found one with {found}; give its path")
        self.root = Path(root).expanduser().absolute()
        try:
            for name in ("artifacts", "runs", "quarantine", "locks", "memo"):
                make_directory(self.root / name)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise StoreError(f"{self.root}: cannot create a store here ({error.strerror}: {error.filename})") from error
        probe(self.root)
        self._memo = self.memo = self.root / "memo"
        self.remote: Remote | None = mirrored(self.root)
        """Where the files are, if this folder only mirrors the records of a remote; it is then only read."""

    # --- planning ----------------------------------------------------------------------------------------------------

    def get(self, stage: str, key: str) -> Artifact | None:
        """The artifact if it is committed and its files have their recorded size and time, else None.

        An evicted artifact is returned too: its content is known, and only readers need its data (see `evicted`). A file with
        another time stamp (a copied store) is hashed. Nothing is moved. Trees outside the store are not checked here;
        `materialize` checks them."""
        directory = artifact_directory(self.root, stage, key)
        try:
            found = summary(directory, self._memo)
            if found is None:
                return None
            if found.evicted is None and self.remote is None and not found.unchanged(directory):
                manifest = found.manifest or load_manifest(directory)
                if manifest is None or self._damage(manifest) is not None:
                    return None
        except CorruptArtifact:
            return None
        return found.artifact

    def require(self, stage: str, key: str) -> Artifact:
        """The same. CorruptArtifact where it is not committed, or damaged."""
        artifact = self.get(stage, key)
        if artifact is None:
            raise CorruptArtifact(f"{stage}/{key}: not committed in {self.root}, or damaged; run again")
        return artifact

    def evicted(self, artifact: Artifact) -> str | None:
        """Time at which `opd gc` removed its data; None if the data is there. CorruptArtifact if it is not committed."""
        return self._summary(artifact).evicted

    def size(self, artifact: Artifact) -> int:
        """Bytes of its files in the store: none of a user's own folder, or once `opd gc` removed its data."""
        return self._summary(artifact).bytes

    def shard_count(self, artifact: Artifact) -> int:
        """Shards of all its tables."""
        return self._summary(artifact).shards

    def list(self, stage: str | None = None) -> list[Artifact]:
        """All committed and undamaged artifacts, evicted ones included, oldest first."""
        found = []
        for path in (self.root / "artifacts").glob(f"{stage or '*'}/*/{MANIFEST}"):
            try:
                artifact = self.get(path.parent.parent.name, path.parent.name)
            except StoreError:  # not an artifact's folder
                continue
            if artifact is not None:
                found.append(artifact)
        return sorted(found, key=lambda artifact: (artifact.created, artifact.stage, artifact.key))

    def require_space(self, bytes_needed: int, purpose: str = "") -> None:
        """Raises NotEnoughSpace unless that many bytes are free under the root."""
        require_space(self.root, bytes_needed, purpose)

    def remove_leftovers(self, mine: bool = False) -> None:
        """Removes what killed processes of this machine left: temporary files, and files of committed artifacts that only an
        unfinished artifact needs. With `mine` also this process's own, after an interruption. Artifacts that another process
        is building are left alone."""
        remove_leftovers(self.root, mine=mine)
        for directory in sorted({path.parent for path in unfinished_work(self.root / "artifacts", "[!.]*/*/")}):
            if not (directory / MANIFEST).exists():
                continue
            stage, key = directory.parent.name, directory.name
            # OpdError: not an artifact's folder
            with suppress(OpdError), alone(build_lock(self.root, stage, key)) as ours:
                artifact = self.get(stage, key) if ours else None
                if artifact is None or self.evicted(artifact) is not None:
                    continue  # a later rebuild continues from these files
                for path in unfinished_work(directory):
                    remove(path)

    @contextmanager
    def using(self, artifacts: Iterable[Artifact]) -> Iterator[None]:
        """In the block `opd gc` does not touch these artifacts: an artifact found whole in it stays whole."""
        with ExitStack() as stack:
            for stage, key in sorted({(artifact.stage, artifact.key) for artifact in artifacts}):
                stack.enter_context(shared(use_lock(self.root, stage, key)))
            yield

    # --- building ----------------------------------------------------------------------------------------------------

    @contextmanager
    def building(self, spec: ArtifactSpec, waiting: Callable[[str], None] | None = None) -> Iterator[Builder]:
        """Holds the artifact's lock and yields its builder. If another process is building it, `waiting` is called once
        with that process's description; afterwards `builder.committed` is its result.

        To build several artifacts at once, enter them in sorted (stage, key) order, otherwise two runs may wait for each
        other. An exception leaves the artifact unfinished; its finished shards are used next time."""
        if self.remote is not None:
            raise InputError(f"{self.remote}: is only read here; pull its runs into a store to go on with them")
        directory = artifact_directory(self.root, spec.stage, spec.key)
        with locked(build_lock(self.root, spec.stage, spec.key), waiting or (lambda holder: None)):
            builder = self._builder(spec, directory)
            try:
                yield builder
            finally:
                builder.close()

    def _builder(self, spec: ArtifactSpec, directory: Path) -> Builder:
        committed = self.get(spec.stage, spec.key)
        if committed is not None and self.evicted(committed) is not None:
            committed = None
        recorded = None
        if committed is None:
            with explain_full_disk(directory):
                directory.mkdir(parents=True, exist_ok=True)
                fsync_directory(directory.parent)
                fsync_directory(directory.parent.parent)  # for a stage's first artifact
            try:
                recorded = load_manifest(directory)
            except CorruptArtifact as error:
                quarantine(self.root, directory / MANIFEST, str(error))
        return Builder(self.root, spec, committed, recorded)

    def shard_writer(self, stage: str, key: str) -> ShardWriter:
        """A shard writer for worker processes. The parent process must hold the artifact's lock."""
        return ShardWriter(self.root, stage, key)

    # --- tables ------------------------------------------------------------------------------------------------------

    def shards(self, artifact: Artifact, table: str) -> Shards:
        """The shards of a table, in order. StoreError for a table that the artifact does not have."""
        return self._shards(self._manifest(artifact), table)

    def shard_files(self, artifact: Artifact, table: str) -> Sequence[Path]:
        """The files of a table's shards, in order; nothing is verified. Evicted where `opd gc` removed the data."""
        self.require_data(artifact)
        records = self.shards(artifact, table)
        for record in records:
            self._fetch(artifact, record)
        return [self._directory(artifact) / record.file for record in records]

    def table_schemas(self, artifact: Artifact) -> dict[str, TableSchema]:
        """The declarations of its tables, those of plugins from its manifest."""
        found = self._summary(artifact)
        return {table: found.table_schema(table) for table in found.artifact.rows}

    def read_table(self, artifact: Artifact, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a table in shard order. Each file's full hash is verified the first time in this process, page
        checksums every time; a bad file moves to quarantine and CorruptArtifact is raised. Evicted where `opd gc` removed
        the data."""
        manifest = self._manifest(artifact)
        records = self._shards(manifest, table)
        empty = manifest.table_schema(table).arrow.empty_table()
        if columns is not None:
            unknown = [name for name in columns if name not in empty.column_names]
            if unknown:
                raise StoreError(f"table {table!r}: no column {unknown[0]!r}; it has {', '.join(empty.column_names)}")
            empty = empty.select(list(columns))
        self.require_data(artifact)
        parts = [self._read(artifact, record, columns) for record in records]
        # an earlier version's shards beside those made now: a column may have become nullable
        return pa.concat_tables(parts, promote_options="default") if parts else empty

    def read_shard(self, artifact: Artifact, table: str, shard: int) -> pa.Table:
        """One shard, verified like `read_table`."""
        records = self.shards(artifact, table)
        if not 0 <= shard < len(records):
            raise StoreError(f"{artifact}: {table} has {len(records)} shards, there is no shard {shard}")
        self.require_data(artifact)
        return self._read(artifact, records[shard], None)

    def shard_readers(self, artifact: Artifact, table: str) -> Sequence[ReadShard]:
        """A function per shard of a table, in order, that reads it, verified like `read_table`. A table without shards has one
        function, for no rows. Evicted where `opd gc` removed the data."""
        manifest = self._manifest(artifact)
        records, empty = self._shards(manifest, table), manifest.table_schema(table).arrow.empty_table()
        self.require_data(artifact)
        if not records:
            return [lambda columns: empty if columns is None else empty.select(list(columns))]
        return [partial(self._read, artifact, record) for record in records]

    def arrow_dataset(self, artifact: Artifact, table: str) -> Dataset:
        """A lazy dataset for queries. Footers are verified now, those of a remote when a scan opens their file; page checksums
        during the scan. Scanning evicted shards raises FileNotFoundError; shards that a filter excludes are not opened."""
        from storage.artifacts.datasets import absent_dataset, dataset

        directory = self._directory(artifact)
        manifest = self._manifest(artifact)
        records, schema = self._shards(manifest, table), manifest.table_schema(table).arrow
        if manifest.evicted is not None:
            return absent_dataset([directory / f"{r.file} (evicted)" for r in records], schema)
        folder = str(directory) if self.remote is None else self.remote.at(f"artifacts/{artifact.stage}/{artifact.key}")
        footers = {f"{folder}/{record.file}": record.footer_sha256 for record in records}
        if self.remote is None:
            for path, recorded in footers.items():
                if (problem := footer_problem(Path(path), recorded)) is not None:
                    self._bad_file(artifact, Path(path), problem)
        return dataset(footers, schema, self.remote.fs if self.remote is not None else None)

    # --- trees -------------------------------------------------------------------------------------------------------

    def materialize(self, artifact: Artifact, name: str = "model") -> Path:
        """A local directory with the tree's files. Every hash is verified again; hashes of a user's own folder are remembered by
        path, inode, size and mtime, which cannot detect a bit flipped by the disk.

        Raises CorruptArtifact for a damaged file of the store, after moving it to quarantine; InputError for a changed or
        added file in a user's own folder; Evicted if `opd gc` removed the tree. Added files in the store's tree move to
        quarantine, because engines would read them."""
        if self.remote is not None:
            raise InputError(f"{self.remote}: is only read here; to use its models: opd pull NAME {self.remote}")
        self.require_data(artifact)
        tree = self._tree(self._manifest(artifact), name)
        directory, memo = tree_directory(self._directory(artifact), tree), self._memo if tree.external else None
        size = sum(record.bytes for record in tree.files)
        problems = in_threads(lambda record: damaged(directory / record.path, record, memo), tree.files, size)
        for record, problem in zip(tree.files, problems, strict=True):
            if problem is None:
                continue
            if tree.external:
                raise InputError(
                    f"{directory / record.path}: {problem}. The folder has changed since {artifact} recorded it: restore the old"
                    " files, or put the new ones into another folder and name that in the config"
                )
            self._bad_file(artifact, directory / record.path, problem)
        for path in added_files(directory, tree):
            if tree.external:
                raise InputError(f"{path}: was not there when {artifact} recorded this folder; move it away")
            quarantine(self.root, path, f"does not belong to the tree {name!r} of {artifact}")
        return directory

    def folder(self, artifact: Artifact, name: str = "model") -> Path | None:
        """The folder of a tree, unverified; None if the artifact or the folder is not there. For planning: readers use
        `materialize`."""
        try:
            manifest = load_manifest(self._directory(artifact))
        except (CorruptArtifact, StoreError):
            return None
        if manifest is None or name not in manifest.trees:
            return None
        directory = tree_directory(self._directory(artifact), manifest.trees[name])
        return directory if directory.is_dir() else None

    # --- damage ------------------------------------------------------------------------------------------------------

    def quarantine(self, path: Path, reason: str) -> Path | None:
        """Moves a file or directory of the store to `quarantine/`, with the reason beside it. None if it no longer exists."""
        return quarantine(self.root, path, reason)

    def verify(self, artifact: Artifact, move: bool = True) -> Problems:
        """Hashes everything without remembered hashes, and returns the problems. Damaged files move to quarantine unless `move`
        is False; a later run rebuilds only these."""
        verified = Verified()
        verify_artifact(self.root, artifact.stage, artifact.key, verified)
        if move:
            move_damaged(self.root, verified.problems)
        return [str(problem) for problem in verified.problems]

    def _damage(self, manifest: Manifest) -> str | None:
        """The first damage that stat stamps show, or None."""
        directory = self._directory(manifest.artifact)
        stamps = [(directory / s.file, s.bytes, s.mtime_ns, s.sha256) for s in manifest.shards]
        for tree in manifest.trees.values():
            if not tree.external:
                base = tree_directory(directory, tree)
                stamps += [(base / file.path, file.bytes, file.mtime_ns, file.sha256) for file in tree.files]
        for path, size, mtime_ns, sha256 in stamps:
            problem = damaged_by_stat(path, size, mtime_ns, sha256, self._memo)
            if problem is not None:
                return f"{path}: {problem}"
        return None

    def _bad_file(self, artifact: Artifact, path: Path, problem: str) -> None:
        moved = quarantine(self.root, path, problem)
        where = f"moved to {moved}; " if moved else ""
        raise CorruptArtifact(f"{path}: {problem}; {where}{_AGAIN}")

    def _fetch(self, artifact: Artifact, record: ShardRecord) -> Path:
        """The shard's file; of a mirrored remote it is fetched first."""
        path = self._directory(artifact) / record.file
        if self.remote is not None and not path.exists():
            name = f"artifacts/{artifact.stage}/{artifact.key}/{record.file}"
            self.remote.download(name, path, path.parent, record.bytes, record.sha256)
        return path

    def _read(self, artifact: Artifact, record: ShardRecord, columns: Sequence[str] | None) -> pa.Table:
        path = self._fetch(artifact, record)
        problem = check_file(path, record.bytes, record.sha256)
        if problem is None:
            try:
                rows = read_parquet(path, columns)
                if rows.num_rows == record.rows:
                    return rows
                problem = f"{rows.num_rows} rows instead of {record.rows}"
            except (CorruptArtifact, FileNotFoundError) as error:
                problem = str(error)
        self._bad_file(artifact, path, problem)
        raise AssertionError("unreachable")

    # --- manifests ---------------------------------------------------------------------------------------------------

    def _directory(self, artifact: Artifact) -> Path:
        return artifact_directory(self.root, artifact.stage, artifact.key)

    def _manifest(self, artifact: Artifact) -> Manifest:
        return self._as_planned(artifact, load_manifest(self._directory(artifact)))

    def _summary(self, artifact: Artifact) -> Summary:
        return self._as_planned(artifact, summary(self._directory(artifact), self._memo))

    def _as_planned(self, artifact: Artifact, found: _Found | None) -> _Found:
        if found is None:
            raise CorruptArtifact(f"{artifact}: not committed in {self.root}, or in quarantine; {_AGAIN}")
        if found.artifact.content != artifact.content:
            raise CorruptArtifact(f"{artifact}: was rebuilt with other content after planning; run again")
        return found

    def require_data(self, artifact: Artifact) -> None:
        """Raises Evicted, with the command that rebuilds it, if `opd gc` removed the data."""
        when = self.evicted(artifact)
        if when is None:
            return
        use = find_use(self.root, artifact.stage, artifact.key)
        command = f"opd restore {use[0]} --round {use[1]}" if use else "run the stage that made it"
        raise Evicted(f"{artifact}: its data was evicted at {when} (opd gc). To rebuild it: {command}")

    def _shards(self, manifest: Manifest, table: str) -> Shards:
        if table not in manifest.artifact.rows:
            has = ", ".join(sorted(manifest.artifact.rows)) or "none"
            raise StoreError(f"{manifest.artifact}: has no table {table!r}; its tables: {has}")
        return sorted((s for s in manifest.shards if s.table == table), key=lambda record: record.shard)

    def _tree(self, manifest: Manifest, name: str) -> TreeRecord:
        if name not in manifest.trees:
            has = ", ".join(sorted(manifest.trees)) or "none"
            raise StoreError(f"{manifest.artifact}: has no tree {name!r}; its trees: {has}")
        return manifest.trees[name]
