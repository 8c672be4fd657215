"""SQL given to `opd query` cannot write, read other files, or hang the host by accident: 15 statements of each kind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from places import CHECKOUT

from storage.query.catalog import Catalog, QueryRefused
from storage.query.limits import GRACE_SECONDS, SLACK_BYTES, memory_bytes, process_limits
from storage.store import Store

WRITES = (
    "COPY (SELECT 1) TO '{new}'",
    "COPY (SELECT 1) TO '{new}' (FORMAT parquet)",
    "COPY rollouts TO '{store}/artifacts/rollout/new.parquet'",
    "COPY (SELECT 1) TO '{store}' (FORMAT parquet, PARTITION_BY (x))",
    "EXPORT DATABASE '{new}'",
    "ATTACH '{new}' AS other",
    "CREATE TABLE t AS SELECT * FROM rollouts",
    "CREATE OR REPLACE VIEW rollouts AS SELECT 1",
    "INSERT INTO rollouts SELECT * FROM rollouts",
    "WITH gone AS (DELETE FROM rollouts RETURNING *) SELECT * FROM gone",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{new}''')",
    "SELECT 1; COPY (SELECT 1) TO '{new}'",
    "PRAGMA enable_profiling='json'; PRAGMA profiling_output='{new}'",
    "SET log_query_path = '{new}'",
    "INSTALL httpfs",
    "CREATE PERSISTENT SECRET s (TYPE http, BEARER_TOKEN 'x')",
    "SELECT * FROM rollouts INTO OUTFILE '{new}'",
    "CALL enable_logging('QueryLog', storage='file', storage_path='{new}')",
    "PIVOT rollouts ON seed USING count(*)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{new}'",
)
READS = (
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM read_json_auto('{secret}')",
    "SELECT * FROM read_ndjson_objects('{secret}')",
    "SELECT * FROM read_parquet('{store}/artifacts/*/*/*.parquet')",
    "SELECT * FROM parquet_kv_metadata('{store}/artifacts/rollout/*/*.parquet')",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM read_duckdb('{secret}')",
    "FROM '{secret}'",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT (SELECT content FROM read_text('{secret}')) FROM rollouts",
    "SELECT * FROM rollouts UNION ALL BY NAME SELECT * FROM '{secret}'",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_text('https://example.org/')",
    "SELECT * FROM 's3://bucket/x.parquet'",
    "SELECT * FROM sqlite_scan('{secret}', 't')",
    "SELECT getenv('CANARY_TOKEN')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM query('FROM ''{secret}''')",
    "SELECT * FROM arrow_scan(0, 0, 0)",
    "SELECT * FROM pandas_scan(0)",
    "LOAD '{secret}'",
)
EXPLODING = (
    "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT count(*) FROM r",
    "WITH RECURSIVE r(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM r) SELECT max(length(s)) FROM r",
    "SELECT sum(a.range * b.range) FROM range(100000000) a, range(100000000) b",
    "SELECT list(range) FROM range(1000000000)",
    "SELECT * FROM range(1000000000000)",
    "SELECT string_agg(repeat('x', 1000), '') FROM range(100000000)",
    "SELECT count(DISTINCT md5(range::VARCHAR)) FROM range(1000000000)",
    "SELECT x, y, count(*) FROM range(100000) a(x), range(100000) b(y) GROUP BY CUBE (x, y)",
    "SELECT histogram(range) FROM range(1000000000)",
    f"SELECT count(*) FROM {', '.join(f'tokens t{number}' for number in range(8))} WHERE t0.position > random()",
    "SELECT len(list_resize([1], 10000000000))",
    "SELECT count(*) FROM (SELECT unnest(range(1000000000)))",
    "SELECT sleep_ms(100000000)",
    "SELECT length(format('{:>2000000000}', 'x'))",
    "SELECT array_to_string(range(200000000), ',')",
)
UNINTERRUPTIBLE = (
    "SELECT levenshtein(repeat('a', 100000), repeat('b', 100000))",
    "SELECT md5(repeat('x', 1000000000))",
    "SELECT editdist3(repeat('a', 300000), repeat('b', 300000))",
    "SELECT jaccard(repeat('a', 200000000), repeat('b', 200000000))",
    "SELECT url_encode(repeat('%', 1000000000))",
    "SELECT length(lpad('x', 2000000000, 'y'))",
)
"""One call on a constant: past DuckDB's own limits, so the process must end."""


