"""Verification without remembered hashes: every byte that a run depends on is hashed again.

Damaged files move to quarantine with the reason, and the next run rebuilds only these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from storage.artifacts.artifact import (
    KEY,
    MANIFEST,
    FileRecord,
    Manifest,
    ShardRecord,
    artifact_directory,
    load_manifest,
)
from storage.artifacts.digests import combine_digests
from storage.artifacts.shards import read_parquet, row_digest
from storage.artifacts.trees import added_files, content_digests, damaged, tree_directory
from storage.disk.files import quarantine
from storage.errors import CorruptArtifact, StoreError
from storage.identity import artifact_key
from storage.runs import Run

Name = tuple[str, str]
"""Stage and key of an artifact."""


@dataclass(frozen=True)
class Problem:
    """One damaged piece. `ours`: it is in the store and may be moved; a file in a user's own folder may not."""

    path: Path
    reason: str
    artifact: str
    ours: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass
class Verified:
    """Counts and problems of a verification. Of `evicted` artifacts only the manifests were verified."""

    artifacts: int = 0
    evicted: int = 0
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify_artifact(root: Path, stage: str, key: str, into: Verified) -> Manifest | None:
    """Hashes an artifact's manifest, shards (bytes and rows) and trees; returns the manifest if it is readable."""
    directory = artifact_directory(root, stage, key)
    manifest = _manifest(directory, into)
    while manifest is not None:
        count, problems = _Count(), list[Problem]()
        if manifest.evicted is None:
            problems = [*_shards(directory, manifest, count), *_trees(directory, manifest, count)]
        problems += _manifest_itself(directory, manifest)
        again = load_manifest(directory) if problems else manifest
        if again == manifest:
            break
        manifest = again  # repaired or collected during verification
    if manifest is not None:
        into.files, into.bytes = into.files + count.files, into.bytes + count.bytes
        into.problems += problems
        into.evicted += manifest.evicted is not None
    into.artifacts += 1
    return manifest


def verify_run(root: Path, run: Run, into: Verified, progress: Callable[[str], None]) -> None:
    """Verifies the run's own files, all artifacts that its rounds used, and the artifacts these were made from.

    `progress` is called with each artifact's name before it is verified."""
    own = _run_files(run, into)
    waiting = sorted(own)
    seen: set[Name] = set()
    manifests: dict[Name, Manifest] = {}
    while waiting:
        for stage, key in waiting:
            progress(f"{stage}/{key}")
            manifest = verify_artifact(root, stage, key, into)
            if manifest is not None:
                manifests[stage, key] = manifest
        seen |= set(waiting)
        waiting = sorted(_makers(root, manifests.values(), seen))
    _students(run, manifests, into)


def verify_store(root: Path, into: Verified, progress: Callable[[str], None]) -> None:
    """Verifies every committed artifact and every run's own files."""
    names = all_artifacts(root)
    for run in Run.list(root):
        names |= _run_files(run, into)
    for stage, key in sorted(names):
        progress(f"{stage}/{key}")
        verify_artifact(root, stage, key, into)


def move_damaged(root: Path, problems: Iterable[Problem]) -> int:
    """Moves damaged pieces in the store to quarantine; returns how many were moved."""
    return sum(problem.ours and quarantine(root, problem.path, problem.reason) is not None for problem in problems)


def all_artifacts(root: Path) -> set[Name]:
    """(stage, key) of every artifact with a manifest."""
    paths = (root / "artifacts").glob(f"[!.]*/*/{MANIFEST}")
    return {(p.parent.parent.name, p.parent.name) for p in paths if KEY.fullmatch(p.parent.name)}


@dataclass
class _Count:
    files: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        self.files, self.bytes = self.files + 1, self.bytes + size


def _manifest(directory: Path, into: Verified) -> Manifest | None:
    name = f"{directory.parent.name}/{directory.name}"
    try:
        manifest = load_manifest(directory)
    except CorruptArtifact as error:
        into.problems.append(Problem(directory / MANIFEST, str(error).removeprefix(f"{directory / MANIFEST}: "), name))
        return None
    if manifest is None:
        into.problems.append(Problem(directory / MANIFEST, "missing, but a run used this artifact", name))
        return None
    into.files, into.bytes = into.files + 1, into.bytes + (directory / MANIFEST).stat().st_size
    return manifest


def _shards(directory: Path, manifest: Manifest, count: _Count) -> list[Problem]:
    found = []
    for record in manifest.shards:
        path = directory / record.file
        file = FileRecord(path=record.file, sha256=record.sha256, bytes=record.bytes, mtime_ns=record.mtime_ns)
        problem = damaged(path, file, None) or _wrong_rows(path, record)
        count.add(record.bytes)
        if problem is not None:
            found.append(Problem(path, problem, str(manifest.artifact)))
    return found


