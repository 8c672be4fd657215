"""From stored tables to the tensors of a micro-batch. Columns stay ragged until then; every length is checked first."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import torch

from storage.errors import ConfigError, InputError
from storage.identity import derive_seed
from storage.schemas import MaskReason
from tasks.losses.needs import CreditNeeds, Needs
from tasks.losses.token_credit.stored import ERROR_SPAN, KEY_SPAN
from tasks.losses.types import TokenBatch
from tasks.signals import signal_named
from tasks.trainer import checks
from tasks.trainer.topk_lists import Support, TopK, check_width, harmless, lists_of, support_of

_SOURCES = {
    "teacher_topk": ("teacher_topk",),
    "full": ("teacher_topk",),
    "student_topk": ("student_topk",),
    "union": ("teacher_topk", "student_topk"),
}
"""By support: the signals that hold its lists."""
_OF_BATCH = {entry.name.removesuffix("_N") for entry in fields(TokenBatch)}


@dataclass(frozen=True)
class Ragged:
    """A column of lists: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class Samples:
    """Samples of a round (or of a warm-up), one row each. Arrays with an entry per token are in memory, or maps of files where
    `stored.py` has collected a whole round."""

    ids: list[str]
    prompts: Ragged
    completions: Ragged
    keep: np.ndarray
    """Loss mask over the flat completion tokens."""
    floats: dict[str, np.ndarray] = field(default_factory=dict)
    """Per flat completion token: sampling_logprobs, student_logprobs, ..."""
    support: Support | None = None
    invalid: int = 0
    """Number of completion tokens left out because of an invalid value."""
    lost: np.ndarray | None = None
    """Per sample: the number of tokens that only an invalid value leaves out of the loss. None without signals."""
    rewards: np.ndarray | None = None
    """Per sample, float64 as it is stored: 0.7 in float32 is below a threshold of 0.7. NaN where its judge failed."""
    groups: np.ndarray | None = None
    """Per sample: the number of its prompt, in order of first occurrence in the round's rollouts."""
    segments: np.ndarray | None = None
    """Per flat completion token: the index of its segment in its completion."""
    ended: np.ndarray | None = None
    """Per sample: whether its completion ends with a stop token."""
    written: np.ndarray | None = None
    """Per flat completion token: whether the student wrote it."""
    valid: np.ndarray | None = None
    """Per flat completion token: whether its numbers are valid, also where the mask leaves it out for another reason than that
    the teacher reads another token in its id."""
    spans: np.ndarray | None = None
    """Per flat completion token: 0, or the kind of the span it is in."""
    pairs: np.ndarray | None = None
    """int64 [samples / 2, 2]: by pair the rows of the teacher's and of the student's completion."""
    teachers: tuple[str, ...] = ()
    """Names of the teachers, where there are several."""
    teacher: np.ndarray | None = None
    """Per sample: the place of its teacher's name in `teachers`."""
    contexts: np.ndarray | None = None
    """Per sample, bool: whether the teacher read a context of the sample's own. None where samples have none of their own."""
    maps: tuple[mmap.mmap, ...] = ()
    """The files behind the arrays, where they are mapped."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def forward_lengths(self) -> np.ndarray:
        """Input tokens per sample: prompt and completion without its last token, which predicts nothing that is trained."""
        return self.prompts.lengths + self.completions.lengths - 1

    @cached_property
    def kept(self) -> np.ndarray:
        """Masked-in tokens per sample."""
        return _per_sample(self.keep, self.completions)

    def drop_pages(self) -> None:
        """Takes what was read of mapped files out of this process's memory; it is read again on access."""
        for file in self.maps:
            file.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def group_rewards(self) -> np.ndarray:
        """float32 [samples, G]: rewards of all samples of each sample's prompt (NaN where a judge failed), padded with NaN on
        the right. Needs `rewards` and `groups`."""
        assert self.rewards is not None and self.groups is not None
        order = np.argsort(self.groups, kind="stable")
        sizes = np.bincount(self.groups)
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        by_group = np.full((len(sizes), int(sizes.max(initial=0))), np.nan, np.float32)
        by_group[self.groups[order], place] = self.rewards[order]
        return by_group[self.groups]


@dataclass(frozen=True)
class Planned:
    """Numbers per completion token of a step's samples, in the order of the step."""

    columns: dict[str, np.ndarray]
    offsets: np.ndarray
    """Where each sample's tokens begin."""


