"""Queries answer from committed artifacts alone, and can do nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from top_k_lists import lists_of

from storage.artifacts.artifact import ArtifactSpec, artifact_directory
from storage.artifacts.packed import pack
from storage.errors import CorruptArtifact, Evicted
from storage.query.catalog import Catalog, QueryRefused
from storage.query.figures import difference, evaluation_of, read_sums
from storage.query.views import VIEWS
from storage.runs import RoundState, Run, StageState
from storage.schemas import TABLES, schema_for
from storage.store import Store
from storage.upkeep.gc import evict


@pytest.fixture(scope="module")
def catalog(example_store_once) -> Catalog:
    return Catalog(Store(example_store_once))


@pytest.fixture(scope="module")
def demo(example_store_once) -> Catalog:
    return Catalog(Store(example_store_once), Run.open(example_store_once, "demo"))


def rows(catalog: Catalog, sql: str, **limits) -> list[dict]:
    return catalog.query(sql, **limits).to_pylist()


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_exists_and_is_empty_in_an_empty_store(view, tmp_path):
    empty = Catalog(Store(tmp_path)).query(f"SELECT * FROM {view}")
    assert empty.num_rows == 0
    assert empty.schema.equals(VIEWS[view].arrow)


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_has_the_declared_columns_when_it_has_rows(view, example_store):
    store = Store(example_store)
    with store.building(ArtifactSpec.of("draft", 1, {}, {})) as builder:
        draft = {
            "sample_id": "p0/draft/0", "prompt_id": "p0", "sample_index": 0, "prompt_token_ids": [1], "completion_token_ids": [2],
            "sampling_logprobs": [-0.5], "finish_reason": "stop", "seed": 1, "completion_text": "x",
        }  # fmt: skip
        builder.write_shard("drafts", 0, pa.Table.from_pylist([draft], schema_for("drafts")))
        builder.commit()
    with store.building(ArtifactSpec.of("judge", 1, {}, {})) as builder:
        judged = {
            "sample_id": "p0/1/0",
            "reward": 1.0,
            "parts": [1.0],
            "span_starts": [0],
            "span_ends": [1],
            "span_kinds": ["x"],
        }
        builder.write_shard("rewards", 0, pa.Table.from_pylist([judged], schema_for("rewards")))
        builder.commit()
    with store.building(ArtifactSpec.of("context", 1, {}, {})) as builder:
        context = {"sample_id": "p0/1/0", "prompt_token_ids": [1], "sibling_id": "p0/1/1", "source": "sibling"}
        builder.write_shard("contexts", 0, pa.Table.from_pylist([context], schema_for("contexts")))
        builder.commit()
    with store.building(ArtifactSpec.of("prepare", 1, {"kept": True}, {})) as builder:
        kept = pa.Table.from_pylist([{"prompt_id": "p0", "prompt": '"x"'}], schema_for("context_columns"))
        builder.write_shard("context_columns", 0, kept)
        builder.commit()
    with store.building(ArtifactSpec.of("harness", 1, {}, {})) as builder:
        common = {"task": "t", "metric": "acc", "filter": "none", "value": 1.0}
        result = common | {"n": 1, "task_version": "1"}
        asked = common | {"doc_id": 0, "request": "x", "answers": "[]", "target": "y"}
        for name, row in (("harness_results", result), ("harness_samples", asked)):
            builder.write_shard(name, 0, pa.Table.from_pylist([row], schema_for(name)))
        builder.commit()
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        state.rounds[0].stages["evaluate_hard"] = state.rounds[1].stages["evaluate"]
        run.save(state)
    table = Catalog(store).query(f"SELECT * FROM {view}")
    assert table.num_rows > 0
    assert table.schema.equals(VIEWS[view].arrow)
    assert "artifact" in table.column_names


def test_shared_rollouts_count_for_every_run_and_unused_ones_for_none(catalog, demo):
    sql = "SELECT run, round, count(*) AS n, any_value(artifact) AS key FROM rollouts GROUP BY ALL ORDER BY ALL"
    found = [(r["run"], r["round"], r["n"]) for r in rows(catalog, sql)]
    assert found == [("demo", 1, 5), ("demo", 2, 5), ("other", 1, 5), (None, None, 1)]
    keys = {(r["run"], r["round"]): r["key"] for r in rows(catalog, sql)}
    assert keys["demo", 1] == keys["other", 1] != keys["demo", 2]
    assert [(r["run"], r["round"]) for r in rows(demo, sql)] == [("demo", 1), ("demo", 2)]


def test_tokens_are_the_exploded_rollouts_with_signals_and_text(demo):
    found = rows(demo, "SELECT * FROM tokens WHERE round = 2 AND sample_id = 'p4/2/0' ORDER BY position")
    assert [r["position"] for r in found] == [0, 1, 2, 3, 4]
    assert [r["token_id"] for r in found] == [1, 2, 3, 4, 1]
    assert [r["token"] for r in found] == ["one", "two", "three", "w4", "one"]  # 4 has no text alone: its name
    assert [r["sampling_logprob"] for r in found] == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert [r["student_logprob"] for r in found] == [-0.5, -1.5, -2.5, -3.5, -4.5]
    assert [r["teacher_logprob"] for r in found] == [-0.25, -1.25, -2.25, -3.25, -4.25]
    assert [r["mask_reasons"] for r in found] == [0, 0, 0, 0, 1]
    assert {(r["student_entropy"], r["teacher_entropy"]) for r in found} == {(0.5, 0.25)}


def test_packed_lists_are_the_declared_columns_beside_lists_that_are_not_packed(example_store):
    """Round 1 of the run `demo` has packed lists, round 2 has not; `supervision` shows both, and no lists of `other`'s."""
    store, run, random = Store(example_store), Run.open(example_store, "demo"), np.random.default_rng(3)
    state, made = run.state, {}
    for table, packed_in in (("teacher_topk", 1), ("student_topk", 2)):
        for entry in state.rounds[1:]:
            rollouts = store.get("rollout", entry.stages["rollout"].artifacts["rollout"])
            names = store.read_table(rollouts, "rollouts")["sample_id"]
            lists = lists_of(random, list(range(1, len(names) + 1)), 5, 2.0, 0.2, table)
            lists = lists.set_column(0, schema_for(table).field(0), names)
            packed = entry.round == packed_in
            with store.building(ArtifactSpec.of(table, 1, {"round": entry.round}, {})) as builder:
                builder.write_shard(table, 0, pack(TABLES[table], lists) if packed else lists)
                made[table, entry.round] = builder.commit()
            entry.stages["supervise"].artifacts[table] = made[table, entry.round].key
    with run.lock():
        run.save(state)
    for (table, number), artifact in made.items():
        columns = [name for name in schema_for(table).names if name != "sample_id"]
        shown = ", ".join(f"{table}_{name} AS {name}" for name in columns)
        sql = f"SELECT sample_id, {shown} FROM supervision WHERE run = 'demo' AND round = {number} ORDER BY sample_id"
        found = Catalog(store).query(sql)
        stored = store.read_table(artifact, table).select(["sample_id", *columns]).sort_by("sample_id")
        assert repr(found.to_pylist()) == repr(stored.to_pylist())  # NaN included
        assert found.schema.types == stored.schema.types
    likeliest = (
        "SELECT sum(exp(teacher_topk_logprobs[1][1])) AS mass, count(*) AS n FROM supervision"
        " WHERE len(teacher_topk_ids[1]) > 0"
    )
    (sums,) = rows(Catalog(store), likeliest)
    assert 0 < sums["mass"] <= sums["n"] <= 10


