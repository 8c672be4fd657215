"""Bad numbers never reach the loss (row 7): in shards whose digests are right, and from engines. What may be left out is
masked and counted, its neighbours stay; all else is refused with the sample's name before any training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from clean_round import NAMES, ROWS, Rows, rows, same_neighbours
from fault_trials import Trials, both_forms
from whole_round import from_rollouts

from storage.errors import InputError
from storage.schemas import MaskReason, schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.trainer.checks import mass_limit
from tasks.trainer.data import Samples

LOGPROBS = ("rollouts.sampling_logprobs", "sampled.student_logprobs", "sampled.teacher_logprobs",
            "sampled.behaviour_logprobs")  # fmt: skip
ENTROPIES = ("sampled.student_entropy", "sampled.teacher_entropy")
TAILS = ("teacher_topk.tail_logmass", "student_topk.student_tail_logmass", "student_topk.teacher_tail_logmass")
LISTS = ("teacher_topk.logprobs", "student_topk.student_logprobs", "student_topk.teacher_logprobs")
RANKED = LISTS[:2]
IDS = ("teacher_topk.ids", "student_topk.ids")
IDS_OF_SAMPLES = ("rollouts.completion_token_ids", "rollouts.prompt_token_ids")
OF_TOKENS = (
    *LOGPROBS,
    *ENTROPIES,
    *TAILS,
    *LISTS,
    *IDS,
    "mask.mask_reasons",
    "teacher_topk.valid",
    "student_topk.valid",
)


@dataclass
class Place:
    """A token of a round in whose numbers something is changed."""

    made: Rows
    draw: random.Random
    sample: int
    token: int

    def change(self, column: str, value: Any) -> str:
        """Sets the token's number, or one of its list; returns the column."""
        table, _, name = column.partition(".")
        cell = self.made[table][self.sample][name]
        if column in LISTS + IDS:
            cell[self.token][self.draw.randrange(len(cell[self.token]))] = value
        else:
            cell[self.token] = value
        return column

    def of(self, column: str) -> list[Any]:
        """The token's list."""
        table, _, name = column.partition(".")
        return self.made[table][self.sample][name][self.token]


def nan(at: Place) -> str:
    return at.change(at.draw.choice((*LOGPROBS, *ENTROPIES, *TAILS, *LISTS)), math.nan)


def plus_infinite(at: Place) -> str:
    return at.change(at.draw.choice((*LOGPROBS, *ENTROPIES, *TAILS, *LISTS)), math.inf)


def minus_infinite(at: Place) -> str:
    """In a list it is a probability of zero, which is none of these."""
    return at.change(at.draw.choice((*LOGPROBS, *ENTROPIES)), -math.inf)


def above(at: Place) -> str:
    column = at.draw.choice((*LOGPROBS, *ENTROPIES, *TAILS, *LISTS))
    size = 10 ** at.draw.uniform(-2.9, 30)
    return at.change(column, -size if column in ENTROPIES else size)


def unsorted(at: Place) -> str:
    column = at.draw.choice(RANKED)
    values = at.of(column)
    places = range(len(values))
    low, high = at.draw.choice([(a, b) for a in places for b in places if values[a] > values[b]])
    values[low], values[high] = values[high], values[low]
    return column


def foreign_id(at: Place) -> str:
    return at.change(at.draw.choice(IDS), at.draw.choice([-1, -(2**31), ROWS, ROWS + 1, 2**31 - 1]))


def twice(at: Place) -> str:
    column = at.draw.choice(IDS)
    ids = at.of(column)
    low, high = at.draw.sample(range(len(ids)), 2)
    ids[low] = ids[high]
    return column


def fewer_than_counted(at: Place) -> str:
    table = at.draw.choice(("teacher_topk", "student_topk"))
    cut = at.draw.randint(1, len(at.of(f"{table}.ids")))
    for column in (*LISTS, *IDS):
        if column.startswith(table):
            del at.of(column)[-cut:]
    return f"{table}.valid"


def mass(at: Place) -> str:
    """From a little more than what rounding explains to twice what there is."""
    number = at.draw.randrange(len(LISTS))
    table, _, column = LISTS[number].partition(".")
    every = [value for row in at.made[table] for cell in row[column] for value in cell]
    limit = mass_limit(np.array(every, np.float32), len(at.of(LISTS[number])))
    listed = sum(map(math.exp, at.of(LISTS[number])))
    excess = limit * (1 + 10 ** at.draw.uniform(-5, 0)) - listed
    at.change(TAILS[number], min(0.0, math.log(excess)))
    return LISTS[number]


VALUES: dict[str, Callable[[Place], str]] = {
    "NaN": nan,
    "+inf": plus_infinite,
    "-inf": minus_infinite,
    "log-probabilities > 0, entropies < 0": above,
    "unsorted lists": unsorted,
    "ids out of range in lists": foreign_id,
    "an id twice in a list": twice,
    "lists shorter than counted": fewer_than_counted,
    "mass > 1 + tolerance": mass,
}
"""Faults of one token, which the mask may take out."""


