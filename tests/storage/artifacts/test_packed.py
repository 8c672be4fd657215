"""Packed top-K lists: what comes back, within which bound, and that shards of them are shards like any other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_store import flip, fresh
from top_k_lists import lists_of

from storage.artifacts import shards
from storage.artifacts.packed import KL_BOUND, STEP, pack, packed_schema, parts, unpack
from storage.errors import CorruptArtifact, StoreError
from storage.schemas import TABLES, Column, schema_for, validate_table
from storage.store import ArtifactSpec, Store
from storage.upkeep.gc import evict

FLOAT32 = 2.0**-22
"""Relative rounding of a value, its origin and its steps."""


def numbers(table: pa.Table, column: str) -> np.ndarray:
    array = table[column].combine_chunks()
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).astype(np.float64)


def assert_within_bounds(before: pa.Table, after: pa.Table) -> None:
    assert after.schema.equals(before.schema)
    for name in ("sample_id", "ids", "valid"):
        assert after[name].to_pylist() == before[name].to_pylist()
    counts = numbers(before, "valid").astype(int)
    for name in (name for name in before.column_names if name.endswith("logprobs")):
        tail = name.removesuffix("logprobs") + "tail_logmass"
        assert pa.compute.list_value_length(after[name]).equals(pa.compute.list_value_length(before[name]))
        entries, kept = numbers(before, name), numbers(after, name)
        x_tail, y_tail = numbers(before, tail), numbers(after, tail)
        edges = np.concatenate([[0], np.cumsum(counts)])
        for n, (first, last) in enumerate(pairwise(edges)):
            x, y = np.append(entries[first:last], x_tail[n]), np.append(kept[first:last], y_tail[n])
            if np.isnan(x_tail[n]):
                assert np.isnan(y).all()
                continue
            assert (np.isneginf(x) == np.isneginf(y)).all()
            there = np.isfinite(x)
            far = x[there] < x.max() - 499
            assert (y[there][far] < y.max() - 498).all()
            off = x[there] - y[there]
            gap = np.abs(off)[~far]
            assert gap.max(initial=0) <= STEP + FLOAT32 * (np.abs(x[there]).max() + 1)
            p, q = np.exp(x), np.exp(y)
            assert q.sum() == pytest.approx(p.sum(), abs=1e-5)
            assert (p[there] * off).sum() <= KL_BOUND + 1e-5
            assert name.startswith("teacher_") or (np.diff(y[:-1][np.isfinite(y[:-1])]) <= 0).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 5), max_size=4),
    k=st.sampled_from([1, 2, 64, 300]),
    scale=st.sampled_from([0.0, 1.0, 9.0, 400.0]),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    table=st.sampled_from(["teacher_topk", "student_topk"]),
)
@example(seed=0, lengths=[], k=1, scale=1.0, zeros=0.0, table="teacher_topk")
@example(seed=0, lengths=[0, 0], k=1, scale=1.0, zeros=0.0, table="student_topk")
def test_ids_come_back_exactly_and_log_probabilities_within_the_bound(seed, lengths, k, scale, zeros, table):
    before = lists_of(np.random.Generator(np.random.PCG64(seed)), lengths, k, scale, zeros, table)
    packed = pack(TABLES[table], before)
    layout = packed_schema(TABLES[table])
    assert validate_table(table, packed, layout).schema.equals(layout.arrow)
    names = packed.column_names
    after = validate_table(table, unpack(packed, before.column_names, names))
    assert_within_bounds(before, after)
    for row in range(len(lengths)):  # depends on no other row
        part = unpack(packed.slice(row, 1), before.column_names, names)
        assert shards.row_digest(table, part) == shards.row_digest(table, after.slice(row, 1))


def test_the_worst_case_of_the_divergence_is_within_its_bound():
    """Half of the mass rounds up by half a step, the other half down."""
    gaps = np.array([0.0, STEP * 0.499, STEP * 10.501, STEP * 10.499])
    x = -gaps - np.logaddexp.reduce(-gaps)
    row = {"sample_id": "s", "ids": [[1, 2, 3]], "logprobs": [np.sort(x[:3])[::-1].tolist()], "valid": [3]}
    before = pa.Table.from_pylist([row | {"tail_logmass": [float(x[3])]}], schema_for("teacher_topk"))
    packed = pack(TABLES["teacher_topk"], before)
    after = unpack(packed, before.column_names, packed.column_names)
    assert_within_bounds(before, after)
    q = np.append(numbers(after, "logprobs"), numbers(after, "tail_logmass"))
    p = np.append(numbers(before, "logprobs"), numbers(before, "tail_logmass"))
    assert KL_BOUND / 4 < (np.exp(p) * (p - q)).sum() < KL_BOUND


@pytest.mark.parametrize("table", ["teacher_topk", "student_topk"])
def test_a_file_has_the_same_bytes_each_time_and_gives_any_of_the_columns(table, tmp_path):
    before = lists_of(np.random.default_rng(1), [3, 0, 40], 16, 3.0, 0.1, table)
    packed = pack(TABLES[table], before)
    for name, rows in (("one", packed), ("two", pa.concat_tables([packed.slice(0, 1), packed.slice(1)]))):
        shards.write_parquet(validate_table(table, rows, packed_schema(TABLES[table])), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    whole = shards.read_parquet(tmp_path / "one")
    assert_within_bounds(before, validate_table(table, whole))
    for name in before.column_names:
        assert shards.read_parquet(tmp_path / "one", [name]).column_names == [name]
        assert shards.read_parquet(tmp_path / "one", [name])[name].to_pylist()[1] == whole[name].to_pylist()[1]
    assert pq.read_schema(tmp_path / "one").names == list(packed_schema(TABLES[table]).names)


def test_only_top_k_lists_can_be_packed():
    rows = lists_of(np.random.default_rng(1), [3], 4, 1.0, 0.0, "teacher_topk")
    assert [name for name in TABLES if packed_schema(TABLES[name])] == ["teacher_topk", "student_topk"]
    with pytest.raises(StoreError, match="mask"):
        pack(TABLES["mask"], rows)
    wrong = rows.set_column(3, schema_for("teacher_topk").field("valid"), pa.array([[9, 9, 9]], pa.list_(pa.int16())))
    with pytest.raises(StoreError, match="valid"):
        pack(TABLES["teacher_topk"], wrong)
    more = replace(TABLES["teacher_topk"], columns=(*TABLES["teacher_topk"].columns, Column("x", pa.string(), "")))
    assert packed_schema(more) is None
    assert set(parts(packed_schema(TABLES["student_topk"]).names)) == set(schema_for("student_topk").names)


def test_packed_shards_are_verified_and_rebuilt_like_others(tmp_path):
    """Two shards, one of each layout: what a run's store holds where an empty shard was written too."""
    store, table = Store(tmp_path), TABLES["teacher_topk"]
    plain, other = (lists_of(np.random.default_rng(n), [2, 3], 8, 2.0, 0.2, "teacher_topk") for n in (1, 2))
    spec = ArtifactSpec.of("teacher_topk", 1, {"encoding": "packed"}, {})

    def build() -> None:
        with store.building(spec) as builder:
            for shard, rows in ((0, plain), (1, pack(table, other))):
                if shard in builder.missing("teacher_topk", 2):
                    builder.write_shard("teacher_topk", shard, rows)
            builder.commit(tables={"teacher_topk": 2})

    build()
    made = store.require("teacher_topk", spec.key)
    assert store.verify(made) == []
    rows = store.read_table(made, "teacher_topk")
    assert repr(rows.slice(0, 2).to_pylist()) == repr(plain.to_pylist()) and rows.schema.equals(table.arrow)
    assert_within_bounds(other, rows.slice(2))
    assert store.read_table(made, "teacher_topk", ["valid"]).column_names == ["valid"]

    record = store.shards(made, "teacher_topk")[1]
    path = tmp_path / "artifacts" / "teacher_topk" / spec.key / record.file
    flip(path, path.stat().st_size // 2)
    with pytest.raises(CorruptArtifact):
        fresh(store).read_table(made, "teacher_topk")
    build()
    assert store.require("teacher_topk", spec.key).content == made.content
    evict(path.parent)
    build()
    assert store.require("teacher_topk", spec.key).content == made.content
    assert store.shards(made, "teacher_topk")[1].sha256 == record.sha256