def test_text_offset_is_where_a_tokens_text_begins_in_the_completion(demo):
    sql = (
        "SELECT sample_id, position, text_offset, substr(completion_text, text_offset + 1, length(token)) = token AS there"
        " FROM tokens JOIN rollouts USING (run, round, sample_id) WHERE round = 1 ORDER BY ALL"
    )
    found = {(r["sample_id"], r["position"]): (r["text_offset"], r["there"]) for r in rows(demo, sql)}
    assert [found["p2/1/0", n] for n in range(3)] == [(0, True), (3, True), (6, True)]  # one, two, three
    assert {found["p3/1/0", n] for n in range(4)} == {(None, None)}  # its last token is half a character


def test_a_query_that_runs_out_of_memory_names_the_option(demo):
    with pytest.raises(QueryRefused, match="--memory"):
        demo.query("SELECT md5(repeat('x', 100) || range) FROM range(3000000) ORDER BY ALL", memory="20MB")


def test_tokens_agree_with_rollouts_in_number(catalog):
    total = rows(catalog, "SELECT sum(len(completion_token_ids)) AS n FROM rollouts WHERE run IS NOT NULL")
    assert rows(catalog, "SELECT count(*) AS n FROM tokens") == total == [{"n": 45}]


def test_supervision_is_joined_by_sample_and_null_where_not_asked_for(demo):
    sql = (
        "SELECT sample_id, len(student_logprobs) AS n, mask_reasons, teacher_topk_ids FROM supervision WHERE round = 1"
    )
    found = {r["sample_id"]: r for r in rows(demo, sql)}
    assert found["p2/1/0"] == {"sample_id": "p2/1/0", "n": 3, "mask_reasons": [0, 0, 1], "teacher_topk_ids": None}
    assert len(found) == 5