@dataclass(frozen=True)
class Forward:
    """One micro-batch on the device. Shapes: B rows padded to T input tokens, N packed completion tokens."""

    input_ids_BT: torch.Tensor
    hidden_index_N: torch.Tensor
    """Index into the flattened B x T hidden states of the position that predicts the token."""
    tokens: TokenBatch
    weight_N: torch.Tensor
    """Normalisation: weight of a token's loss in the global batch's loss; 0 where masked."""
    counts: bool
    """Whether its tokens are in the loss: all of them are, or (a filler, or samples without such a token) none."""


def part_of_round(
    rollouts: pa.Table,
    signals: Mapping[str, pa.Table],
    needs: Needs,
    mask_reasons: Iterable[MaskReason],
    seed: int = 0,
    rows: int | None = None,
) -> Samples:
    """Joins rollouts with the signals that the objective needs, by sample_id. `seed` is the run's, for counter-based draws;
    `rows` are the student's vocabulary. The lists keep all entries that are stored (`with_width`); rewards and groups, which are
    those of the whole round, are left out (`of_samples`).

    Tokens that the mask marks as invalid, or that have an empty list, are left out and counted. Raises InputError when a
    sample occurs twice, a signal is not given or lacks a sample, a list's length is not its completion's, or `full`
    support is not full, and for values that must not reach the loss (`checks`)."""
    ids = rollouts["sample_id"].to_pylist()
    places_of("rollouts", ids)
    completions = _ragged(rollouts["completion_token_ids"], np.int64)
    widths = {need.name: need.k for need in needs.signals}
    absent = sorted(set(widths) - set(signals))
    if absent:
        raise InputError(f"train: the objective needs the signal {absent[0]!r}; given are {sorted(signals) or 'none'}")
    ordered = {name: table.take(order_of(name, table["sample_id"].to_pylist(), ids)) for name, table in signals.items()}

    def aligned(table: pa.Table, where: str, column: str, dtype: type) -> np.ndarray:
        return _aligned(_ragged(table[column], dtype), completions, ids, f"{where}.{column}")

    floats = {"sampling_logprobs": aligned(rollouts, "rollouts", "sampling_logprobs", np.float32)}
    columns = {"sampling_logprobs": "rollouts.sampling_logprobs"}
    for signal, table in ordered.items():
        kind = signal_named(signal)
        for column in kind.floats:
            if table[column].null_count == 0:
                name = f"{signal}_{column}" if kind.schema.prefixed else column
                floats[name], columns[name] = aligned(table, signal, column, np.float32), f"{signal}.{column}"
    keep, invalid = np.ones(len(completions.values), bool), np.zeros(len(completions.values), bool)
    written, foreign = np.ones(len(completions.values), bool), np.zeros(len(completions.values), bool)
    if "mask" in ordered:
        masked = MaskReason(0)
        for reason in mask_reasons:
            masked |= reason
        if needs.takes_prefixes:
            masked &= ~MaskReason.TEACHER_PREFIX  # the objective has a term for them
        reasons = aligned(ordered["mask"], "mask", "mask_reasons", np.int32)
        keep = (reasons & int(masked)) == 0
        written = (reasons & int(MaskReason.TEACHER_PREFIX)) == 0
        foreign = (reasons & int(masked & MaskReason.UNMAPPED)) != 0
        invalid = (reasons & int(MaskReason.INVALID_VALUE)) != 0  # never trained on, whatever mask_reasons lists
    stored: list[checks.Lists] = []
    if needs.student.support is not None:
        tokens = checks.Tokens(ids, completions.offsets, keep & ~invalid)
        stored = [_lists(name, ordered[name], completions, tokens) for name in _SOURCES[needs.student.support]]
        for lists in stored:
            invalid |= lists.counts == 0  # the scorer had no usable numbers for the token
    lost = _per_sample(keep & invalid, completions)
    keep &= ~invalid
    tokens = checks.Tokens(ids, completions.offsets, keep)
    checks.check_token_ids(tokens, "rollouts.completion_token_ids", completions.values, rows)
    for name, values in floats.items():
        checks.check_floats(tokens, columns[name], values)
    if needs.draws:
        floats["uniform"] = _uniform(seed, ids, completions)
    if needs.takes_prefixes:
        floats["teacher_prefix"] = _leading(rollouts["prefix_length"], completions)
    prompts = _ragged(rollouts["prompt_token_ids"], np.int64)
    samples = Samples(ids, prompts, completions, keep, floats, None, int(invalid.sum()), lost)
    if needs.credit.written:
        samples = replace(samples, written=written, valid=~invalid & ~foreign)
    samples = replace(samples, support=_support(stored, tokens, needs, rows), segments=_segments(samples, needs.credit))
    return _checked(samples, "rollouts.prompt_token_ids", rows)


