"""SQL over committed artifacts. DuckDB reads through lazy Arrow datasets that verify page checksums.

DuckDB's read-only mode can still read and write files, so the connection is restricted instead: no external access, no
replacement scans of Python variables, locked configuration; one SELECT, within memory and time limits.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import FunctionNullHandling, PythonUDFType

from storage.artifacts.artifact import Artifact
from storage.errors import CorruptArtifact, Evicted, OpdError, did_you_mean
from storage.query.figures import completed
from storage.query.limits import default_memory
from storage.query.places import PLACED, Pieces, part_names, places_of
from storage.query.pruning import LEAST_SHARDS, uses_by_table
from storage.query.sql import unpack_functions
from storage.query.statements import Views
from storage.query.uses import Use, missing_of, used_dataset, uses_of
from storage.query.views import METRICS, VIEWS
from storage.runs import Run, RunState
from storage.schemas import TABLES, TableSchema
from storage.store import Store

_BATCH_ROWS = 65_536
_MAX_RESULT_BYTES = 1 << 30
_MAX_SQL_CHARACTERS = 100_000
_THREADS = 4
_NARROW = (
    "narrow it (WHERE run = ... AND round = ...), aggregate, or raise the limit (--memory 8GB; in Python memory='8GB')"
)
_NO_COLUMN = re.compile(r'Referenced column "([^"]+)" not found|does not have a column named "([^"]+)"')
_PLAN_MEMORY = "100MB"
_DAMAGED = re.compile(r"stream registered as '(\w+)@' failed")


class QueryRefused(OpdError):
    """A statement that is not one SELECT, that DuckDB rejects, or that exceeds a limit."""

    exit_code: ClassVar[int] = 2


class Catalog:
    """The views over a store, or over some runs' part of it."""

    def __init__(self, store: Store, *runs: Run | None) -> None:
        """`runs`: None, or none, for all of the store."""
        self.store, self.runs = store, tuple(run for run in runs if run is not None)

    def query(
        self, sql: str, limit_seconds: float = 30, memory: str | None = None, max_rows: int = 1_000_000
    ) -> pa.Table:
        """The result of one SELECT over `views()`.

        Raises QueryRefused for other statements, and beyond `limit_seconds`, `memory` (of the execution, in DuckDB's spelling; by
        default half of what the machine has free) or `max_rows`;
        CorruptArtifact if a shard that the statement reads is damaged, Evicted if `opd gc` removed it. A function call on a
        huge constant can exceed the limits: `storage.query.limits` then ends the process.
        """
        if len(sql) > _MAX_SQL_CHARACTERS:
            raise QueryRefused(f"a statement of {len(sql):,} characters; at most {_MAX_SQL_CHARACTERS:,} are read")
        if limit_seconds <= 0:
            raise QueryRefused(f"limit of {limit_seconds} seconds: must be above 0")
        memory = memory or default_memory()
        committed = self.store.list()
        views, others = self._views(committed)
        try:
            with duckdb.connect(":memory:") as connection:
                statement = _one_select(connection, sql)
                self._create_views(connection, sql, committed, views, others)
                # Scans of Arrow data have no row counts to choose by: the right side of a join is the smaller one, as written.
                connection.execute("SET disabled_optimizers = 'build_side_probe_side'")
                _seal(connection, memory)
                return _run(connection, statement, limit_seconds, max_rows)
        except MemoryError as error:
            raise QueryRefused(f"needs more than {memory} of memory; {_NARROW}") from error
        except (duckdb.Error, pa.ArrowException) as error:
            if damaged := _DAMAGED.search(str(error)):
                self._find_damage(damaged.group(1))
                raise CorruptArtifact(f"a shard of {damaged.group(1)} could not be read: {error}") from error
            raise _refusal(error, memory, views, sql) from error

    def views(self) -> Views:
        """The views of this store: those over this program's own tables, and those that its manifests declare."""
        return self._views(self.store.list())[0]

    def _views(self, committed: Sequence[Artifact]) -> tuple[Views, set[str]]:
        """(the views, keys of artifacts that they leave out): of a table that manifests declare differently, the newest
        version is shown."""
        held = {a.key: self.store.table_schemas(a) for a in committed if a.rows.keys() - TABLES.keys()}
        newest: dict[str, TableSchema] = {}
        for schemas in held.values():  # oldest first
            for name, schema in schemas.items():
                if name not in TABLES and (name not in newest or schema.version >= newest[name].version):
                    newest[name] = schema
        others = {
            key
            for key, schemas in held.items()
            for name, schema in newest.items()
            if name in schemas and (schemas[name].version, schemas[name].arrow) != (schema.version, schema.arrow)
        }
        return Views(newest), others

    def _states(self) -> list[RunState]:
        return [run.state for run in self.runs or Run.list(self.store.root)]

    def _pieces(self, run: str) -> Pieces:
        """The bytes of the student's tokens in a run."""
        for use in uses_of([state for state in self._states() if state.name == run], self.store.list("prepare"), False):
            columns = ("id", "token", "text", "special", "tokenizer")
            rows = self.store.read_table(use.artifact, "vocabulary", columns)
            rows = rows.filter(pc.equal(rows["tokenizer"], "student"))
            return Pieces(*(rows[name].to_pylist() for name in columns[:4]))
        return Pieces([], [], [], [])

    def _find_damage(self, table: str) -> None:
        """Reads the table's shards one by one; the store names the bad one and moves it to quarantine."""
        states = self._states()
        uses = uses_of(states, self.store.list(), with_unused=not self.runs)
        for use in uses:
            if table in use.artifact.rows:
                try:
                    self.store.read_table(use.artifact, table)
                except Evicted as error:
                    raise Evicted(f"{error}\n{self._evicted(table, uses)}") from error

    def _evicted(self, table: str, uses: Sequence[Use]) -> str:
        """The message about evicted rounds of a table, and how to query without them."""
        gone = sorted({(u.run, u.round) for u in uses if table in u.artifact.rows and self.store.evicted(u.artifact)})
        last = {name: max(round for other, round in gone if other == name) for name, _ in gone if name}
        places = ", ".join(f"{name}@{round}" for name, round in gone if name) or "of no run"
        narrow = (
            f"; a query without them: WHERE run = '{next(iter(last))}' AND round > {last[next(iter(last))]}"
            if last
            else ""
        )
        return f"evicted are the {table} of {places}{narrow}"

    def _create_views(
        self,
        connection: duckdb.DuckDBPyConnection,
        sql: str,
        committed: Sequence[Artifact],
        views: Views,
        others: set[str],
    ) -> None:
        """All views exist; those that the statement cannot mean have no rows, and nothing is opened for them. `others`: keys of
        artifacts that are left out."""
        wanted = views.wanted(sql)
        if not wanted:
            for name in views.all:
                connection.execute(views.sql(name, rows_wanted=False))
            return
        states = self._states()
        columns = _columns_used(views, "tokens", sql) if "tokens" in wanted else None
        tables = {table for name in wanted for table in views.tables(name, columns)}
        missing = missing_of(states, committed, tables)
        if missing:
            raise CorruptArtifact(
                f"damaged or gone: {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}; `opd resume`"
                " of that run rebuilds just what is damaged. `opd query NAME` reads only the run NAME"
            )
        uses = uses_of(states, committed, with_unused=not self.runs)
        unpacking = unpack_functions(views.schemas[table] for table in tables)
        shown = [use for use in uses if use.artifact.key not in others]
        read = self._read(views, tables, columns, sql, shown, unpacking)
        for table in sorted(tables):
            open_one = functools.partial(self.store.arrow_dataset, table=table)
            connection.register(f"{table}@", used_dataset(views.schemas[table], read[table], open_one))
        if "artifacts" in wanted:
            used = {use.artifact.key: use.artifact for use in uses}
            connection.register("artifacts@", _artifacts_table(used.values(), self.store))
        if "rounds" in wanted:
            connection.register("rounds@", _rounds_table(completed(self.store, state) for state in states))
        if "stages" in wanted:
            connection.register("stages@", _stages_table(states))
        for name, (function, arguments, result) in unpacking.items():
            _add_function(connection, name, function, (arguments, result))
        if "tokens" in wanted or "vocabulary" in wanted:
            _add_text_functions(connection, functools.cache(self._pieces))
        for name in views.all:
            connection.execute(views.sql(name, rows_wanted=name in wanted, used=columns))

    def _read(
        self,
        views: Views,
        tables: set[str],
        columns: set[str] | None,
        sql: str,
        uses: Sequence[Use],
        functions: Mapping[str, Any],
    ) -> Mapping[str, Sequence[Use]]:
        """The uses that a statement can read, by table."""
        held = {use.artifact.key: use.artifact for use in uses if tables & use.artifact.rows.keys()}
        if sum(self.store.shard_count(artifact) for artifact in held.values()) < LEAST_SHARDS:
            return dict.fromkeys(tables, uses)

        def prepare(connection: duckdb.DuckDBPyConnection) -> None:
            _seal(connection, _PLAN_MEMORY)

        def add_functions(connection: duckdb.DuckDBPyConnection) -> None:
            for name, (function, arguments, result) in functions.items():
                _add_function(connection, name, function, (arguments, result))
            _add_text_functions(connection, lambda run: Pieces([], [], [], []))

        return uses_by_table(views, tables, columns, sql, uses, add_functions, prepare)