def test_signals_that_are_not_made_yet_leave_tokens_without_them(example_store):
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        state.rounds[2].stages["supervise"] = StageState(state="running", artifacts={"sampled": "0" * 16})
        run.save(state)
    found = rows(Catalog(Store(example_store), run), "SELECT * FROM tokens WHERE round = 2")
    assert len(found) == 15
    assert {r["student_logprob"] for r in found} == {None}
    assert all(r["sampling_logprob"] is not None for r in found)


def test_lists_of_a_student_that_was_not_run_are_null_in_every_view(example_store):
    store, run = Store(example_store), Run.open(example_store, "demo")
    state = run.state
    stage = state.rounds[2].stages["supervise"]
    stored = store.read_table(store.get("sampled", stage.artifacts["sampled"]), "sampled")
    for name in ("student_logprobs", "student_entropy", "behaviour_logprobs"):
        nulls = pa.nulls(stored.num_rows, stored.schema.field(name).type)
        stored = stored.set_column(stored.schema.get_field_index(name), stored.schema.field(name), nulls)
    with store.building(ArtifactSpec.of("sampled", 1, {"student": "none"}, {})) as builder:
        builder.write_shard("sampled", 0, stored)
        stage.artifacts["sampled"] = builder.commit().key
    with run.lock():
        run.save(state)
    catalog = Catalog(store, run)
    found = rows(catalog, "SELECT * FROM tokens WHERE round = 2 AND sample_id = 'p4/2/0' ORDER BY position")
    assert [r["token_id"] for r in found] == [1, 2, 3, 4, 1]
    assert [r["teacher_logprob"] for r in found] == [-0.25, -1.25, -2.25, -3.25, -4.25]
    assert {(r["student_logprob"], r["student_entropy"]) for r in found} == {(None, None)}
    counts = (
        "SELECT round, count(student_logprobs) AS student, count(teacher_logprobs) AS teacher FROM supervision"
        " GROUP BY 1 ORDER BY 1"
    )
    assert rows(catalog, counts) == [
        {"round": 1, "student": 5, "teacher": 5}, {"round": 2, "student": 0, "teacher": 5},
    ]  # fmt: skip
    mean = rows(catalog, "SELECT round, avg(student_logprob) AS p FROM tokens GROUP BY 1 ORDER BY 1")
    assert mean[0]["p"] < 0 and mean[1]["p"] is None


def test_training_steps_say_which_stage_took_them(demo):
    sql = "SELECT stage, round, list(step ORDER BY step) AS steps FROM training_steps GROUP BY ALL ORDER BY round"
    assert [tuple(r.values()) for r in rows(demo, sql)] == [
        ("warmup", 0, [1]),
        ("train", 1, [1, 2]),
        ("train", 2, [3, 4]),
    ]


