"""In a large store a query opens the shards alone that it can read, and its answer stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.query import catalog
from storage.query.catalog import Catalog
from storage.runs import Run
from storage.store import Store

STATEMENTS = {
    "SELECT count(*) AS n FROM rollouts WHERE run = 'demo' AND round = 2": {2},
    "SELECT sum(teacher_logprob) AS s, count(*) AS n FROM tokens WHERE run = 'demo' AND round = 1": {1},
    "SELECT * FROM supervision WHERE round >= 1 AND round < 2 AND run = 'demo' ORDER BY ALL": {1},
    "SELECT run, round, count(*) AS n FROM rollouts WHERE run IN ('demo', 'none') OR round = 1 GROUP BY ALL ORDER BY ALL": {
        1,
        2,
    },
    "SELECT sample_id FROM rollouts WHERE length(completion_text) > 12 ORDER BY ALL": {1, 2},
    "SELECT count(*) AS n FROM rollouts AS a JOIN rollouts AS b USING (run, prompt_id) WHERE a.round = 1 AND b.round = 2": {
        1,
        2,
    },
    "WITH last AS (SELECT max(round) AS r FROM rounds WHERE run = 'demo') SELECT count(*) AS n FROM rollouts, last"
    " WHERE run = 'demo' AND round = last.r": {1, 2},
    "SELECT count(*) AS n FROM rollouts WHERE round = 7": set(),
    "SELECT count(*) AS n FROM rollouts WHERE random() < 2 AND round = 1 AND run = 'other'": {1},
}


@pytest.mark.parametrize("sql", STATEMENTS)
def test_the_answer_is_the_same_and_less_is_opened(
    sql: str, example_store_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(example_store_once)
    opened: set[str] = set()
    open_one = store.arrow_dataset

    def watched(artifact, table):
        opened.add(artifact.key)
        return open_one(artifact, table)

    monkeypatch.setattr(store, "arrow_dataset", watched)
    whole = Catalog(store).query(sql)
    everything = set(opened)
    opened.clear()
    monkeypatch.setattr(catalog, "LEAST_SHARDS", 0)
    assert Catalog(store).query(sql).equals(whole)
    state = Run.open(example_store_once, "demo").state
    rollouts = {r: state.rounds[r].stages["rollout"].artifacts["rollout"] for r in (1, 2)}
    assert {r for r, key in rollouts.items() if key in opened} == STATEMENTS[sql]
    assert opened <= everything