def _one_select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise QueryRefused(f"found {len(statements)} statements; a query is exactly one SELECT")
    if statements[0].type != duckdb.StatementType.SELECT:
        kind = statements[0].type.name
        raise QueryRefused(
            f"this is a {kind} statement; only one SELECT over the views {', '.join(VIEWS)} is run. Nothing can be"
            " written or read from files here: to save a result, use `opd query --csv` or `--json` and redirect it"
        )
    return statements[0]


def _add_function(
    connection: duckdb.DuckDBPyConnection, name: str, function: Callable[..., pa.Array], types: tuple[Any, Any]
) -> None:
    """Adds a function of Arrow arrays. `types`: of its arguments and of its result."""
    arguments, result = types
    connection.create_function(
        name, function, arguments, result, type=PythonUDFType.ARROW, null_handling=FunctionNullHandling.SPECIAL
    )


def _add_text_functions(connection: duckdb.DuckDBPyConnection, pieces: Callable[[str], Pieces]) -> None:
    """What `tokens` and a question over `vocabulary` call, and a statement over these may."""
    _add_function(connection, "places", places_of(pieces), PLACED)
    _add_function(connection, "part_name", part_names, (["VARCHAR"], "VARCHAR"))


def _columns_used(views: Views, view: str, sql: str) -> set[str] | None:
    """The columns of a view that a statement reads, by DuckDB's own plan of it over empty tables; None where there is no plan.
    DuckDB does not prune lists that are exploded side by side: without this, all of them would be read."""
    with duckdb.connect(":memory:") as connection:
        for name in views.all:
            connection.execute(views.sql(name, rows_wanted=False).replace("CREATE VIEW", "CREATE TABLE", 1))
        _add_text_functions(connection, lambda run: Pieces([], [], [], []))
        optimizers = connection.sql("SELECT name FROM duckdb_optimizers()").fetchall()
        others = ",".join(name for (name,) in optimizers if name != "unused_columns")
        connection.execute(f"SET disabled_optimizers = '{others}'")
        _seal(connection, _PLAN_MEMORY)
        try:
            plan = json.loads(connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchall()[0][1])
        except duckdb.Error:
            return None
    found: set[str] = set()
    left = list(plan)
    while left:
        node = left.pop()
        left += node["children"]
        scan = node["extra_info"]
        if str(scan.get("Table", "")).rpartition(".")[2] == view:
            names = scan.get("Projections") or []
            found |= {names} if isinstance(names, str) else set(names)
    return found