def test_rounds_and_artifacts_come_from_states_and_manifests(demo):
    sql = "SELECT round, accuracy_greedy, metrics['reverse_kl'] AS kl, len(stages) AS n FROM rounds ORDER BY round"
    assert [tuple(r.values()) for r in rows(demo, sql)] == [(0, 0.25, 1.5, 3), (1, 0.5, 0.75, 4), (2, 0.75, 0.5, 4)]
    joined = "SELECT a.stage, a.content FROM rounds r JOIN artifacts a USING (artifact) WHERE r.round = 1"
    (evaluation,) = rows(demo, joined)
    assert evaluation["stage"] == "evaluate"
    assert set(json.loads(evaluation["content"])) == {"evaluations"}


def test_splits_can_be_shown_to_be_disjoint(demo):
    sql = """SELECT count(*) AS n FROM prompts a JOIN prompts b USING (text, artifact)
             WHERE a.split = 'train' AND b.split = 'eval'"""
    assert rows(demo, sql) == [{"n": 2}]  # the example's prompts all have one text: SQL finds what is not disjoint


REFUSED = [
    "CREATE TABLE t AS SELECT 1",
    "CREATE VIEW rollouts AS SELECT 1",
    "DROP VIEW rollouts",
    "INSERT INTO rollouts VALUES (1)",
    "UPDATE rollouts SET reward = 1",
    "DELETE FROM rollouts",
    "ALTER TABLE rollouts ADD COLUMN x INT",
    "COPY rollouts TO '{path}'",
    "COPY (SELECT 1) TO '{path}' (FORMAT parquet)",
    "EXPORT DATABASE '{path}'",
    "IMPORT DATABASE '{path}'",
    "ATTACH '{path}' AS other",
    "PRAGMA database_list",
    "PRAGMA enable_profiling='json'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "CALL pragma_version()",
    "CHECKPOINT",
    "BEGIN TRANSACTION",
    "PREPARE p AS SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW rollouts",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_all_but_one_select_is_refused_and_writes_nothing(sql, catalog, tmp_path):
    path = tmp_path / "written"
    with pytest.raises(QueryRefused, match="SELECT"):
        catalog.query(sql.replace("{path}", str(path)))
    assert list(tmp_path.iterdir()) == []


OUTSIDE = [
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM read_blob('{file}')",
    "SELECT * FROM read_json('{file}')",
    "SELECT * FROM read_parquet('{file}')",
    "SELECT * FROM parquet_metadata('{file}')",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM sqlite_scan('{file}', 't')",
    "SELECT getenv('HOME')",
    "SELECT * FROM read_text('https://example.org/')",
]


@pytest.mark.parametrize("sql", OUTSIDE)
def test_a_select_reaches_no_file(sql, catalog, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    with pytest.raises(QueryRefused) as refusal:
        catalog.query(sql.replace("{file}", str(secret)).replace("{folder}", str(tmp_path)))
    assert "1,2" not in str(refusal.value)


def test_a_select_reaches_no_python_variable(catalog):
    import pandas

    local = pandas.DataFrame({"a": [1]})
    with pytest.raises(QueryRefused, match="does not exist"):
        catalog.query("SELECT * FROM local")
    assert len(local) == 1


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT count(*) FROM r",
        "SELECT sum(a.range * b.range) FROM range(100000000) a, range(100000000) b",
        "SELECT count(*) FROM tokens a, tokens b, tokens c, tokens d, tokens e, tokens f WHERE a.position > random()",
    ],
)
def test_an_endless_query_ends_at_its_limit(sql, catalog):
    started = time.monotonic()
    with pytest.raises(QueryRefused, match=r"ended after 0\.5 seconds"):
        catalog.query(sql, limit_seconds=0.5)
    assert time.monotonic() - started < 10


