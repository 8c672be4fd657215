"""The questions about overlap, entropies, lengths and rewards on a small store with known lists, against numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_store import commit, evaluation, prepared, rollouts, stage, steps
from places import TINY

from flows.experiment import load_experiment
from storage.query.catalog import Catalog
from storage.query.questions import question
from storage.runs import RoundState, Run
from storage.store import Store
from storage.upkeep.gc import evict

N, T, VOCABULARY = 6, 5, 12
"""Samples of two prompts each, tokens of each, ids in the lists."""


def lists(random: np.random.Generator, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(distributions, ids of their k likeliest), T of each."""
    p = random.dirichlet(np.ones(VOCABULARY), T)
    return p, np.argsort(-p, axis=1)[:, :k]


def signals(name: str, round: int) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, float]]]:
    """Tables of rollouts and signals with lists of 4 and 5 ids, and per token what the lists have in common, by numpy."""
    random, tables, expected = np.random.default_rng(round), rollouts(name, round, N, T), []
    tables["student_topk"], tables["teacher_topk"] = [], []
    for place, row in enumerate(tables["sampled"]):
        (p, mine), (q, its) = lists(random, 4), lists(random, 5)
        at = np.arange(T)[:, None]
        tail = [math.log(0.1)] * T
        tables["student_topk"].append(
            {"sample_id": row["sample_id"], "ids": mine.tolist(), "valid": [4] * T}
            | {"student_logprobs": np.log(p[at, mine]).tolist(), "teacher_logprobs": np.log(q[at, mine]).tolist()}
            | {"student_tail_logmass": tail, "teacher_tail_logmass": tail}
        )
        tables["teacher_topk"].append(
            {"sample_id": row["sample_id"], "ids": its.tolist(), "valid": [5] * T, "tail_logmass": tail}
            | {"logprobs": np.log(q[at, its]).tolist()}
        )
        row["student_entropy"], row["teacher_entropy"] = random.random((2, T)).tolist()
        if place == 1:
            row["student_entropy"][0] = math.nan
        for t in range(T):
            common = sorted(set(mine[t]) & set(its[t][:4]))
            one, other = p[t, common], q[t, common]
            there = bool(common)
            advantage = (
                np.mean(one / one.sum() * np.log(other / other.sum() / (one / one.sum()))) if there else math.nan
            )
            expected.append(
                {"position": t, "ratio": len(common) / 4, "p": one.sum(), "q": other.sum(), "advantage": advantage}
                | {"student": row["student_entropy"][t], "teacher": row["teacher_entropy"][t]}
            )
    return tables, expected


REWARDS = {1: [1, 0, 1, 1, 0, 0, 1, None, None, None, 0.5, 0.2], 2: [0.9, 0.9, 0.1, 0.1, 0.4, 0.8]}
"""By round, two samples of every prompt."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Run, dict[int, list[dict[str, float]]]]:
    """A store with two rounds: round 1 with all signals, round 2 without the student's list and without its entropies."""
    root = tmp_path_factory.mktemp("diagnostics") / "store"
    store, expected, states = Store(root), {}, []
    first = {"prepare": stage(prepare=prepared(store)), "evaluate": stage(evaluate=_evaluated(store, 0))}
    states.append(RoundState(round=0, student_sha256="0" * 64, stages=first))
    for number in (1, 2):
        tables, expected[number] = signals("one", number)
        if number == 2:
            del tables["student_topk"]
            for row in tables["sampled"]:
                row["student_logprobs"] = row["student_entropy"] = None
        trained = [row | {"overlap_ratio": 0.5 + n / 10, "tokens": n} for n, row in enumerate(steps(number, 3), 1)]
        judged = [
            {"sample_id": f"train{place // 2}/{number}/{place % 2}", "reward": reward, "parts": None}
            | {"failed": "no" if reward is None else None}
            for place, reward in enumerate(REWARDS[number])
        ]
        written = commit(store, "rollout", number, {"rollouts": tables.pop("rollouts")})
        made = {name: commit(store, name, number, {name: rows}) for name, rows in tables.items()}
        stages = {"rollout": stage(rollout=written), "supervise": stage(**made)}
        stages["judge"] = stage(judge=commit(store, "judge", number, {"rewards": judged}))
        stages["train"] = stage(train=commit(store, "train", number, {"training_steps": trained}))
        stages["evaluate"] = stage(evaluate=_evaluated(store, number))
        metrics = {"train_routed_samples": 0.25} if number == 2 else {}
        states.append(RoundState(round=number, student_sha256=f"{number:064x}", metrics=metrics, stages=stages))
    run = Run.create(root, "one", load_experiment(TINY).model_dump(mode="json"), {"name": "one"})
    with run.lock():
        state = run.state
        state.status, state.rounds = "finished", states
        run.save(state)
    return store, run, expected


