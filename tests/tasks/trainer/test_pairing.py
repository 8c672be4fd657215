"""Which samples of the rollouts are pairs, and what is planned of a step of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.errors import InputError
from tasks.losses.config import PairsConfig
from tasks.trainer.batching import pairs_of
from tasks.trainer.data import Ragged, Samples, loss_denominators
from tasks.trainer.pairing import PairPlanner
from tasks.trainer.planning import planner_of


def rollouts(*rows: tuple[str, int, str]) -> pa.Table:
    """Of (prompt, sample index, who wrote it)."""
    names = ("prompt_id", "sample_index", "behaviour")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    return pa.table({"sample_id": [f"{prompt}/1/{index}" for prompt, index, _ in rows], **columns})


def test_pairs_are_found_by_prompt_and_index_whatever_the_order() -> None:
    first = [("a", 0, "student"), ("b", 1, "teacher"), ("a", 1, "teacher")]
    rows = [*first, ("b", 0, "student"), ("a", 3, "teacher"), ("a", 2, "student")]
    assert pairs_of(rollouts(*rows)).tolist() == [[2, 0], [1, 3], [4, 5]]
    assert pairs_of(rollouts(("a", 0, "teacher"), ("a", 1, "student"))).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", 0, "student"), ("b", 1, "teacher")], r"'a/1/0' \(written by student\) has no partner"),
        ([("a", 0, "student"), ("a", 1, "student")], "'a/1/0' .* partners written by student and student"),
        ([("a", 0, "teacher"), ("a", 1, "teacher")], "partners written by teacher and teacher"),
        ([("a", 0, "student"), ("a", 1, "blended")], "partners written by student and blended"),
        ([("a", 0, "student"), ("a", 1, "teacher"), ("a", 1, "teacher")], "partners written by"),
    ],
)
def test_other_rollouts_are_refused_by_sample(rows: list[tuple[str, int, str]], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        pairs_of(rollouts(*rows))
    assert "rollout.behaviour: pairs" in str(caught.value)


def samples(kept: list[list[int]], pairs: list[list[int]]) -> Samples:
    """Completions whose tokens have these flags of the loss mask."""
    edges = np.cumsum([0, *map(len, kept)])
    tokens = np.zeros(int(edges[-1]), np.int64)
    return Samples(
        ids=[f"s{i}" for i in range(len(kept))],
        prompts=Ragged(np.zeros(len(kept), np.int64), np.arange(len(kept) + 1)),
        completions=Ragged(tokens, edges),
        keep=np.concatenate([np.array(flags, bool) for flags in kept]),
        pairs=np.array(pairs),
    )


KEPT = [[1, 1, 0], [1], [0, 0], [1, 1], [1, 1, 1, 1], [1, 0]]
PAIRS = [[1, 0], [2, 3], [5, 4]]


def by_sample(planner: PairPlanner, rows: list[int], name: str) -> list[Any]:
    """The planned number of each sample's first token."""
    planned = planner(rows, 0)
    assert all(len(values) == sum(len(KEPT[row]) for row in rows) for values in planned.columns.values())
    return planned.columns[name][planned.offsets].tolist()


def test_shares_make_the_mean_over_pairs_that_are_whole() -> None:
    planner, rows = PairPlanner(samples(KEPT, PAIRS)), [4, 5, 2, 3, 1, 0]
    assert by_sample(planner, rows, "pair") == [0, 0, 1, 1, 2, 2]
    assert by_sample(planner, rows, "sign") == [-1, 1, 1, -1, 1, -1]
    share = by_sample(planner, rows, "share")
    assert share[2:4] == [0, 0], "a completion of the second has no token that counts"
    weights = loss_denominators(planner.samples, rows, "token", None)
    count = [sum(KEPT[row]) for row in rows]
    of_pair = [sum(weights[at] * share[at] * count[at] for at in (first, first + 1)) for first in (0, 2, 4)]
    assert of_pair == pytest.approx([1 / 2, 0, 1 / 2])
    assert planner.metrics == {"pairs": 9, "pairs_left_out": 3}  # planned three times


def test_a_pair_that_is_twice_in_a_step_counts_twice() -> None:
    """The end of an epoch and the start of the next."""
    planner = PairPlanner(samples(KEPT, PAIRS))
    assert by_sample(planner, [1, 0, 1, 0], "pair") == [0, 0, 1, 1]
    assert by_sample(planner, [1, 0, 1, 0], "share") == [1, 1, 1, 1]  # six tokens that count, two pairs of three


def test_a_step_that_is_not_pairs_is_an_error() -> None:
    planner = PairPlanner(samples(KEPT, PAIRS))
    for rows in ([1, 0, 2], [1, 2, 0, 3], [0, 4]):
        with pytest.raises(ValueError, match="not one pair after another"):
            planner(rows, 0)


def test_an_objective_of_pairs_has_its_planner_and_no_memory() -> None:
    planner = planner_of(PairsConfig(beta=1.0), samples(KEPT, PAIRS), {})
    assert isinstance(planner, PairPlanner) and planner.memory == {}
    planner.repeat([2, 3], 0)
    assert planner.metrics == {"pairs": 1, "pairs_left_out": 1}
