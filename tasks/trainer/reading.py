"""The tables of a training, read shard by shard: rollouts with the signals of the same samples, or the targets of a warm-up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import InputError
from storage.schemas import MaskReason
from storage.store import Store
from tasks.losses.needs import Needs
from tasks.routing import teacher_of_prompts
from tasks.signals import signal_named
from tasks.signals.stop_ids import merge_stop_ids
from tasks.trainer.batching import pairs_of
from tasks.trainer.columns import Collected, collect
from tasks.trainer.data import (
    Samples,
    from_prompts,
    of_samples,
    order_of,
    part_of_round,
    places_of,
    with_segments,
    with_spans,
    with_teachers,
    with_width,
    without_those_that_lack,
)
from tasks.workers.jobs import ArtifactRef, TrainJob, WarmupJob

WARMUP = "warmup"


def collect_round(
    job: TrainJob,
    needs: Needs,
    mask_reasons: Collection[MaskReason],
    rows: int,
    store: Store,
    folder: Path,
    every_context: bool = False,
) -> Collected:
    """The samples of the job's rollouts, in their order, checked (`part_of_round`). `rows`: of the student's vocabulary.
    `every_context`: samples without a context stay in the loss, because the objective tells them apart."""
    rollouts = Table(store, [job.rollouts], "rollouts")
    wanted = ["sample_id", "prompt_id", *(["finish_reason"] if needs.credit.ended else [])]
    wanted += ["sample_index", "behaviour"] if needs.pairs else []
    samples = pa.concat_tables([read(wanted) for read in rollouts.shards])
    ids = samples["sample_id"].to_pylist()
    places_of("rollouts", ids)
    rewards = _rewards(store, job)
    if rewards is not None:
        rewards = rewards.take(order_of("rewards", rewards["sample_id"].to_pylist(), ids))
    per_sample = of_samples(samples, needs.credit, rewards)
    pairs = pairs_of(samples) if needs.pairs else None
    contexts = None if job.contexts is None else _contexts(store, job.contexts, ids)
    signals = {name: Signal(store, places, name, ids) for name, places in job.signals.items()}

    def parts() -> Iterator[Samples]:
        start = 0
        for read in rollouts.shards:
            shard = merge_stop_ids(read(None), job.stop_ids)
            own = np.arange(start, start + len(shard))
            given = {name: signal.rows_of(own) for name, signal in signals.items()}
            part = part_of_round(shard, given, needs, mask_reasons, job.seed, rows)
            if needs.credit.spans and rewards is not None:
                part = with_spans(part, rewards.slice(start, len(shard)))
            if needs.credit.judged_segments and rewards is not None:
                part = with_segments(part, rewards.slice(start, len(shard)))
            yield part if contexts is None or every_context else without_those_that_lack(part, contexts[own])
            start += len(shard)

    found = collect(parts(), folder)
    cut = [name for name, places in job.signals.items() if any(_cut_off(store, where) for where in places)]
    whole = with_width(replace(found.samples, **per_sample, contexts=contexts, pairs=pairs), needs, cut)
    if job.prompts is not None:
        of = teacher_of_prompts(store, store.require(job.prompts.stage, job.prompts.key))
        whole = with_teachers(whole, [of.get(prompt) or "" for prompt in samples["prompt_id"].to_pylist()])
    return replace(found, samples=whole)


def _rewards(store: Store, job: TrainJob) -> pa.Table | None:
    """Of the samples that were judged the reward, spans and segments."""
    if job.judged is None:
        return None
    columns = ["sample_id", "reward", "segment_ends", "span_starts", "span_ends", "span_kinds"]
    return pa.concat_tables([read(columns) for read in Table(store, [job.judged], "rewards").shards])


def _contexts(store: Store, where: ArtifactRef, ids: list[str]) -> np.ndarray:
    """bool per sample of the rollouts: whether it has a context. InputError unless the table has each sample once."""
    rows = pa.concat_tables(
        [read(["sample_id", "prompt_token_ids"]) for read in Table(store, [where], "contexts").shards]
    )
    order = order_of("contexts", rows["sample_id"].to_pylist(), ids)
    return np.asarray(rows["prompt_token_ids"].is_valid().to_numpy(), bool)[order]


def collect_targets(job: WarmupJob, rows: int, store: Store, folder: Path) -> Collected:
    """The rows of the split `warmup`, of the job's teacher where it names one. InputError where there are none, or one has no
    completion."""
    shards = Table(store, [job.prompts], "prompts").shards

    def targets(columns: Sequence[str] | None) -> Iterator[pa.Table]:
        for read in shards:
            prompts = read(columns)
            chosen = pc.equal(prompts["split"], WARMUP)
            if job.teacher is not None:
                of = prompts["teacher_id"]
                chosen = pc.and_(chosen, pc.or_kleene(pc.is_null(of), pc.equal(of, job.teacher)))
            yield prompts.filter(chosen)

    count, missing = 0, list[str]()
    needed = ["prompt_id", "split", "completion_token_ids", *([] if job.teacher is None else ["teacher_id"])]
    for found in targets(needed):
        count += len(found)
        missing += found.filter(pc.is_null(found["completion_token_ids"]))["prompt_id"].to_pylist()
    if count == 0:
        raise InputError(f"warmup: no prompt has the split {WARMUP!r}; give prompts.{WARMUP} rows with a `completion`")
    if missing:
        raise InputError(
            f"warmup: {len(missing)} prompts of split {WARMUP!r} have no completion, the first is {missing[0]!r}"
        )
    return collect((from_prompts(found, rows) for found in targets(None) if len(found)), folder)


class Table:
    """A table of one or several artifacts, one after another."""

    def __init__(self, store: Store, places: Sequence[ArtifactRef], name: str) -> None:
        self.shards = [
            read for place in places for read in store.shard_readers(store.require(place.stage, place.key), name)
        ]
        """Functions that read the columns of a shard; all columns for None."""


class Signal:
    """A signal of all teachers, by the samples `ids` of the rollouts. It holds as many shards as there are teachers: each has
    scored its samples shard for shard in the order of the rollouts.

    Raises InputError unless it has each sample once and no other."""

    def __init__(self, store: Store, places: Sequence[ArtifactRef], name: str, ids: list[str]) -> None:
        self._shards, self._most = Table(store, places, name).shards, len(places)
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        found: list[str] = []
        starts, self._null = [0], set[str]()
        for read in self._shards:
            rows = read(["sample_id", *signal_named(name).floats])
            found += rows["sample_id"].to_pylist()
            starts.append(len(found))
            self._null |= {column for column in rows.column_names if rows[column].null_count}
        self._starts = np.array(starts)
        self._order = order_of(name, found, ids)
        """By row of the rollouts the row of the signal."""

    def rows_of(self, rollouts: np.ndarray) -> pa.Table:
        """The rows of these rows of the rollouts, in their order. A column that is null in some row of the round is null in all:
        the objective reads it everywhere or nowhere."""
        rows = self._order[rollouts]
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        parts, places = [], []
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            parts.append(_taken(self._shard(int(shard)), rows[mine] - self._starts[shard]))
            places.append(mine)
        # signals of an earlier version beside new ones: a column may have become nullable
        whole = pa.concat_tables(parts, promote_options="default").take(np.argsort(np.concatenate(places)))
        for column in self._null:
            at = whole.schema.get_field_index(column)
            whole = whole.set_column(at, whole.schema.field(at), pa.nulls(len(whole), whole.schema.field(at).type))
        return whole

    def _shard(self, number: int) -> pa.Table:
        if number not in self._held:
            self._held[number] = self._shards[number](None)
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]


def _taken(rows: pa.Table, places: np.ndarray) -> pa.Table:
    """`rows.take(places)`, without a copy where these are all of them in their order."""
    return rows if np.array_equal(places, np.arange(len(rows))) else rows.take(places)


def _cut_off(store: Store, where: ArtifactRef) -> bool:
    """Whether a tail mass ends its lists (supervise.tail_mass)."""
    return store.require(where.stage, where.key).identity.get("tail_mass") is not None
