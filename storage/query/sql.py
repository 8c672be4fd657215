"""Arrow types, identifiers and packed columns in DuckDB's SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from storage.artifacts.packed import FUNCTIONS, Part, packed_schema, parts
from storage.schemas import Column, TableSchema

_DUCKDB_TYPES = {
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}


def duckdb_type(type: pa.DataType) -> str:
    """DuckDB's name of an Arrow type used in the schemas."""
    if pa.types.is_list(type):
        return f"{duckdb_type(type.value_type)}[]"
    if pa.types.is_map(type):
        return f"MAP({duckdb_type(type.key_type)}, {duckdb_type(type.item_type)})"
    if pa.types.is_struct(type):
        return "STRUCT(" + ", ".join(f"{identifier(f.name)} {duckdb_type(f.type)}" for f in type) + ")"
    return _DUCKDB_TYPES[type]


def casts(columns: Sequence[Column], null: bool = False) -> str:
    """The columns in order, each with its declared type; with `null`, nulls of that type."""
    names = [identifier(column.name) for column in columns]
    types = [duckdb_type(column.type) for column in columns]
    return ", ".join(f"CAST({'NULL' if null else n} AS {t}) AS {n}" for n, t in zip(names, types, strict=True))


def unpacked(name: str, part: Part) -> str:
    """A declared column of a table whose files may be packed."""
    if part.function is None:
        return identifier(name)
    arguments = ", ".join(identifier(argument) for argument in part.arguments)
    return f"coalesce({identifier(name)}, {part.function}({arguments})) AS {identifier(name)}"


def unpack_functions(schemas: Iterable[TableSchema]) -> dict[str, tuple[Callable[..., Any], list[Any], str]]:
    """By name: the functions that views over these tables call, the types of their arguments and of their result."""
    found = {}
    for schema in schemas:
        layout = packed_schema(schema)
        if layout is None:
            continue
        result = {column.name: duckdb_type(column.type) for column in schema.columns}
        given = {column.name: duckdb_type(column.type) for column in layout.columns}
        for name, (function, arguments) in parts(layout.names).items():
            if function is not None:
                found[function] = (FUNCTIONS[function], [given[argument] for argument in arguments], result[name])
    return found


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
