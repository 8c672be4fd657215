"""Checks for values that must not reach a gradient, when a round's training data is assembled.

Only tokens in the loss are checked; masked tokens may have any value. Token ids are always checked, because they are also
inputs. All checks are numpy over flat columns, lists in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from storage.errors import InputError
from tasks.signals.tables import ENTROPY_MIN, LOGPROB_MAX, usable_entropies, usable_logprobs

FLOAT16_STEP = 2.0**-11
"""Relative error of a number rounded to float16."""
_CHUNK_ENTRIES = 1 << 18
"""List entries per chunk: small enough for a processor's cache."""
_SAMPLE_ENTRIES = 4096
"""Entries used to detect the encoding of a list."""
_CURE = "score it again, or mark the token in mask.mask_reasons (16: invalid_value)"


@dataclass(frozen=True)
class Tokens:
    """Flat tokens of a round's completions (or prompts): sample i has the tokens `offsets[i]` to `offsets[i + 1]`."""

    ids: list[str]
    offsets: np.ndarray
    counted: np.ndarray
    """bool, per flat token: whether it is in the loss."""

    def refuse(self, column: str, index: int, found: str, rule: str, more: int = 0) -> NoReturn:
        """Raises InputError about the flat token `index`; `more` other tokens have the same problem."""
        sample = int(np.searchsorted(self.offsets, index, side="right")) - 1
        others = f" (and {more} more such tokens)" if more else ""
        raise InputError(
            f"{column}: sample {self.ids[sample]!r}, token {index - self.offsets[sample]}: {found}{others}; {rule}"
        )


@dataclass(frozen=True)
class Lists:
    """A stored top-K signal as flat columns: token n has `counts[n]` usable entries from `starts[n]`."""

    name: str
    starts: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    logprobs: Mapping[str, np.ndarray]
    """By column, one value per entry; the lists are sorted by the first."""
    tails: Mapping[str, np.ndarray]
    """By column, one value per token; in the order of `logprobs`."""


def check_token_ids(tokens: Tokens, column: str, ids: np.ndarray, rows: int | None) -> None:
    """Raises InputError for an id below 0, or not below the student's `rows` where these are known."""
    if len(ids) and (ids.min() < 0 or (rows is not None and ids.max() >= rows)):
        bad = np.flatnonzero(_outside(ids, rows))
        rule = f"ids are {_range(rows)}; tokenise it again with the student's own tokenizer"
        tokens.refuse(column, int(bad[0]), f"found {ids[bad[0]]}", rule, len(bad) - 1)


def check_floats(tokens: Tokens, column: str, values: np.ndarray) -> None:
    """Raises InputError for a number that is not usable: a log-probability or an entropy by the column's name, any other
    column's where it is not finite.

    The log-probability of a sampled token must be finite, because it had a positive probability."""
    entropy = column.endswith("entropy")
    if not entropy and not column.endswith("logprobs"):
        bad = ~np.isfinite(values) & tokens.counted
        if bad.any():
            _refuse_first(tokens, column, bad, values, "a number is finite")
        return
    bad = ~(usable_entropies if entropy else usable_logprobs)(values) & tokens.counted
    if bad.any():
        least, most = (
            f"at least 0 (down to {ENTROPY_MIN:g} is rounding)",
            f"at most 0 (up to {LOGPROB_MAX:g} is rounding)",
        )
        rule = f"{'an entropy' if entropy else 'a log-probability'} is finite and {least if entropy else most}"
        _refuse_first(tokens, column, bad, values, rule)


def check_lists(tokens: Tokens, lists: Lists, rows: int | None) -> None:
    """Raises InputError for a list with a bad entry, naming the first rule it breaks: ids in the vocabulary and unique;
    log-probabilities not NaN and not above 0 (-inf, probability 0, is allowed); sorted, likeliest first by the list's own
    model; total probability with the tail at most 1."""
    for column, values in lists.tails.items():
        bad = ~(values <= LOGPROB_MAX) & tokens.counted
        if bad.any():
            rule = f"a log-probability is not NaN and at most 0 (up to {LOGPROB_MAX:g} is rounding)"
            _refuse_first(tokens, f"{lists.name}.{column}", bad, values, rule)
    stray = len(lists.ids) and (lists.ids.min() < 0 or (rows is not None and lists.ids.max() >= rows))
    ranked = next(iter(lists.logprobs))
    limits = {column: mass_limit(values, int(lists.counts.max(initial=0))) for column, values in lists.logprobs.items()}
    for chunk in _chunks(lists):
        ids = chunk.of(lists.ids, None)
        if stray and (outside := _outside(ids, rows) & chunk.here).any():
            _refuse_entry(tokens, f"{lists.name}.ids", chunk, outside, ids, f"ids are {_range(rows)}")
        ordered = np.sort(ids, axis=1)
        if (twice := ordered[:, 1:] == ordered[:, :-1]).any():
            _refuse_entry(tokens, f"{lists.name}.ids", chunk, twice, ordered[:, 1:], "ids in a list are unique")
        for (column, flat), tail in zip(lists.logprobs.items(), lists.tails.values(), strict=True):
            name, values = f"{lists.name}.{column}", chunk.of(flat, -np.inf)
            if not (fine := values <= LOGPROB_MAX).all():
                rule = f"a log-probability is not NaN and at most 0 (up to {LOGPROB_MAX:g} is rounding)"
                _refuse_entry(tokens, name, chunk, ~fine, values, rule)
            if column == ranked and not (falls := values[:, 1:] <= values[:, :-1]).all():
                _refuse_entry(tokens, name, chunk, ~falls, values[:, 1:], "a list is sorted, likeliest first", 1)
            with np.errstate(over="ignore", invalid="ignore"):
                mass = np.exp(values).sum(axis=1) + np.exp(tail[chunk.tokens])
            if (bad := (mass > limits[column]) & tokens.counted[chunk.tokens]).any():
                at = int(np.flatnonzero(bad)[0])
                rule = (
                    f"a list and its tail have at most probability 1 (up to {limits[column]:.6f} is rounding); {_CURE}"
                )
                tokens.refuse(
                    name, chunk.tokens.start + at, f"found a mass of {mass[at]:.6g}", rule, int(bad.sum()) - 1
                )


