"""A table that is not this program's own: declared by the spec, kept in the manifest, read and collected by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest
from small_store import build, fresh

from storage.artifacts.artifact import MANIFEST, MANIFEST_FORMAT, ArtifactSpec, Retained, load_manifest
from storage.disk.files import seal, unseal
from storage.errors import CorruptArtifact, StoreError
from storage.query.catalog import Catalog
from storage.runs import RoundState, Run, StageState
from storage.schemas import TABLES, Column, TableSchema, type_of
from storage.store import Artifact, Store
from storage.upkeep.gc import evict
from storage.upkeep.retention import Retention, droppable

SAMPLE = Column("sample_id", pa.string(), "the sample")
ODDS = TableSchema("odds", "Odds of every token.", (SAMPLE, Column("odds", pa.list_(pa.float32()), "T numbers")), 2)
ROWS = pa.table({"sample_id": ["a", "b"], "odds": pa.array([[0.5, 1.0], []], pa.list_(pa.float32()))})


def spec(schema: TableSchema = ODDS, tag: str = "") -> ArtifactSpec:
    return ArtifactSpec.of("odds", 1, {"tag": tag}, {}, tables=(schema,), retention="signals")


def make(store: Store, schema: TableSchema = ODDS, rows: pa.Table = ROWS, tag: str = "") -> Artifact:
    asked = spec(schema, tag)
    with store.building(asked) as builder:
        for shard in builder.missing("odds", 2):  # one by a worker, which has no spec, one by the builder
            writer = builder if shard else store.shard_writer("odds", asked.key)
            writer.write_shard("odds", shard, rows, None if shard else schema)
        return builder.commit(tables={"odds": 2})


def directory(store: Store, artifact: Artifact) -> Path:
    return store.root / "artifacts" / artifact.stage / artifact.key


def test_the_manifest_says_what_the_table_is(store: Store) -> None:
    artifact = make(store)
    assert spec().key == ArtifactSpec.of("odds", 1, {"tag": ""}, {}).key == artifact.key  # tables enter no key
    manifest = load_manifest(directory(store, artifact))
    assert manifest is not None and manifest.retention == "signals"
    assert manifest.table_schema("odds") == replace(ODDS, prefixed=True)
    assert [record.schema_version for record in manifest.shards] == [2, 2]
    again = fresh(store)
    assert again.table_schemas(artifact) == {"odds": replace(ODDS, prefixed=True)}
    assert again.read_table(artifact, "odds")["odds"].to_pylist() == ROWS["odds"].to_pylist() * 2
    assert again.read_table(artifact, "odds", columns=["sample_id"]).num_rows == 4
    assert again.verify(artifact) == []


def test_a_lost_shard_is_rebuilt_and_an_evicted_artifact_too(store: Store) -> None:
    artifact = make(store)
    (directory(store, artifact) / store.shards(artifact, "odds")[1].file).unlink()
    assert make(fresh(store)).content == artifact.content
    evict(directory(store, artifact))
    assert unseal(directory(store, artifact) / MANIFEST)["format"] == MANIFEST_FORMAT
    assert make(fresh(store)).content == artifact.content and store.evicted(artifact) is None


def test_manifests_of_this_programs_own_tables_are_what_they_were(store: Store) -> None:
    artifact, _ = build(store)
    path = directory(store, artifact) / MANIFEST
    assert unseal(path)["format"] == 1
    assert not {"tables", "retention", "evicted"} & unseal(path).keys()
    evict(path.parent)
    assert unseal(path)["format"] == 2 and not {"tables", "retention"} & unseal(path).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": MANIFEST_FORMAT + 1}, "newer than this program's"),
        (
            {"tables": {"odds": {"doc": "", "version": 1, "columns": [{"name": "a", "type": "int31", "doc": ""}]}}},
            "int31",
        ),
        ({"retention": "forever"}, "retention"),
    ],
)
def test_a_manifest_that_this_program_cannot_read_is_refused(store: Store, change: dict, message: str) -> None:
    artifact = make(store)
    path = directory(store, artifact) / MANIFEST
    path.write_bytes(seal(unseal(path) | change))
    with pytest.raises((StoreError, CorruptArtifact), match=message):
        load_manifest(path.parent)


def test_declarations_that_do_not_fit_are_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="'mask' is one of this program's own"):
        ArtifactSpec.of("odds", 1, {}, {}, tables=(TABLES["mask"],))
    with pytest.raises(StoreError, match="column type timestamp"):
        spec(TableSchema("odds", "", (SAMPLE, Column("when", pa.timestamp("s"), ""))))
    for name in ("int31", "[]", "int32[", ""):
        with pytest.raises(ValueError, match="unknown column type"):
            type_of(name)
    with store.building(spec()) as builder, pytest.raises(StoreError, match="unknown column 'reward'"):
        builder.write_shard("odds", 0, ROWS.append_column("reward", pa.array([1.0, 2.0])))
    with pytest.raises(StoreError, match="'odds' is not declared"):
        store.shard_writer("odds", spec().key).write_shard("odds", 0, ROWS)


def test_a_view_per_table_of_its_newest_version(store: Store) -> None:
    old, new = make(store), make(store, replace(ODDS, version=3), tag="newer")
    views = Catalog(store).views().all
    assert views["odds"].doc == "Odds of every token. Version 3." and "odds" in views["supervision"].tables
    assert (
        [c.name for c in views["supervision"].columns][-1]
        == [c.name for c in views["tokens"].columns][-1]
        == "odds_odds"
    )
    found = Catalog(store).query("SELECT DISTINCT artifact FROM odds")["artifact"].to_pylist()
    assert found == [new.key]
    assert set(Catalog(store).query("SELECT artifact FROM artifacts")["artifact"].to_pylist()) == {old.key, new.key}
    hidden = TableSchema("tokens", "Not the view.", (SAMPLE,))
    with store.building(ArtifactSpec.of("other", 1, {}, {}, tables=(hidden,))) as builder:
        builder.write_shard("tokens", 0, pa.table({"sample_id": ["a"]}))
        builder.commit()
    assert Catalog(store).query("SELECT count(*) AS n FROM tokens")["n"].to_pylist() == [0]


def test_the_manifests_role_decides_what_can_be_dropped(store: Store) -> None:
    assert set(get_args(Retained)) == set(Retention.model_fields)
    run = Run.create(store.root, "r", {}, {})
    state = run.state
    stages = {"supervise": StageState(state="done", artifacts={"odds": "a" * 16, "other": "b" * 16})}
    state.rounds = [RoundState(round=n, stages=stages if n == 1 else {}, student_sha256="x") for n in (1, 2)]
    role = {("odds", "a" * 16): "signals"}.get
    assert droppable(state, Retention(signals=1), role) == {("odds", "a" * 16)}
    assert droppable(state, Retention(signals=1)) == set()
    assert droppable(state, Retention(signals=2), role) == set()