def test_a_query_ends_at_its_memory_limit(catalog):
    with pytest.raises(QueryRefused, match="more than 50MB of memory"):
        catalog.query("SELECT list(range) FROM range(1000000000)", memory="50MB")


@pytest.mark.parametrize("memory", ["much", "1GB'; DROP VIEW rollouts; --"])
def test_a_memory_limit_that_is_none_is_refused(memory, catalog):
    with pytest.raises(QueryRefused, match=r"(?i)memory"):
        catalog.query("SELECT 1", memory=memory)


def test_a_result_ends_at_its_row_limit_instead_of_being_cut(catalog):
    assert catalog.query("SELECT * FROM range(10)", max_rows=10).num_rows == 10
    with pytest.raises(QueryRefused, match="more than 9 rows"):
        catalog.query("SELECT * FROM range(10)", max_rows=9)


def test_a_limit_that_is_none_is_refused(catalog):
    with pytest.raises(QueryRefused, match="must be above 0"):
        catalog.query("SELECT 1", limit_seconds=0)


def test_unknown_names_are_answered_with_the_views(catalog):
    with pytest.raises(QueryRefused, match="views: prompts, vocabulary, drafts, rollouts"):
        catalog.query("SELECT * FROM rolouts")


def test_columns_of_equal_name_are_all_kept(catalog):
    assert catalog.query("SELECT 1 AS a, 2 AS a").to_pylist() == [{"a": 1, "a_1": 2}]


def shard_of(root: Path, stage: str, table: str) -> Path:
    return next(iter(sorted((root / "artifacts" / stage).glob(f"*/{table}-*.parquet"))))


