"""Completions token by token: what student and teacher made of them. For `opd show`, one; for a page, a sample that is stated."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from storage.query.catalog import Catalog
from storage.query.places import part_names
from storage.runs import RunState

GAPS = (0.5, 2.0, 4.0)
"""Gaps (nats) from which on a token is coloured, more strongly each; below minus the first it has another colour."""
SECONDS = 600
"""Limit of a query."""
_IDS, _NAMED = 40_000, 1_000
"""A statement has at most 100,000 characters: characters of ids in half a sample; ids of tokens that are named one by one."""


@dataclass(frozen=True)
class Sample:
    """Which completions of a round are shown: `ids`, the first `worst` of them for their mean gap; how many the round has."""

    round: int
    ids: tuple[str, ...]
    worst: int
    completions: int
    tokens: int
    supervised: bool


def literal(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def rounds_with_tokens(state: RunState) -> list[int]:
    """The rounds with finished rollouts that both models have scored; where none has been scored, those with rollouts."""

    def finished(stages: Iterable[Any]) -> bool:
        states = [stage.state for stage in stages]
        return bool(states) and all(found in ("done", "cached") for found in states)

    written = [r for r in state.rounds if "rollout" in r.stages and finished([r.stages["rollout"]])]
    scored = [r for r in written if finished(s for label, s in r.stages.items() if label.startswith("supervise"))]
    return sorted(round.round for round in scored or written)


def choose(catalog: Catalog, round: int, budget: int, longest: int) -> Sample:
    """A sample of the round's completions of at most about `budget` tokens, of each completion at most `longest`: half of it the
    completions with the largest mean gap, half those whose ids have the smallest sha256. The same in every call."""
    found = catalog.query(
        "SELECT sample_id, count(*) AS tokens, avg(gap) FILTER (isfinite(gap)) AS gap"
        f" FROM tokens WHERE round = {round} GROUP BY sample_id",
        limit_seconds=SECONDS,
    ).to_pylist()
    supervised = any(row["gap"] is not None for row in found)
    drawn = sorted(found, key=lambda row: hashlib.sha256(row["sample_id"].encode()).digest())
    scored = [row for row in drawn if row["gap"] is not None]
    worst = _within(sorted(scored, key=lambda row: -row["gap"]), budget // 2, longest)
    first = {row["sample_id"] for row in worst}
    left = budget - sum(min(row["tokens"], longest) for row in worst)
    others = _within([row for row in drawn if row["sample_id"] not in first], left, longest)
    ids = tuple(row["sample_id"] for row in (*worst, *others))
    return Sample(round, ids, len(worst), len(found), sum(row["tokens"] for row in found), supervised)


def _within(rows: Sequence[dict[str, Any]], budget: int, longest: int) -> list[dict[str, Any]]:
    """The first rows whose tokens and ids fit; at least one, where there is one and some budget."""
    tokens = itertools.accumulate(min(row["tokens"], longest) for row in rows)
    written = itertools.accumulate(len(row["sample_id"]) + 4 for row in rows)
    ends = enumerate(zip(rows, tokens, written, strict=True))
    return [row for place, (row, end, text) in ends if (end <= budget and text <= _IDS) or place == 0 < budget]


def read(
    catalog: Catalog, round: int, ids: Sequence[str], top: int, longest: int | None = None
) -> list[dict[str, Any]]:
    """These completions in this order; ids that the round has not are left out. Each with prompt, text, `judged` (reward,
    feedback, failed; None where nothing judged it) and `tokens`, of which the first `longest`. A token has its probabilities and,
    None where the run stored no list, `teacher_top` and `student_top` (lists of (token, probability by the list's model, by the
    teacher where the list is the student's)) and `divergence` (nats: the reverse KL over the student's list, with the rest as
    one category)."""
    where = f"round = {round} AND sample_id IN ({', '.join(map(literal, ids))})"
    columns = (
        "sample_id, prompt_id, round, behaviour, finish_reason, completion_text, len(completion_token_ids) AS length"
    )
    rows = _query(catalog, f"SELECT {columns} FROM rollouts WHERE {where}")
    by_id = {row["sample_id"]: row | {"prompt": None, "judged": None, "tokens": []} for row in rows}
    for row in _query(
        catalog, f"SELECT {_TOKEN} FROM tokens WHERE {where}{_first(longest)} ORDER BY sample_id, position"
    ):
        by_id[row.pop("sample_id")]["tokens"].append(row)
    for row in _query(catalog, f"SELECT sample_id, reward, feedback, failed FROM rewards WHERE {where}"):
        by_id[row.pop("sample_id")]["judged"] = row
    lists = {row.pop("sample_id"): row for row in _query(catalog, _lists(where, top, longest))}
    names = names_of(catalog, lists.values())
    for name, row in by_id.items():
        for place, token in enumerate(row["tokens"]):
            token |= _tops(lists[name], place, names)
    texts = ", ".join(map(literal, {row["prompt_id"] for row in rows})) or "NULL"
    prompts = _query(
        catalog, f"SELECT prompt_id, any_value(text) AS text FROM prompts WHERE prompt_id IN ({texts}) GROUP BY ALL"
    )
    text_of = {row["prompt_id"]: row["text"] for row in prompts}
    for row in rows:
        by_id[row["sample_id"]]["prompt"] = text_of.get(row["prompt_id"])
    return [by_id[name] for name in ids if name in by_id]


_TOKEN = (
    "sample_id, position, token_id, token, coalesce(student_logprob, sampling_logprob) AS student_logprob, teacher_logprob, gap,"
    " teacher_mass, reasons, text_offset, text_length"
)


def _query(catalog: Catalog, sql: str) -> list[dict[str, Any]]:
    return list(catalog.query(sql, limit_seconds=SECONDS).to_pylist())


def _first(longest: int | None) -> str:
    return "" if longest is None else f" AND position < {longest}"


def _lists(where: str, top: int, longest: int | None) -> str:
    """The first entries of both models' lists, and `divergence` of `read`."""
    tokens = "" if longest is None else f"[1:{longest}]"
    kept = {
        "teacher": "teacher_topk_ids",
        "teacher_logprobs": "teacher_topk_logprobs",
        "student": "student_topk_ids",
        "student_logprobs": "student_topk_student_logprobs",
        "student_teacher": "student_topk_teacher_logprobs",
    }
    columns = ", ".join(f"[k[1:{top}] FOR k IN {column}{tokens}] AS {name}" for name, column in kept.items())
    parts = [*list(kept.values())[3:], "student_topk_student_tail_logmass", "student_topk_teacher_tail_logmass"]
    zipped = f"list_zip({', '.join(part + tokens for part in parts)})"
    rest = "CASE WHEN isfinite(t[3]) AND isfinite(t[4]) THEN exp(t[3]) * (t[3] - t[4]) ELSE 0 END"
    divergence = f"[list_sum([exp(e[1]) * (e[1] - e[2]) FOR e IN list_zip(t[1], t[2])]) + {rest} FOR t IN {zipped}]"
    return f"SELECT sample_id, {columns}, {divergence} AS divergence FROM supervision WHERE {where}"


def names_of(catalog: Catalog, lists: Iterable[dict[str, Any]]) -> dict[int, str]:
    """By id the text of every token in the lists; of one that is no text alone its bytes or name, as in `tokens`."""
    ids = {i for row in lists for model in ("teacher", "student") for kept in row[model] or () for i in kept}
    wanted = f" AND id IN ({', '.join(map(str, sorted(ids))) or 'NULL'})" if len(ids) < _NAMED else ""
    rows = _query(catalog, f"SELECT id, token, text FROM vocabulary WHERE tokenizer = 'student'{wanted}")
    parts = part_names(pa.array([row["token"] for row in rows], pa.string())).to_pylist()
    return {row["id"]: part if row["text"] is None else row["text"] for row, part in zip(rows, parts, strict=True)}


def _tops(lists: dict[str, Any], place: int, names: dict[int, str]) -> dict[str, Any]:
    """`teacher_top`, `student_top` and `divergence` of a token."""

    def of(ids: str, *logprobs: str) -> list[tuple[str | float, ...]] | None:
        if lists[ids] is None:
            return None
        columns = [lists[name][place] for name in logprobs if lists[name] is not None]
        return [
            (names.get(token, str(token)), *map(math.exp, values))
            for token, *values in zip(lists[ids][place], *columns, strict=True)
        ]

    return {
        "divergence": None if lists["student"] is None else lists["divergence"][place],
        "teacher_top": of("teacher", "teacher_logprobs"),
        "student_top": of("student", "student_logprobs", "student_teacher"),
    }