def with_width(samples: Samples, needs: Needs, cut: Collection[str] = ()) -> Samples:
    """The samples of a whole round, with as many entries per list as the objective reads. `cut` names the signals whose lists a
    tail mass ends: they may be shorter than the objective's. InputError where a list is narrower than the objective asks for."""
    if needs.student.support is None or samples.support is None:
        return samples
    widths = {need.name: need.k for need in needs.signals}
    tops = [
        replace(top, k=check_width(name, top.k, widths.get(name), name in cut))
        for name, top in zip(_SOURCES[needs.student.support], lists_of(samples.support), strict=True)
    ]
    return replace(samples, support=support_of(tops))


def with_teachers(samples: Samples, names: Sequence[str]) -> Samples:
    """The samples with each one's teacher, by name."""
    teachers = tuple(sorted(set(names)))
    return replace(samples, teachers=teachers, teacher=np.array([teachers.index(name) for name in names], np.int64))


def with_spans(samples: Samples, rewards: pa.Table) -> Samples:
    """The samples with the spans that the judge marked, key spans before error spans where they overlap, other kinds left out;
    `rewards` has their rows, in their order. InputError for a span past its completion."""
    spans = np.zeros(len(samples.completions.values), np.int8)
    for row, marked in enumerate(rewards.to_pylist()):
        first, last = samples.completions.offsets[row : row + 2]
        lists = (marked["span_starts"] or [], marked["span_ends"] or [], marked["span_kinds"] or [])
        for start, end, kind in sorted(zip(*lists, strict=True), key=lambda span: span[2] == "key"):
            if not 0 <= start <= end <= last - first:
                raise InputError(
                    f"rewards.span_ends: sample {samples.ids[row]!r} has a span from {start} to {end}, but its completion has"
                    f" {last - first} tokens; spans are half-open, in tokens of the completion"
                )
            if (known := {"key": KEY_SPAN, "error": ERROR_SPAN}.get(kind)) is not None:
                spans[first + start : first + end] = known
    return replace(samples, spans=spans)


def with_segments(samples: Samples, rewards: pa.Table) -> Samples:
    """The samples with the segments whose ends the judge found (half-open, in tokens); one segment where it found none. `rewards`
    has their rows, in their order."""
    parts = []
    for row, ends in enumerate(rewards["segment_ends"].to_pylist()):
        places = np.arange(samples.completions.lengths[row])
        parts.append(np.searchsorted(np.array(ends or [], np.int64), places, side="right"))
    return replace(samples, segments=np.concatenate(parts) if parts else np.empty(0, np.int64))


def without_those_that_lack(samples: Samples, contexts: np.ndarray) -> Samples:
    """The samples with only those in the loss that have a context. `contexts`: bool, one per sample."""
    keep = samples.keep & np.repeat(contexts, samples.completions.lengths)
    return replace(samples, keep=keep, lost=None if samples.lost is None else np.where(contexts, samples.lost, 0))


def _per_sample(flags: np.ndarray, completions: Ragged) -> np.ndarray:
    """How many flat completion tokens of each sample have the flag."""
    found, there = np.zeros(len(completions), np.int64), completions.lengths > 0
    if there.any():
        found[there] = np.add.reduceat(flags, completions.offsets[:-1][there], dtype=np.int64)
    return found


class _CreditFields(TypedDict, total=False):
    rewards: np.ndarray
    groups: np.ndarray
    ended: np.ndarray


def _segments(samples: Samples, needs: CreditNeeds) -> np.ndarray | None:
    """The segment of each token, where a credit needs them. Raises InputError for entropies that it needs and that are null."""
    for name in ("teacher_entropy", "student_entropy"):
        if getattr(needs, name) and name not in samples.floats:
            raise InputError(
                f"sampled.{name}: the objective's advantage needs it, but it is null; have it scored again"
            )
    if not needs.segment_ends:
        return None
    completions = samples.completions
    before = np.concatenate([[0], np.cumsum(np.isin(completions.values, needs.segment_ends))])  # ends before a token
    segments: np.ndarray = before[:-1] - np.repeat(before[completions.offsets[:-1]], completions.lengths)
    return segments


