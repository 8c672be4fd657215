"""Declared columns are what gets written, and nothing else gets through."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import StoreError
from storage.query.sql import duckdb_type
from storage.schemas import TABLES, MaskReason, declared, schema_for, type_name, type_of, validate_table

MASK = pa.table({"sample_id": ["a", "b"], "mask_reasons": pa.array([[0, 1], []], pa.list_(pa.int32()))})


@pytest.mark.parametrize("table", TABLES)
def test_every_table_survives_parquet_with_its_types(table, tmp_path):
    empty = schema_for(table).empty_table()
    pq.write_table(empty, tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet").schema.equals(schema_for(table))
    assert validate_table(table, empty).schema.equals(schema_for(table))


@pytest.mark.parametrize("table", TABLES)
def test_every_column_has_a_meaning_and_a_type_that_sql_reads(table):
    for column in TABLES[table].columns:
        assert column.doc, f"{table}.{column.name}"
        assert duckdb_type(column.type)
        assert type_of(type_name(column.type)) == column.type


@pytest.mark.parametrize("function", [schema_for, declared])
def test_an_undeclared_table_is_refused_with_the_declared_ones(function):
    with pytest.raises(StoreError, match=r"'rolouts' is not declared; there are .*rollouts"):
        function("rolouts")


def test_missing_nullable_columns_become_null_and_order_is_restored():
    row = {"tokenizer": ["student"], "special": [False], "token": ["a"], "id": pa.array([3], pa.int64())}
    written = validate_table("vocabulary", pa.table(row))
    assert written.to_pylist() == [{"tokenizer": "student", "id": 3, "token": "a", "text": None, "special": False}]
    assert written.schema.equals(schema_for("vocabulary"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.append_column("extra", pa.array([1, 2])), "unknown column 'extra'"),
        (lambda t: t.drop_columns(["mask_reasons"]), "'mask_reasons': missing"),
        (lambda t: t.set_column(0, "sample_id", pa.array(["a", None])), "'sample_id': 1 nulls"),
        (lambda t: t.set_column(1, "mask_reasons", pa.array([[1, None], []])), "1 nulls inside lists"),
        (lambda t: t.set_column(1, "mask_reasons", pa.array([[1 << 40], []])), "expected list<"),
        (lambda t: t.set_column(1, "mask_reasons", pa.array([[1.5], []])), "expected list<"),
        (lambda t: t.set_column(1, "mask_reasons", pa.array(["x", "y"])), "expected list<"),
        (lambda t: t.append_column("sample_id", t["sample_id"]), "given twice"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(StoreError, match=message):
        validate_table("mask", change(MASK))


def test_nulls_two_lists_deep_are_found():
    k = {"ids": [[[1, None]]], "logprobs": [[[0.0, 0.0]]], "valid": [[2]], "tail_logmass": [[-1.0]]}
    with pytest.raises(StoreError, match="'ids': 1 nulls inside lists"):
        validate_table("teacher_topk", pa.table({"sample_id": ["a"], **k}))


@given(st.lists(st.lists(st.integers(0, 31), max_size=5), max_size=6), st.integers(0, 6), st.integers(0, 6))
def test_validation_keeps_values_however_the_table_is_sliced_and_chunked(rows, cut, start):
    table = pa.table(
        {"sample_id": [str(i) for i in range(len(rows))], "mask_reasons": pa.array(rows, pa.list_(pa.int64()))},
    )
    chunked = pa.concat_tables([table.slice(0, cut), table.slice(cut)]).slice(start)
    assert validate_table("mask", chunked)["mask_reasons"].to_pylist() == rows[start:]


def test_mask_reasons_are_the_documented_bits():
    column = TABLES["mask"].columns[1]
    assert [f"{r.value} {r.name.lower()}" for r in MaskReason] == column.doc.removeprefix("T bit sets: ").split(", ")
    assert MaskReason(5) == MaskReason.SPECIAL_TOKEN | MaskReason.TEACHER_PREFIX
    assert [r.value for r in MaskReason] == [1, 2, 4, 8, 16]
