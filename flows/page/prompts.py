"""Held-out prompts of a page: those that got worse, and what the student answered before and after."""

from __future__ import annotations

from typing import Any

from storage.errors import Evicted
from storage.query.catalog import Catalog
from storage.query.questions import question
from storage.runs import Run, RunState

WORSE, DRAWN, TOKENS = 10, 20, 20
"""Rows of the tables."""
LONGEST = 2_000
"""Characters of a text."""


def cut(text: str | None, longest: int = LONGEST) -> str:
    """A text, or its beginning and how much was left out."""
    text = text or ""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def evaluated(state: RunState) -> list[int]:
    """The rounds that were evaluated."""
    return sorted(round.round for round in state.rounds if round.evaluated)


def worse(catalog: Catalog, run: Run) -> list[dict[str, Any]]:
    """The question `worse-prompts` between the first and the last evaluated round; empty where there is only one."""
    return _cut(_asked(catalog, run, "worse-prompts", WORSE)) if len(evaluated(run.state)) > 1 else []


def before_after(catalog: Catalog, run: Run) -> tuple[list[dict[str, Any]], int]:
    """(prompts with the student's answers in the first and last evaluated round, how many prompts both have). The prompts are
    those whose ids have the smallest md5, so that the choice is the same in every round and run."""
    rounds = evaluated(run.state)
    if len(rounds) < 2:
        return [], 0
    rows = catalog.query(_BEFORE_AFTER.format(before=rounds[0], after=rounds[-1], limit=DRAWN)).to_pylist()
    return _cut(rows), rows[0]["prompts"] if rows else 0


def worst_tokens(catalog: Catalog, run: Run, round: int) -> list[dict[str, Any]]:
    """The question `worst-tokens`; empty where the data was removed."""
    try:
        return _asked(catalog, run, "worst-tokens", TOKENS, round=str(round))
    except Evicted:
        return []


_BEFORE_AFTER = """
WITH answers AS (
  SELECT
    round,
    prompt_id,
    any_value(completion_text ORDER BY mode, sample_index) AS answer,
    any_value(correct ORDER BY mode, sample_index) AS correct
  FROM evaluations
  WHERE round IN ({before}, {after})
  GROUP BY ALL
)
SELECT
  prompt_id,
  text AS prompt,
  prompts.answer AS expected,
  old.answer AS answer_before,
  old.correct AS correct_before,
  new.answer AS answer_after,
  new.correct AS correct_after,
  count(*) OVER () AS prompts
FROM answers AS old JOIN answers AS new USING (prompt_id) JOIN prompts USING (prompt_id)
WHERE old.round = {before} AND new.round = {after}
ORDER BY md5(prompt_id)
LIMIT {limit}
"""


def _asked(catalog: Catalog, run: Run, name: str, limit: int, **given: str) -> list[dict[str, Any]]:
    sql = question(name).sql(run.state, given | {"limit": str(limit)})
    return list(catalog.query(sql, limit_seconds=600).to_pylist())


def _cut(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: cut(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]