def round_of(name: str) -> tuple[Callable[[], Rows], random.Random, tuple[int, ...]]:
    """A maker of a clean round, a source of numbers, and the samples' lengths; all depend on the name alone."""
    draw = random.Random(name)
    lengths = tuple(draw.randint(1, 8) for _ in range(draw.randint(2, 6)))
    seed, k, compact = draw.randrange(2**32), draw.randint(2, ROWS), draw.random() < 0.5
    return (lambda: rows(seed, lengths, k, compact)), draw, lengths


def commit(store: Store, made: Rows, tag: str) -> dict[str, Artifact]:
    """The tables in the store, two shards each, by the real writer: their digests are right, whatever they hold."""
    found = {}
    for name in NAMES:
        with store.building(ArtifactSpec.of(name, 1, {"tag": tag}, {})) as builder:
            half = len(made[name]) // 2
            for shard, part in enumerate((made[name][:half], made[name][half:])):
                builder.write_shard(name, shard, pa.Table.from_pylist(part, schema_for(name)))
            found[name] = builder.commit(tables={name: 2})
        assert store.verify(found[name], move=False) == []
    return found


def load(store: Store, made: dict[str, Artifact]) -> Samples:
    """As the trainer does."""
    tables = {name: store.read_table(artifact, name) for name, artifact in made.items()}
    needs = DirectConfig(support=TopkSupport(kind="union", k=2)).needs()
    return from_rollouts(tables.pop("rollouts"), tables, needs, [MaskReason.SPECIAL_TOKEN], rows=ROWS)


@pytest.mark.parametrize("fault", VALUES)
@both_forms(short=3, full=200)
def test_a_bad_number_in_a_shard(trials: Trials, tmp_path: Path, fault: str, count: int) -> None:
    store = Store(tmp_path / "store")

    def attempt(name: str) -> None:
        fresh, draw, lengths = round_of(f"{fault} {name}")
        sample = draw.randrange(len(lengths))
        made, token = fresh(), draw.randrange(lengths[sample])
        column = VALUES[fault](Place(made, draw, sample, token))
        with pytest.raises(InputError) as refused:
            load(store, commit(store, made, f"{name} bad"))
        message = str(refused.value)
        # a value may break an earlier rule too: a list's tail is looked at with the list
        table = column.partition(".")[0]
        assert message.startswith(f"{table}."), message
        assert f": sample 'p{sample}/1/0', token {token}: found " in message, message
        made["mask"][sample]["mask_reasons"][token] = int(MaskReason.INVALID_VALUE)
        found, clean = (
            load(store, commit(store, which, f"{name} {tag}")) for which, tag in ((made, "masked"), (fresh(), ""))
        )
        same_neighbours(found, clean, sum(lengths[:sample]) + token)

    trials(7, f"in shards: {fault}", map(str, range(count)), attempt)


@both_forms(short=8, full=200)
def test_a_list_of_another_length_in_a_shard(trials: Trials, tmp_path: Path, count: int) -> None:
    store = Store(tmp_path / "store")

    def attempt(name: str) -> None:
        fresh, draw, lengths = round_of(f"length {name}")
        made, column, sample = fresh(), draw.choice(OF_TOKENS), draw.randrange(len(lengths))
        table, _, cell = column.partition(".")
        values = made[table][sample][cell]
        if draw.random() < 0.5:
            del values[draw.randrange(len(values))]
        else:
            values.append(values[0])
        message = rf"^{column}: sample 'p{sample}/1/0' has {len(values)} values for {lengths[sample]} completion tokens"
        with pytest.raises(InputError, match=message):
            load(store, commit(store, made, name))

    trials(7, "in shards: fewer or more values than tokens", map(str, range(count)), attempt)


@both_forms(short=3, full=200)
def test_token_ids_out_of_range_in_a_shard(trials: Trials, tmp_path: Path, count: int) -> None:
    """They are inputs too: no mask takes them out."""
    store = Store(tmp_path / "store")

    def attempt(name: str) -> None:
        fresh, draw, lengths = round_of(f"ids {name}")
        made, column, sample = fresh(), draw.choice(IDS_OF_SAMPLES), draw.randrange(len(lengths))
        ids = made["rollouts"][sample][column.partition(".")[2]]
        token, bad = draw.randrange(len(ids)), draw.choice([-1, -(2**31), ROWS, 2**31 - 1])
        ids[token] = bad
        if draw.random() < 0.5:
            made["mask"][sample]["mask_reasons"] = [int(MaskReason.INVALID_VALUE)] * lengths[sample]
        with pytest.raises(
            InputError, match=rf"^{column}: sample 'p{sample}/1/0', token {token}: found {bad}; ids are"
        ):
            load(store, commit(store, made, name))

    trials(7, "in shards: token ids out of range", map(str, range(count)), attempt)