def _evaluated(store: Store, round: int) -> Any:
    rows = [row | {"tokens": int(row["prompt_id"][4:]) + round} for row in evaluation(round)]
    return commit(store, "evaluate", round, {"evaluations": rows})


@pytest.fixture
def ask(made):
    store, run, _ = made
    return lambda name, **given: (
        Catalog(store, run)
        .query(question(name).sql(run.state, {key: str(value) for key, value in given.items()}))
        .to_pylist()
    )


def means(tokens: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.nanmean([token[name] for token in tokens])) for name in ("ratio", "p", "q", "advantage")}


def test_overlap_is_that_of_the_papers_formulas(made, ask):
    tokens = made[2][1]
    (row,) = ask("overlap", round=1)
    assert (row["tokens"], row["k"], row["to_position"]) == (N * T, 4, T - 1)
    assert row["not_stored"] is row["unfinished"] is None
    names = {"ratio": "overlap_ratio", "p": "student_mass", "q": "teacher_mass", "advantage": "advantage"}
    assert {name: row[names[name]] for name in names} == pytest.approx(means(tokens), rel=1e-5)
    assert row["trained_overlap_ratio"] == pytest.approx((0.6 * 1 + 0.7 * 2 + 0.8 * 3) / 6)
    assert row["advantage"] < 0 < row["overlap_ratio"] < 1
    ranges = ask("overlap", round=1, by="position")
    assert [(r["from_position"], r["to_position"]) for r in ranges] == [(0, 0), (1, 2), (3, 4)]
    for found in ranges:
        own = [token for token in tokens if found["from_position"] <= token["position"] <= found["to_position"]]
        assert {name: found[names[name]] for name in names} == pytest.approx(means(own), rel=1e-5)


def test_overlap_is_null_where_a_list_is_not_stored_and_says_which(ask):
    (row,) = ask("overlap", round=2)
    assert row["not_stored"] == "student_topk" and row["trained_overlap_ratio"] == pytest.approx(44 / 60)
    assert row["unfinished"] is None
    others = {"from_position", "to_position", "tokens", "k", "overlap_ratio", "student_mass", "teacher_mass"}
    assert all(row[name] is None for name in others | {"advantage"})


@pytest.mark.parametrize(
    ("states", "unfinished"),
    [
        ({"supervise": "running", "train": None}, "supervise"),
        ({"supervise": "done", "supervise_other": "running", "train": None}, "supervise"),
        ({"supervise": "done", "train": None}, "supervise"),  # another teacher may follow
        ({"supervise": "running", "train": "done"}, "supervise"),  # it is made again
        ({"supervise": "done", "train": "running"}, "train"),
        ({"supervise": "done", "train": "failed"}, "train"),
    ],
)
def test_overlap_of_a_round_that_is_not_finished_says_so(
    made, states: dict[str, Any], unfinished: str, tmp_path: Path
) -> None:
    """What is committed of the round is not taken for all of it, and what is not there yet not for something never stored."""
    store, run, _ = made
    going_on = run.state.model_copy(deep=True)
    stages = going_on.rounds[1].stages
    for label, state in states.items():
        if state is None:
            del stages[label]
        else:
            stages[label] = stages.get(label, stages["supervise"]).model_copy(update={"state": state})
    other = Run.create(tmp_path, "one", run.experiment, run.identity)
    with other.lock():
        other.save(going_on)
    (row,) = Catalog(store, other).query(question("overlap").sql(going_on, {"round": "1"})).to_pylist()
    assert (row["unfinished"], row["not_stored"], row["trained_overlap_ratio"]) == (unfinished, None, None)
    assert (row["overlap_ratio"] is None) == (row["tokens"] is None) == (unfinished == "supervise")


