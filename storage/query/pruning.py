"""Which artifacts a statement can read, by the conditions on run, round, stage and artifact that DuckDB finds for each table.

A store may have a million shards, of which a statement reads those of one round. DuckDB plans the statement over empty tables;
the plan has the conditions that each scan applies, as SQL, and those that speak of a use alone are asked of the list of uses.
What cannot be decided in this way stays: shards too many are only opened in vain."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import duckdb
import pyarrow as pa

from storage.query.sql import identifier
from storage.query.statements import Views
from storage.query.uses import USE, Use, columns_of_table

LEAST_SHARDS = 512
"""Below, all are offered: their conditions are applied when the statement runs, as fast."""
_NOT_USED = "statistics_propagation,empty_result_pullup,build_side_probe_side"
"""Optimizers that would leave scans of empty tables out of the plan."""


def uses_by_table(
    views: Views,
    tables: Collection[str],
    columns: Collection[str] | None,
    sql: str,
    uses: Sequence[Use],
    functions: Callable[[duckdb.DuckDBPyConnection], None],
    seal: Callable[[duckdb.DuckDBPyConnection], None],
) -> dict[str, Sequence[Use]]:
    """The uses whose artifacts a statement can read, by table. `tables`: behind the views that it names; `columns`: those of
    `tokens` that it reads. `functions` adds to a connection what the views call, `seal` takes from it what a statement may not
    do."""
    everything: dict[str, Sequence[Use]] = dict.fromkeys(tables, uses)
    wanted = views.wanted(sql)
    with duckdb.connect(":memory:") as connection:
        for table in tables:
            empty = pa.schema([*USE, *columns_of_table(views.schemas[table])]).empty_table()
            connection.register("empty", empty)
            connection.execute(f"CREATE TABLE {identifier(table + '@')} AS SELECT * FROM empty")
        values = [
            (place, use.run or None, use.round if use.run else None, use.stage, use.artifact.key)
            for place, use in enumerate(uses)
        ]
        names = ("place", *(field.name for field in USE))
        listed = pa.table(dict(zip(names, map(list, zip(*values, strict=True)), strict=True)), _uses_schema())
        connection.register("listed", listed)
        connection.execute("CREATE TABLE uses AS SELECT * FROM listed")
        functions(connection)
        for name in views.all:
            known = name in wanted and name not in ("artifacts", "rounds", "stages")
            connection.execute(views.sql(name, rows_wanted=known, used=columns))
        connection.execute(f"SET disabled_optimizers = '{_NOT_USED}'")
        seal(connection)
        try:
            plan = json.loads(connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchall()[0][1])
        except duckdb.Error:
            return everything
        found: dict[str, set[int]] = {}
        for table, conditions in _scans(plan, tables):
            found.setdefault(table, set()).update(_places(connection, conditions))
    return everything | {table: [uses[place] for place in sorted(places)] for table, places in found.items()}


def _uses_schema() -> pa.Schema:
    return pa.schema([pa.field("place", pa.int64()), *USE])


def _scans(plan: Sequence[dict[str, Any]], tables: Collection[str]) -> list[tuple[str, list[str]]]:
    """(table, conditions) of every scan in a plan."""
    found, left = [], list(plan)
    while left:
        node = left.pop()
        left += node["children"]
        scanned = str(node["extra_info"].get("Table", ""))
        for table in tables:
            if scanned.endswith(f'"{table}@"'):
                filters = node["extra_info"].get("Filters") or []
                found.append((table, [filters] if isinstance(filters, str) else list(filters)))
    return found


def _places(connection: duckdb.DuckDBPyConnection, conditions: Sequence[str]) -> set[int]:
    """The uses that meet the conditions that speak of uses alone."""
    met = None
    for condition in conditions:
        asked = f"SELECT place FROM uses WHERE {condition.removeprefix('optional: ')}"
        with suppress(duckdb.Error):  # it speaks of other columns
            places = {place for (place,) in connection.execute(asked).fetchall()}
            met = places if met is None else met & places
    if met is None:
        return {place for (place,) in connection.execute("SELECT place FROM uses").fetchall()}
    return met
