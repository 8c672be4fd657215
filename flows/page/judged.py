"""Rewards of a page: by round with their errors, the groups of a round, and when a completion counts as right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.page.curves import by_round, number
from flows.page.facts import RunFacts
from flows.run.figures import DIAGNOSED, REWARD
from storage.query.catalog import Catalog
from storage.query.questions import question
from storage.runs import Run
from storage.store import Store

FIGURES = (REWARD, *(figure for figure in DIAGNOSED if figure.metric.startswith("judge_")))
HEADINGS = (
    "round",
    "reward",
    "judged",
    "no reward",
    "groups",
    "all right",
    "all wrong",
    "mixed",
    "no signal",
    "routed",
)
_BINARY = 0.5


def threshold(fact: RunFacts) -> float | None:
    """The reward from which the run's metrics count a rollout as right; None where they count none."""
    judge = fact.experiment.get("judge") or {}
    if (given := judge.get("success_threshold")) is not None:
        return float(given)
    counted = any(round.metrics.get("judge_success_rate") is not None for round in fact.state.rounds)
    return _BINARY if counted else None


def has_rewards(fact: RunFacts) -> bool:
    """Whether any of its rounds was judged."""
    return any(
        stage.state in ("done", "cached")
        for round in fact.state.rounds
        for label, stage in round.stages.items()
        if label == "judge"
    )


def rewards(store: Store, runs: Sequence[Run], facts: Sequence[RunFacts]) -> dict[str, Any]:
    """`tables`: (run, rows of `HEADINGS`); `charts`: curves by round of `FIGURES`; `groups`: bars, a chart per run. Empty where
    no run was judged."""
    judged = [(run, fact) for run, fact in zip(runs, facts, strict=True) if has_rewards(fact)]
    tables, groups = [], []
    for run, fact in judged:
        least = threshold(fact)
        asked = question("reward-by-round").sql(run.state, {} if least is None else {"success": repr(least)})
        rows = Catalog(store, run).query(asked, limit_seconds=600).to_pylist()
        tables.append((run.name, [_cells(row, least) for row in rows]))
        groups.append({"run": run.name, "rounds": [row["round"] for row in rows], "bars": _bars(rows, least)})
    charts = by_round({fact.name: fact.state for _, fact in judged}, FIGURES)
    return {"tables": tables, "charts": charts, "groups": groups}


def _cells(row: Mapping[str, Any], least: float | None) -> list[str]:
    error = "" if row["se"] is None else f" ± {row['se']:.3f}"
    counts = [f"{row[name]:,}" for name in ("n", "failed", "groups")]
    sides = [f"{row[name]:,}" if least is not None else "" for name in ("all_right", "all_wrong", "mixed")]
    routed = "" if row["routed"] is None else f"{row['routed']:.1%}"
    reward = "" if row["reward"] is None else f"{row['reward']:.3f}{error}"
    return [str(row["round"]), reward, *counts, *sides, f"{row['without_signal']:,}", routed]


def _bars(rows: Sequence[Mapping[str, Any]], least: float | None) -> dict[str, list[float | None]]:
    """By what the groups are: how many of each round."""
    if least is None:
        kinds = {
            "different rewards": [row["groups"] - row["without_signal"] for row in rows],
            "no signal": [row["without_signal"] for row in rows],
        }
    else:
        kinds = {name.replace("_", " "): [row[name] for row in rows] for name in ("all_right", "mixed", "all_wrong")}
        known = [sum(counts) for counts in zip(*kinds.values(), strict=True)]
        kinds["not judged"] = [row["groups"] - of for row, of in zip(rows, known, strict=True)]
    return {kind: [number(count) for count in counts] for kind, counts in kinds.items() if any(counts)}