def _seal(connection: duckdb.DuckDBPyConnection, memory: str) -> None:
    threads = max(1, min(_THREADS, os.cpu_count() or 1))
    settings = (
        ("memory_limit", "'" + memory.replace("'", "''") + "'"),
        ("threads", str(threads)),
        ("temp_directory", "''"),
        ("autoinstall_known_extensions", "false"),
        ("autoload_known_extensions", "false"),
        ("python_enable_replacements", "false"),
        ("enable_external_access", "false"),
        ("lock_configuration", "true"),
    )
    for name, value in settings:
        connection.execute(f"SET {name} = {value}")


def _run(
    connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement, limit_seconds: float, max_rows: int
) -> pa.Table:
    """Execute and fetch, with a time limit; the size of the result is checked while fetching."""
    late = threading.Event()

    def interrupt() -> None:
        late.set()
        connection.interrupt()

    timer = threading.Timer(limit_seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        reader = connection.sql(statement).to_arrow_reader(_BATCH_ROWS)
        batches, rows, size = [], 0, 0
        for batch in reader:
            rows += batch.num_rows
            size += batch.nbytes
            if rows > max_rows or size > _MAX_RESULT_BYTES:
                what = f"{max_rows:,} rows" if rows > max_rows else f"{_MAX_RESULT_BYTES:,} bytes"
                raise QueryRefused(f"the result has more than {what}; aggregate, name fewer columns, or add a LIMIT")
            batches.append(batch)
        return _whole_numbers(_distinct_names(pa.Table.from_batches(batches, reader.schema)))
    except (duckdb.Error, OSError, pa.ArrowException) as error:
        if not late.is_set():
            raise duckdb.Error(str(error)) from error
        raise QueryRefused(
            f"ended after {limit_seconds:g} seconds; narrow it (WHERE run = ... AND round = ...), or raise the limit"
            " (--limit-seconds)"
        ) from error
    finally:
        timer.cancel()


def _refusal(error: Exception, memory: str, views: Views, sql: str) -> OpdError:
    """An error of DuckDB or Arrow as one of this program; for an unknown column or view with the nearest one."""
    text = str(error).strip()
    if "Out of Memory" in text or "bad_alloc" in text:
        return QueryRefused(f"needs more than {memory} of memory; {_NARROW}")
    if column := _NO_COLUMN.search(text):
        name, read = column[1] or column[2], views.wanted(sql)
        columns = {c.name: view for view in sorted(read) for c in views.all[view].columns}
        near = did_you_mean(name, columns, f"{', '.join(sorted(read)) or 'it'}: no column of a similar name")
        places = sorted({view for c, view in columns.items() if near == f"did you mean {c!r}?"})
        where = f" (in {', '.join(places)})" if places else ""
        return QueryRefused(f"no column {name!r}: {near}{where}\n`opd query NAME VIEW` lists a view's columns\n{text}")
    unknown = "does not exist" in text or "Referenced column" in text
    hint = f"\nviews: {', '.join(views.all)}; `opd query VIEW` lists the columns of one" if unknown else ""
    return QueryRefused(text + hint)


def _distinct_names(table: pa.Table) -> pa.Table:
    """Numbers columns of equal name, so that no output format loses one."""
    seen: dict[str, int] = {}
    names = []
    for name in table.column_names:
        count = seen.get(name, 0)
        names.append(f"{name}_{count}" if count else name)
        seen[name] = count + 1
    return table.rename_columns(names)


def _whole_numbers(table: pa.Table) -> pa.Table:
    """Sums of whole numbers (128 bits in DuckDB, decimals in Arrow) as int64 where they fit."""
    for place, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type) and field.type.scale == 0:
            with suppress(pa.ArrowInvalid):
                table = table.set_column(place, field.name, table.column(place).cast(pa.int64()))
    return table