@pytest.fixture(scope="module")
def catalog(example_store_once) -> Catalog:
    return Catalog(Store(example_store_once))


def fill(sql: str, folder: Path, store: Path) -> str:
    values = {"new": folder / "new", "secret": folder / "secret.csv", "folder": folder, "store": store}
    for name, value in values.items():
        sql = sql.replace("{" + name + "}", str(value))
    return sql


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.promise(16, "statements that write")
@pytest.mark.parametrize("sql", WRITES)
def test_nothing_is_written(sql, catalog, tmp_path):
    before = everything(catalog.store.root)
    with pytest.raises(QueryRefused):
        catalog.query(fill(sql, tmp_path, catalog.store.root))
    assert list(tmp_path.iterdir()) == []
    assert everything(catalog.store.root) == before


@pytest.mark.promise(16, "statements that read what is not the run")
@pytest.mark.parametrize("sql", READS)
def test_nothing_else_is_read(sql, catalog, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY_TOKEN", "canary-of-the-environment")
    (tmp_path / "secret.csv").write_text("a,b\ncanary-of-the-file,2\n")
    with pytest.raises(QueryRefused) as refusal:
        catalog.query(fill(sql, tmp_path, catalog.store.root))
    assert "canary-of" not in str(refusal.value)


@pytest.mark.promise(16, "a statement too long to be meant")
def test_a_statement_too_long_to_be_meant_is_not_parsed(catalog):
    started = time.monotonic()
    with pytest.raises(QueryRefused, match="characters"):
        catalog.query("SELECT " + "+".join(["1"] * 1_000_000))
    assert time.monotonic() - started < 1
    for nested in ("SELECT " + "(" * 40_000 + "1" + ")" * 40_000, "SELECT " + "-" * 1 + "NOT " * 20_000 + "true"):
        with pytest.raises(QueryRefused):
            catalog.query(nested)


def ask(sql: str, root: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-m", "flows.cli.app", "query", sql, "--root", str(root)]
    command += ["--limit-seconds", str(seconds), "--memory", "200MB"]
    env = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def watch(process: subprocess.Popen) -> tuple[float, int]:
    """(seconds of CPU and waiting until it ended, most resident bytes seen)."""
    started, most = time.monotonic(), 0
    inside = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            most = max(most, inside.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        assert time.monotonic() - started < 120, "it did not end"
        time.sleep(0.02)
    return time.monotonic() - started, most


@pytest.mark.promise(16, "endless and exploding queries end at the limits")
def test_what_cannot_be_interrupted_ends_with_its_process(example_store_once):
    processes = [ask(sql, example_store_once, 0.5) for sql in UNINTERRUPTIBLE[:2]]
    for process in processes:
        _, most = watch(process)
        assert process.wait() == 2
        assert "error: ended after 0.5 seconds" in process.stderr.read()
        assert most < memory_bytes("200MB") + SLACK_BYTES + (1 << 29)


def test_the_limits_hold_for_the_query_alone():
    """A result that is printed afterwards may take what it takes."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with process_limits(0.1, "200MB"):
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] < psutil.virtual_memory().total
        with pytest.raises(MemoryError):
            bytearray(memory_bytes("200MB") + 2 * SLACK_BYTES)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    time.sleep(0.1 + GRACE_SECONDS)
    assert memory_bytes("1.5GiB") == 3 << 29 and memory_bytes("500 MB") == 500_000_000 and memory_bytes("x") is None


@pytest.mark.promise(16, "endless and exploding queries end at the limits")
@pytest.mark.faults
@pytest.mark.parametrize("sql", EXPLODING + UNINTERRUPTIBLE)
def test_an_endless_or_exploding_query_ends_at_its_limits(sql, example_store_once):
    idle, _ = watch(process := ask("SELECT 1", example_store_once, 2))
    assert process.wait() == 0
    seconds, most = watch(process := ask(sql, example_store_once, 2))
    assert process.wait() == 2, process.stderr.read()
    said = process.stderr.read()
    assert any(
        words in said for words in ("ended after 2 seconds", "more than 200MB of memory", "more than 1,000,000 rows")
    )
    assert seconds < 2 * idle + 2 + GRACE_SECONDS + 10
    assert most < memory_bytes("200MB") + SLACK_BYTES + (1 << 29)