def of_samples(rollouts: pa.Table, needs: CreditNeeds, rewards: pa.Table | None) -> _CreditFields:
    """The fields with one value per sample of a whole round, from the columns `sample_id`, `prompt_id` and `finish_reason` of its
    rollouts, and from `sample_id` and `reward` of its `rewards` (null becomes NaN: its judge failed).

    InputError for rewards that are needed and not given, that lack a sample or have one twice, or that are not finite."""
    found: _CreditFields = {}
    if needs.reward:
        if rewards is None:
            raise InputError("train: the objective needs the rewards of the stage `judge`, and none are given")
        ids = rollouts["sample_id"].to_pylist()
        column = rewards["reward"].take(order_of("rewards", rewards["sample_id"].to_pylist(), ids))
        values = column.to_numpy().astype(np.float64)
        if bad := np.flatnonzero(~np.isfinite(values) & column.is_valid().to_numpy()).tolist():
            raise InputError(
                f"rewards.reward: sample {ids[bad[0]]!r} has the reward {values[bad[0]]}, no finite number; the stage `judge`"
                " writes none such, so something else has written the table"
            )
        found["rewards"] = values
    if needs.groups:
        numbers: dict[str, int] = {}
        prompts = rollouts["prompt_id"].to_pylist()
        found["groups"] = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], np.int64)
    if needs.ended:
        found["ended"] = np.array([reason == "stop" for reason in rollouts["finish_reason"].to_pylist()], bool)
    return found


def _support(stored: list[checks.Lists], tokens: checks.Tokens, needs: Needs, rows: int | None) -> Support | None:
    """The lists of the objective's support as they are stored, with their values checked."""
    widths = {need.name: need.k for need in needs.signals}
    tops = []
    for lists in stored:
        columns = signal_named(lists.name).lists
        checks.check_lists(tokens, lists, rows)
        widest = int(lists.counts.max(initial=1))
        if needs.student.support == "full":
            checks.check_full(tokens, widths.get(lists.name) or widest, lists, rows)
        tops.append(
            TopK(
                k=widest,
                starts=lists.starts,
                counts=lists.counts,
                ids=lists.ids,
                teacher=lists.logprobs[columns["teacher"][0]],
                student=lists.logprobs[columns["student"][0]] if "student" in columns else None,
                teacher_tail=lists.tails[columns["teacher"][1]],
            )
        )
    return support_of(tops)


def _uniform(seed: int, ids: list[str], completions: Ragged) -> np.ndarray:
    """A number in [0, 1) per completion token, from the Philox stream of (seed, sample id) at the token's position: independent
    of batching and of the completion's length."""
    streams = (np.random.Generator(np.random.Philox(key=derive_seed(seed, "draws", sample))) for sample in ids)
    drawn = [stream.random(length, np.float32) for stream, length in zip(streams, completions.lengths, strict=True)]
    return np.concatenate(drawn) if drawn else np.empty(0, np.float32)


def _leading(counts: pa.ChunkedArray, completions: Ragged) -> np.ndarray:
    """1.0 for the first `counts` tokens of each completion, 0.0 for the others."""
    place = np.arange(len(completions.values)) - np.repeat(completions.offsets[:-1], completions.lengths)
    return (place < np.repeat(counts.to_numpy(), completions.lengths)).astype(np.float32)


def from_prompts(prompts: pa.Table, rows: int | None = None) -> Samples:
    """Supervised targets: prompt and completion tokens as prepared, nothing masked. InputError for an id that is not below the
    student's `rows`."""
    ids = prompts["prompt_id"].to_pylist()
    completions = _ragged(prompts["completion_token_ids"], np.int64)
    keep = np.ones(len(completions.values), bool)
    tokens = checks.Tokens(ids, completions.offsets, keep)
    checks.check_token_ids(tokens, "prompts.completion_token_ids", completions.values, rows)
    return _checked(Samples(ids, _ragged(prompts["token_ids"], np.int64), completions, keep), "prompts.token_ids", rows)