def _artifacts_table(artifacts: Iterable[Artifact], store: Store) -> pa.Table:
    """Rows of the view `artifacts`."""
    documents = ("content", "inputs", "identity", "meta")
    rows = [
        {
            "stage": a.stage,
            "artifact": a.key,
            "created": a.created,
            "seconds": a.seconds,
            "rows": sum(a.rows.values()),
            "bytes": store.size(a),
        }
        | {name: json.dumps(getattr(a, name), sort_keys=True) for name in documents}
        | {"evicted": store.evicted(a)}
        for a in artifacts
    ]
    return pa.Table.from_pylist(rows, VIEWS["artifacts"].arrow)


def _stages_table(states: Iterable[RunState]) -> pa.Table:
    """Rows of the view `stages`."""
    fields = {"state", "seconds", "rows", "started", "error"}
    rows = [
        {"run": state.name, "round": round.round, "stage": label, "artifact": stage.key}
        | stage.model_dump(include=fields)
        | {"artifacts": list(stage.artifacts.items())}
        for state in states
        for round in state.rounds
        for label, stage in round.stages.items()
    ]
    return pa.Table.from_pylist(rows, VIEWS["stages"].arrow)


def _rounds_table(states: Iterable[RunState]) -> pa.Table:
    """Rows of the view `rounds`."""
    rows: list[dict[str, Any]] = []
    for state in states:
        for round in state.rounds:
            evaluation = round.stages.get("evaluate")
            row: dict[str, Any] = {column.name: round.metrics.get(column.name) for column in METRICS}
            row |= {
                "run": state.name,
                "round": round.round,
                "artifact": evaluation.key if evaluation else None,
                "student_sha256": round.student_sha256,
                "seconds": sum(stage.seconds or 0.0 for stage in round.stages.values()),
                "metrics": list(round.metrics.items()),
                "stages": [
                    {"stage": label, **stage.model_dump(include={"key", "state", "seconds", "rows", "error"})}
                    for label, stage in round.stages.items()
                ],
            }
            rows.append(row)
    return pa.Table.from_pylist(rows, VIEWS["rounds"].arrow)