def _wrong_rows(path: Path, record: ShardRecord) -> str | None:
    try:
        rows = read_parquet(path)
    except (CorruptArtifact, FileNotFoundError) as error:
        return str(error)
    if (rows.num_rows, row_digest(record.table, rows)) != (record.rows, record.row_digest):
        return "its rows differ from the recorded ones"
    return None


def _trees(directory: Path, manifest: Manifest, count: _Count) -> list[Problem]:
    found: list[Problem] = []
    for name, tree in manifest.trees.items():
        base, ours = tree_directory(directory, tree), not tree.external
        bad = []
        for record in tree.files:
            count.add(record.bytes)
            problem = damaged(base / record.path, record, None)
            if problem is not None:
                bad.append(Problem(base / record.path, problem, str(manifest.artifact), ours))
        try:
            added = added_files(base, tree)
        except StoreError as error:  # a link to files outside the store
            found.append(Problem(base, str(error), str(manifest.artifact)))
            continue
        bad += [Problem(path, f"does not belong to the tree {name!r}", str(manifest.artifact), ours) for path in added]
        if not bad:
            digests = content_digests(name, base, tree.files, None)
            wrong = [part for part, digest in digests.items() if manifest.artifact.content.get(part) != digest]
            bad = [
                Problem(directory / MANIFEST, f"content {part!r} does not match the tree", str(manifest.artifact))
                for part in wrong
            ]
        found += bad
    return found


def _manifest_itself(directory: Path, manifest: Manifest) -> list[Problem]:
    artifact, path = manifest.artifact, directory / MANIFEST
    found = []
    for table in artifact.rows:
        records = sorted((s for s in manifest.shards if s.table == table), key=lambda record: record.shard)
        if combine_digests([(r.rows, r.row_digest) for r in records]) != artifact.content.get(table):
            found.append(Problem(path, f"content {table!r} does not match its shards", str(manifest.artifact)))
    if artifact_key(artifact.stage, artifact.version, artifact.identity, artifact.inputs) != artifact.key:
        found.append(Problem(path, "its key does not match its identity and inputs", str(manifest.artifact)))
    return found


def _run_files(run: Run, into: Verified) -> set[Name]:
    """Reads the run's files; returns the artifacts of its finished stages."""
    for part in ("experiment", "identity"):
        try:
            getattr(run, part)
        except CorruptArtifact as error:
            path, _, reason = str(error).partition(": ")
            into.problems.append(Problem(Path(path), reason, f"run {run.name}", ours=False))
    try:
        state = run.state
    except CorruptArtifact as error:
        path, _, reason = str(error).partition(": ")
        into.problems.append(Problem(Path(path), reason, f"run {run.name}", ours=False))
        return set()
    finished = (stage for round in state.rounds for stage in round.stages.values() if stage.state in ("done", "cached"))
    return {name for stage in finished for name in stage.artifacts.items()}


def _makers(root: Path, manifests: Iterable[Manifest], seen: set[Name]) -> set[Name]:
    """Artifacts that contain an input of `manifests` which `manifests` do not contain."""
    manifests = list(manifests)
    held = {digest for manifest in manifests for digest in manifest.artifact.content.values()}
    wanted = {digest for manifest in manifests for digest in manifest.artifact.inputs.values()} - held
    found = set()
    for name in all_artifacts(root) - seen if wanted else ():
        try:
            manifest = load_manifest(artifact_directory(root, *name))
        except CorruptArtifact:
            continue
        if manifest is not None and wanted & set(manifest.artifact.content.values()):
            found.add(name)
    return found


def _students(run: Run, manifests: dict[Name, Manifest], into: Verified) -> None:
    """Every round's student must be in one of the run's artifacts."""
    held = {manifest.artifact.content.get("weights") for manifest in manifests.values()}
    if any(problem.artifact == f"run {run.name}" for problem in into.problems):
        return
    damaged_ones = {problem.artifact for problem in into.problems}
    for round in run.state.rounds:
        names = {f"{stage}/{key}" for record in round.stages.values() for stage, key in record.artifacts.items()}
        if round.student_sha256 and round.student_sha256 not in held and not names & damaged_ones:
            reason = f"round {round.round} names a student {round.student_sha256[:16]} that is in none of its artifacts"
            into.problems.append(Problem(run.directory / "state.json", reason, f"run {run.name}", ours=False))