def test_a_flipped_bit_never_gives_another_answer(example_store):
    path = shard_of(example_store, "sampled", "sampled")
    good, stat = path.read_bytes(), path.stat()
    catalog = Catalog(Store(example_store))
    sql = "SELECT * FROM tokens ORDER BY ALL"
    answer, noticed = catalog.query(sql), 0
    for position in range(4, len(good), len(good) // 16):
        bad = bytearray(good)
        bad[position] ^= 4
        path.write_bytes(bad)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        try:
            assert catalog.query(sql) == answer
        except CorruptArtifact as error:
            noticed += 1
            assert str(path) in str(error)
        assert noticed == len(list((example_store / "quarantine").rglob("*.parquet")))
    assert noticed >= 12


def test_an_artifact_that_is_gone_is_an_error_not_an_empty_answer(example_store):
    run = Run.open(example_store, "demo")
    key = run.state.rounds[2].stages["rollout"].key
    shard = next((example_store / "artifacts" / "rollout" / key).glob("*.parquet"))
    shard.unlink()
    catalog = Catalog(Store(example_store))
    with pytest.raises(CorruptArtifact, match=f"rollout/{key} .run demo, round 2."):
        catalog.query("SELECT count(*) FROM rollouts")
    assert rows(catalog, "SELECT count(*) AS n FROM evaluations") == [{"n": 20}]
    other = Catalog(Store(example_store), Run.open(example_store, "other"))
    assert rows(other, "SELECT count(*) AS n FROM rollouts") == [{"n": 5}]


def test_hundreds_of_rounds_stay_quick(example_store):
    """A filter on the round prunes: the other rounds' shards are never read."""
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        stages = state.rounds[1].stages
        state.rounds += [RoundState(round=r, stages=stages) for r in range(3, 300)]
        run.save(state)
    catalog = Catalog(Store(example_store), run)
    started = time.monotonic()
    assert rows(catalog, "SELECT count(*) AS n FROM tokens WHERE round = 250") == [{"n": 15}]
    assert rows(catalog, "SELECT count(*) AS n FROM tokens", memory="200MB") == [{"n": 299 * 15}]
    assert time.monotonic() - started < 60


def test_what_a_filter_leaves_out_is_not_read(example_store):
    """Runs and rounds are partitions of one dataset: a damaged shard of another round cannot disturb."""
    rollouts = {r: Run.open(example_store, "demo").state.rounds[r].stages["rollout"].key for r in (1, 2)}
    for shard in (example_store / "artifacts" / "rollout" / rollouts[2]).glob("*.parquet"):
        good, stat = shard.read_bytes(), shard.stat()
        shard.write_bytes(b"PAR1" + bytes(200) + good[204:])
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    catalog = Catalog(Store(example_store))
    assert rows(catalog, "SELECT count(*) AS n FROM tokens WHERE run = 'demo' AND round = 1") == [{"n": 15}]
    with pytest.raises(CorruptArtifact):
        catalog.query("SELECT max(sample_id) AS n FROM tokens WHERE run = 'demo' AND round = 2")


def test_errors_of_rounds_are_computed_from_the_rows_where_the_state_has_none(demo):
    sql = "SELECT round, accuracy_greedy_se AS se, accuracy_greedy_n AS n, accuracy_greedy_prompts AS p FROM rounds"
    found = [tuple(r.values()) for r in rows(demo, sql + " ORDER BY round")]
    # 0, 1 and 2 of 4 prompts are right
    assert found == [(0, 0.0, 4, 4), (1, pytest.approx(0.25), 4, 4), (2, pytest.approx((1 / 12) ** 0.5), 4, 4)]


def test_stages_count_one_pass_once(demo):
    """A training makes three artifacts; their seconds are those of one stage."""
    assert rows(demo, "SELECT sum(seconds) AS s, count(*) AS n FROM stages WHERE stage = 'train'") == [
        {"s": 4.0, "n": 2}
    ]
    (row,) = rows(demo, "SELECT * FROM stages WHERE stage = 'supervise' AND round = 1")
    assert set(dict(row["artifacts"])) == {"sampled", "mask"} and row["state"] == "done"
    sql = "SELECT count(*) AS n FROM stages s JOIN artifacts a USING (artifact) WHERE s.stage = 'evaluate'"
    assert rows(demo, sql) == [{"n": 3}]


def test_differences_in_sql_are_those_of_the_module(example_store_once, catalog):
    store = Store(example_store_once)
    states = {run.name: run.state for run in Run.list(example_store_once)}
    sums = {
        (name, round.round): read_sums(store, evaluation_of(store, round))
        for name, state in states.items()
        for round in state.rounds
    }
    found = rows(catalog, "SELECT * FROM differences")
    assert len(found) == sum(
        len(sums[one].keys() & sums[other].keys()) for one in sums for other in sums if one != other
    )
    for row in found:
        one, other = ((row["run"], row["round"]), (row["other_run"], row["other_round"]))
        expected = difference([(sums[one][row["metric"]], sums[other][row["metric"]])])
        assert row["difference"] == pytest.approx(expected.value, abs=1e-12)
        assert row["se"] == pytest.approx(expected.se, abs=1e-12) and row["prompts"] == expected.prompts
        assert (row["low"], row["high"]) == tuple(pytest.approx(end, abs=1e-12) for end in expected.interval)
        assert row["told_apart"] == expected.told_apart


def test_differences_of_one_run_need_only_its_rows(demo):
    sql = (
        "SELECT difference, prompts, told_apart FROM differences WHERE run = 'demo' AND round = 2 AND other_run = 'demo'"
        " AND other_round = 0 AND metric = 'accuracy_greedy'"
    )
    # two of four prompts are answered now and none was: 0.5 ± 0.29
    assert rows(demo, sql) == [{"difference": 0.5, "prompts": 4, "told_apart": False}]


def test_differences_read_only_the_evaluations_that_the_filter_names(example_store):
    """The evaluation of round 1 is evicted: a scan of it would fail."""
    run, store = Run.open(example_store, "demo"), Store(example_store)
    evict(artifact_directory(example_store, "evaluate", run.state.rounds[1].stages["evaluate"].key))
    sql = "SELECT metric FROM differences WHERE run = 'demo' AND round = 2 AND other_run = 'demo' AND other_round = {}"
    assert len(rows(Catalog(store, run), sql.format(0))) > 0
    with pytest.raises(Evicted, match="evaluations of demo@1"):
        rows(Catalog(store, run), sql.format(1))