def check_counts(tokens: Tokens, name: str, valid: np.ndarray, stored: np.ndarray) -> None:
    """Raises InputError if `valid` is above the number of a list's entries, or negative."""
    bad = np.flatnonzero(((valid > stored) | (valid < 0)) & tokens.counted)
    if len(bad):
        found = f"found {valid[bad[0]]} for a list of {stored[bad[0]]} entries"
        rule = f"it counts the usable entries at the list's front; {_CURE}"
        tokens.refuse(f"{name}.valid", int(bad[0]), found, rule, len(bad) - 1)


def check_full(tokens: Tokens, k: int, lists: Lists, rows: int | None) -> None:
    """Raises InputError if `full` support is not full: k is below the student's rows, and the lists leave something out. (A
    teacher with fewer rows than the student has nothing outside its own rows.)"""
    if rows is None or k >= rows:
        return
    tail = next(iter(lists.tails.values()))
    outside = ((lists.counts > k) | (tail > -np.inf)) & tokens.counted
    if outside.any():
        raise InputError(
            f"objective.support.k: full support means every id of the vocabulary, but k is {k} and the student has"
            f" {rows} rows; set k: {rows}, or use kind: teacher_topk with outside: bucket"
        )


def mass_limit(values: np.ndarray, k: int) -> float:
    """The largest allowed sum of a list of k log-probabilities and its tail.

    Exact (float32): exp(LOGPROB_MAX), because the log of the sum is a log-probability too. Compact (float16): rounding
    changes each log p by at most e = 2^-11 of itself, so the sum by at most a factor `max sum p^(1-e) = n^e`, at n = k + 1
    equal shares. The encoding is not stored; it is compact if float16 represents all values exactly."""
    shares = (k + 1) ** FLOAT16_STEP if _rounded(values) else 1.0
    return float(np.exp(LOGPROB_MAX) * shares)


def _rounded(values: np.ndarray) -> bool:
    some = values[:_SAMPLE_ENTRIES]
    some = some[np.isfinite(some)]
    with np.errstate(over="ignore"):
        return bool((some.astype(np.float16).astype(some.dtype) == some).all())


@dataclass(frozen=True)
class _Chunk:
    """Lists of consecutive tokens as an array (n, K)."""

    tokens: slice
    starts: np.ndarray
    here: np.ndarray
    """bool (n, K): which entries exist."""
    whole: bool
    """Every entry exists and they are contiguous: columns need no copy."""

    def of(self, flat: np.ndarray, fill: float | None) -> np.ndarray:
        """The chunk of a flat column, padded with `fill`, or (for ids) with a different negative number per place."""
        n, k = self.here.shape
        if self.whole:
            return flat[self.starts[0] : self.starts[0] + n * k].reshape(n, k)
        place = np.arange(k)
        found = flat[np.where(self.here, self.starts[:, None] + place, 0)] if len(flat) else np.zeros((n, k))
        return np.where(self.here, found, -1 - place if fill is None else fill)


def _chunks(lists: Lists) -> Iterator[_Chunk]:
    width = int(lists.counts.max(initial=0))
    step = max(1, _CHUNK_ENTRIES // max(1, width))
    everything = np.ones((min(step, len(lists.counts)), width), bool)
    for start in range(0, len(lists.counts) if width else 0, step):
        tokens = slice(start, min(start + step, len(lists.counts)))
        starts, counts = lists.starts[tokens], lists.counts[tokens]
        whole = bool((counts == width).all() and (np.diff(starts) == width).all())
        here = everything[: len(counts)] if whole else np.arange(width) < counts[:, None]
        yield _Chunk(tokens, starts, here, whole)


def _refuse_entry(
    tokens: Tokens, column: str, chunk: _Chunk, bad: np.ndarray, values: np.ndarray, rule: str, first: int = 0
) -> None:
    """Refuses the first bad entry of a token in the loss, if there is one; `first` is the place of the first column."""
    bad = bad & tokens.counted[chunk.tokens, None]
    rows = np.flatnonzero(bad.any(axis=1))
    if len(rows):
        entry = int(np.flatnonzero(bad[rows[0]])[0])
        value = values[rows[0], entry]
        # ids were sorted to find duplicates, so their places are meaningless
        found = f"found {value}" if column.endswith(".ids") else f"found {value:g} at entry {entry + first}"
        tokens.refuse(column, chunk.tokens.start + int(rows[0]), found, f"{rule}; {_CURE}", len(rows) - 1)


def _refuse_first(tokens: Tokens, column: str, bad: np.ndarray, values: np.ndarray, rule: str) -> NoReturn:
    at = np.flatnonzero(bad)
    tokens.refuse(column, int(at[0]), f"found {values[at[0]]:g}", f"{rule}; {_CURE}", len(at) - 1)


def _outside(ids: np.ndarray, rows: int | None) -> np.ndarray:
    return (ids < 0) | (ids >= rows) if rows is not None else ids < 0


def _range(rows: int | None) -> str:
    return f"from 0 to {rows - 1}, the student's vocabulary" if rows is not None else "not negative"