def test_entropies_by_position_leave_out_what_is_not_finite(made, ask):
    tokens = made[2][1]
    rows = ask("entropy-by-position", round=1)
    assert [(row["from_position"], row["to_position"], row["tokens"]) for row in rows] == [
        (0, 0, N), (1, 2, 2 * N), (3, 4, 2 * N),
    ]  # fmt: skip
    for row in rows:
        own = [token for token in tokens if row["from_position"] <= token["position"] <= row["to_position"]]
        student, teacher = (np.array([token[name] for token in own]) for name in ("student", "teacher"))
        wanted = (np.nanmean(student), teacher.mean(), np.nanmean(np.abs(teacher - student)))
        assert (row["student_entropy"], row["teacher_entropy"], row["entropy_gap"]) == pytest.approx(wanted, rel=1e-5)
    alone = ask("entropy-by-position", round=2)
    assert all(row["student_entropy"] is row["entropy_gap"] is None for row in alone)
    assert all(0 < row["teacher_entropy"] < 1 for row in alone)


def test_lengths_of_held_out_completions(ask):
    found = {(row["round"], row["verdict"]): row for row in ask("lengths")}
    assert set(found) == {(number, verdict) for number in range(3) for verdict in ("right", "wrong")}
    for (number, verdict), row in found.items():
        own = [n + number for n in range(30) if (n % 2 == number % 2) == (verdict == "right")]
        assert (row["mode"], row["n"], row["prompts"]) == ("greedy", 15, 15)
        assert row["mean_length"] == pytest.approx(np.mean(own))
        assert row["se"] == pytest.approx(np.std(own, ddof=1) / 15**0.5)  # one completion per prompt


def test_lengths_of_rollouts_follow_their_rewards(ask):
    """Of the judged samples three are among the rollouts, with rewards of 0.9, 0.1 and 0.4."""
    found = ask("lengths", of="rollouts", first=2)
    assert [(row["round"], row["verdict"], row["n"], row["mean_length"]) for row in found] == [
        (2, "right", 1, T), (2, "wrong", 2, T),
    ]  # fmt: skip
    assert {row["round"] for row in ask("lengths", of="rollouts")} == {1, 2}
    assert [row["n"] for row in ask("lengths", of="rollouts", first=2, success=0.05)] == [3]


def test_rewards_and_groups_of_every_round(ask):
    one, two = ask("reward-by-round")
    assert (one["round"], two["round"], one["routed"], two["routed"]) == (1, 2, None, 0.25)
    groups = [[1, 0], [1, 1], [0, 0], [1], [], [0.5, 0.2]]
    known = [reward for group in groups for reward in group]
    mean = sum(known) / len(known)
    moved = [(sum(group) - len(group) * mean) / len(known) for group in groups if group]
    error = math.sqrt(5 / 4 * sum(by * by for by in moved))
    assert (one["reward"], one["se"]) == pytest.approx((mean, error))
    assert (one["n"], one["failed"], one["success_rate"]) == (9, 3, pytest.approx(5 / 9))
    counted = {name: one[name] for name in ("groups", "all_right", "all_wrong", "mixed", "without_signal")}
    assert counted == {"groups": 6, "all_right": 2, "all_wrong": 1, "mixed": 2, "without_signal": 4}
    assert [two[name] for name in ("groups", "all_right", "all_wrong", "mixed")] == [3, 1, 1, 1]
    assert ask("reward-by-round", success=0.95)[1]["all_wrong"] == 3


def test_rounds_that_were_removed_hide_nothing_else(made, ask):
    store, run, _ = made
    evict(store.root / "artifacts" / "rollout" / run.state.rounds[1].stages["rollout"].artifacts["rollout"])
    assert len(ask("lengths")) == 6 and len(ask("reward-by-round")) == 2
    assert {row["round"] for row in ask("lengths", of="rollouts", first=2)} == {2}
    with pytest.raises(Exception, match=r"evicted are the rollouts of one@1"):
        ask("lengths", of="rollouts")