def _checked(samples: Samples, prompt_column: str, rows: int | None) -> Samples:
    for name, lists in (("prompt", samples.prompts), ("completion", samples.completions)):
        empty = np.flatnonzero(lists.lengths == 0)
        if len(empty):
            raise InputError(f"sample {samples.ids[empty[0]]!r} has no {name} tokens ({len(empty)} such samples)")
    prompts = samples.prompts
    tokens = checks.Tokens(samples.ids, prompts.offsets, np.ones(len(prompts.values), bool))
    checks.check_token_ids(tokens, prompt_column, prompts.values, rows)
    return samples


def order_of(name: str, found: list[str], ids: list[str]) -> np.ndarray:
    """The rows of a signal that has the samples `found`, in the order of the rollouts `ids`. InputError unless it has each of
    these once and no other."""
    place = places_of(f"signal {name}", found)
    missing = [sample for sample in ids if sample not in place]
    if missing or len(found) != len(ids):
        what = (
            f"{missing[0]!r} and {len(missing) - 1} more are missing"
            if missing
            else f"{len(found) - len(ids)} too many"
        )
        raise InputError(f"signal {name}: {len(found)} rows for {len(ids)} rollouts: {what}")
    return np.fromiter((place[sample] for sample in ids), np.int64, len(ids))


def places_of(where: str, ids: list[str]) -> dict[str, int]:
    """sample_id -> row. InputError for a duplicate: it would be trained on twice."""
    place = {sample: row for row, sample in enumerate(ids)}
    if len(place) != len(ids):
        again = next(sample for row, sample in enumerate(ids) if place[sample] != row)
        raise InputError(
            f"{where}: sample {again!r} is there {ids.count(again)} times ({len(ids) - len(place)} rows too many); each"
            " sample has one row: have the table written again"
        )
    return place


def _aligned(lists: Ragged, completions: Ragged, ids: list[str], where: str) -> np.ndarray:
    wrong = np.flatnonzero(lists.lengths != completions.lengths)
    if len(wrong):
        row = wrong[0]
        raise InputError(
            f"{where}: sample {ids[row]!r} has {lists.lengths[row]} values for {completions.lengths[row]}"
            f" completion tokens ({len(wrong)} such samples)"
        )
    return lists.values


def _lists(name: str, table: pa.Table, completions: Ragged, tokens: checks.Tokens) -> checks.Lists:
    """A top-K signal's columns, their lengths checked."""
    ids = tokens.ids
    outer, edges, entries = _nested(table["ids"])
    _aligned(Ragged(edges[:-1], outer), completions, ids, f"{name}.ids")

    def logprobs(column: str) -> np.ndarray:
        other_outer, other, values = _nested(table[column])
        _aligned(Ragged(other[:-1], other_outer), completions, ids, f"{name}.{column}")
        if not np.array_equal(other, edges):
            at = int(np.flatnonzero(np.diff(other) != np.diff(edges))[0])
            found = f"found {other[at + 1] - other[at]} entries for {edges[at + 1] - edges[at]} ids"
            tokens.refuse(f"{name}.{column}", at, found, f"its lists must be as long as those of {name}.ids")
        return values.astype(np.float32, copy=False)

    valid = _aligned(_ragged(table["valid"], np.int64), completions, ids, f"{name}.valid")
    checks.check_counts(tokens, name, valid, np.diff(edges))
    columns = signal_named(name).lists.values()
    return checks.Lists(
        name=name,
        starts=edges[:-1],
        counts=np.clip(valid, 0, np.diff(edges)),
        ids=entries,
        logprobs={column: logprobs(column) for column, _ in columns},
        tails={
            column: _aligned(_ragged(table[column], np.float32), completions, ids, f"{name}.{column}")
            for _, column in columns
        },
    )


def _nested(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token offsets per row, entry offsets per token, flat entries) of a list<list<...>> column."""
    array = _one_array(column)
    outer = array.offsets.to_numpy().astype(np.int64)
    inner = array.flatten()
    edges = inner.offsets.to_numpy().astype(np.int64)
    return outer - outer[0], edges - edges[0], inner.flatten().to_numpy(zero_copy_only=False)


def _ragged(column: pa.ChunkedArray, dtype: type) -> Ragged:
    array = _one_array(column)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return Ragged(array.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False), offsets - offsets[0])


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def loss_denominators(
    samples: Samples, rows: Sequence[int], normalisation: str, constant_length: int | None
) -> np.ndarray:
    """What one masked-in token of each of the step's samples counts in the step's loss (float64, one per sample).

    `token`: 1 / masked-in tokens of the step. `sequence`: 1 / (samples that have such tokens x the sample's own).
    `constant`: 1 / (samples x constant_length)."""
    kept = samples.kept[list(rows)].astype(np.float64)
    if normalisation == "token":
        return np.full(len(rows), 1.0 / max(1.0, kept.sum()))
    if normalisation == "sequence":
        return 1.0 / (max(1, np.count_nonzero(kept)) * np.maximum(kept, 1.0))
    if normalisation == "constant" and constant_length is not None:
        return np.full(len(rows), 1.0 / (len(rows) * constant_length))
    raise ConfigError(f"objective.normalisation: {normalisation!r} is not token, sequence or constant")


def forward_batch(
    samples: Samples,
    rows: Sequence[int],
    weights: np.ndarray,
    places: Sequence[int],
    filler: bool,
    device: torch.device,
    planned: Planned | None = None,
) -> Forward:
    """One forward pass over the samples `places` of a step; `rows`, `weights` and what is `planned` are the whole step's.

    Only masked-in completion tokens are packed: the output head is never applied to the others. Where nothing is left,
    and for a filler, one token with mask 0 and harmless signals keeps the graph whole."""
    length = int(max(samples.forward_lengths[rows[place]] for place in places))
    input_ids = np.zeros((len(places), length), np.int64)  # right padding: causal attention never looks at it
    parts = []
    for line, place in enumerate(places):
        row = rows[place]
        prompt, completion = samples.prompts[row], samples.completions[row]
        input_ids[line, : len(prompt) + len(completion) - 1] = np.concatenate([prompt, completion[:-1]])
        start = samples.completions.offsets[row]
        at = np.flatnonzero(samples.keep[start : start + len(completion)])
        parts.append((start + at, at, np.full(len(at), place), line * length + len(prompt) - 1 + at))
    index, position, place_N, hidden = (np.concatenate(column) for column in zip(*parts, strict=True))
    counts = len(index) > 0 and not filler
    if not counts:
        row = rows[places[0]]
        index, position = samples.completions.offsets[row : row + 1], np.zeros(1, np.int64)
        place_N, hidden = np.array([places[0]]), np.array([len(samples.prompts[row]) - 1])

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    found_N = {name: tensor(_at(name, values, index, counts)) for name, values in samples.floats.items()}
    signals: dict[str, Any] = {f"{name}_N": value for name, value in found_N.items() if name in _OF_BATCH}
    others = {name: value for name, value in found_N.items() if name not in _OF_BATCH}
    row_N = np.asarray(rows)[place_N]
    if planned is not None:
        at_N = planned.offsets[place_N] + position
        signals["planned"] = {name: tensor(values[at_N] * float(counts)) for name, values in planned.columns.items()}
    if samples.rewards is not None:
        signals["reward_N"] = tensor(samples.rewards[row_N].astype(np.float32))
    if samples.groups is not None:
        signals["group_N"] = tensor(samples.groups[row_N])
        if samples.rewards is not None:
            signals["group_rewards_NG"] = tensor(samples.group_rewards[row_N])
    if samples.segments is not None:
        signals["segment_N"] = tensor(samples.segments[index])
    if samples.support is not None:
        found = samples.support.rows(index)
        found = found if counts else harmless(found)
        signals |= {
            "support_ids_NK": tensor(found.ids_NK),
            "support_valid_N": tensor(found.valid_N),
            "teacher_support_logprobs_NK": tensor(found.teacher_NK),
            "teacher_tail_logmass_N": tensor(found.teacher_tail_N),
        }
        if found.student_NK is not None:
            signals["student_support_logprobs_NK"] = tensor(found.student_NK)
        if found.teacher_valid_N is not None:
            signals["support_teacher_valid_N"] = tensor(found.teacher_valid_N)
    batch = TokenBatch(
        token_ids_N=tensor(samples.completions.values[index]),
        loss_mask_N=torch.full((len(index),), float(counts), device=device),
        sample_N=tensor(place_N),
        position_N=tensor(position),
        signals=others or None,
        **signals,
    )
    weight = weights[place_N].astype(np.float32) * float(counts)
    return Forward(tensor(input_ids), tensor(hidden), batch, tensor(weight.astype(np.float32)), counts)


def _at(name: str, values: np.ndarray, index: np.ndarray, counts: bool) -> np.ndarray:
    if not counts:
        return np.full(len(index), 1.0 if name.endswith("entropy") else -1.0, np.float32)
    return values[index].astype(np.float32, copy=False)
