"""From computed values to rows of the signal tables, and the mask's reasons. numpy and Arrow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import InputError
from storage.schemas import MaskReason, schema_for

Values = dict[str, list[np.ndarray]]
"""Per quantity one array per sample: (T,) of tokens, or (T, K) of candidates."""

TOPK_COLUMNS = {
    "teacher_topk": {
        "ids": "teacher_ids",
        "logprobs": "teacher_top",
        "valid": "teacher_valid",
        "tail_logmass": "teacher_tail",
    },
    "student_topk": {
        "ids": "student_ids",
        "student_logprobs": "student_top",
        "teacher_logprobs": "teacher_on_student",
        "valid": "student_valid",
        "student_tail_logmass": "student_tail",
        "teacher_tail_logmass": "teacher_tail_of_student",
    },
}
"""Columns of the two tables, and the quantities that fill them."""
SAMPLED_COLUMNS = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
_SAMPLED_QUANTITIES = (*SAMPLED_COLUMNS, "behaviour_logprobs")
LOGPROB_MAX = 1e-3
"""A log-probability above this is no rounding error: float32 sums of a whole vocabulary stay well below it."""
ENTROPY_MIN = -1e-3
"""An entropy below this is no rounding error: its sum has the same terms."""
_FLOAT16_MIN = float(np.finfo(np.float16).min)


def sampled_table(rollouts: pa.Table, values: Values) -> pa.Table:
    """Rows of `sampled`, in the order of the rollouts. `behaviour_logprobs` is null where it was not computed, and
    where another than the student alone wrote the completion.

    Raises InputError by sample for a list that is not as long as its completion."""
    _check_lengths(rollouts, {f"sampled.{name}": values[name] for name in _SAMPLED_QUANTITIES if name in values})
    columns: dict[str, Any] = {name: _lists(values[name], pa.float32()) for name in SAMPLED_COLUMNS}
    if "behaviour_logprobs" in values:
        own = [behaviour == "student" for behaviour in rollouts["behaviour"].to_pylist()]
        columns["behaviour_logprobs"] = _lists(values["behaviour_logprobs"], pa.float32(), own)
    else:
        columns["behaviour_logprobs"] = pa.nulls(rollouts.num_rows, pa.list_(pa.float32()))
    return _table("sampled", rollouts, columns)


def topk_table(table: str, rollouts: pa.Table, values: Values, encoding: str) -> pa.Table:
    """Rows of `teacher_topk` or `student_topk`: only usable entries are stored. `compact` rounds log-probabilities to
    float16 (11 significant bits); the column's type stays, and compression drops the rest.

    A token with an unusable number (NaN, +inf, above LOGPROB_MAX) among its entries or tails gets an empty list and NaN
    tails: whoever trains on it leaves the token out. Raises InputError by sample for a list that is not as long as its
    completion, or counts more entries than it has."""
    quantities = TOPK_COLUMNS[table].items()
    _check_lengths(rollouts, {f"{table}.{name}": values[quantity] for name, quantity in quantities})
    _check_counts(table, rollouts, values)
    values = _without_broken_lists(table, values)
    valid = values[TOPK_COLUMNS[table]["valid"]]
    columns: dict[str, Any] = {}
    for name, quantity in quantities:
        arrays = values[quantity]
        if name == "valid":
            columns[name] = _lists(arrays, pa.int16())
            continue
        if name != "ids" and encoding == "compact":
            arrays = [_rounded(array) for array in arrays]
        kind = pa.int32() if name == "ids" else pa.float32()
        columns[name] = _lists(arrays, kind) if name.endswith("tail_logmass") else _nested(arrays, valid, kind)
    return _table(table, rollouts, columns)


def mask_table(rollouts: pa.Table, sampled: pa.Table, rules: dict[str, Any]) -> pa.Table:
    """Rows of `mask`. `rules`: unmapped (ids that the teacher's vocabulary lacks or reads otherwise), teacher_rows (ids
    from there on are unmapped too), special (ids), occurrence (all, or the first of each id in a completion)."""
    unmapped = np.array(sorted(rules["unmapped"]), np.int64)
    special = np.array(sorted(rules["special"]), np.int64)
    reasons = []
    columns = ("completion_token_ids", "prefix_length", "finish_reason")
    rows = zip(*(rollouts[name].to_pylist() for name in columns), invalid_tokens(rollouts, sampled), strict=True)
    for completion, prefix_length, finish_reason, invalid in rows:
        ids = np.array(completion, np.int64)
        found = np.zeros(len(ids), np.int32)
        is_special = np.isin(ids, special)
        if rules["occurrence"] == "first":
            first = np.zeros(len(ids), bool)
            first[np.unique(ids, return_index=True)[1]] = True
            is_special &= first
        found[is_special] |= int(MaskReason.SPECIAL_TOKEN)
        found[np.isin(ids, unmapped) | (ids >= rules["teacher_rows"])] |= int(MaskReason.UNMAPPED)
        if finish_reason == "length":
            found |= int(MaskReason.TRUNCATED)
        found[:prefix_length] |= int(MaskReason.TEACHER_PREFIX)
        found[invalid] |= int(MaskReason.INVALID_VALUE)
        reasons.append(found)
    return _table("mask", rollouts, {"mask_reasons": _lists(reasons, pa.int32())})


def invalid_tokens(rollouts: pa.Table, sampled: pa.Table) -> list[np.ndarray]:
    """Per sample the tokens (T, bool) where a model or the sampler gave no usable log-probability, or a model no usable
    entropy. behaviour_logprobs count where there are any. Raises InputError by sample for a list not as long as its
    completion."""
    columns = {f"sampled.{name}": sampled[name].to_pylist() for name in _SAMPLED_QUANTITIES}
    columns["rollouts.sampling_logprobs"] = rollouts["sampling_logprobs"].to_pylist()
    _check_lengths(rollouts, columns)
    found = []
    for *values, behaviour, sampling in zip(*columns.values(), strict=True):
        student, teacher, *entropies = (np.array(value, np.float64) for value in values)
        logprobs = [student, teacher, np.array(sampling, np.float64)]
        logprobs += [] if behaviour is None else [np.array(behaviour, np.float64)]
        usable = [usable_logprobs(value) for value in logprobs] + [usable_entropies(value) for value in entropies]
        found.append(~np.all(usable, axis=0))
    return found


def usable_logprobs(values: np.ndarray) -> np.ndarray:
    """Which log-probabilities of sampled tokens are usable: finite, and above zero by rounding at most."""
    return np.isfinite(values) & (values <= LOGPROB_MAX)


def usable_entropies(values: np.ndarray) -> np.ndarray:
    """Which entropies are usable: finite, and below zero by rounding at most."""
    return np.isfinite(values) & (values >= ENTROPY_MIN)


def _check_lengths(rollouts: pa.Table, columns: Mapping[str, Sequence[Any]]) -> None:
    """`columns`: by name one list per sample, or None, which is not looked at."""
    ids, lengths = rollouts["sample_id"].to_pylist(), pc.list_value_length(rollouts["completion_token_ids"]).to_pylist()
    for column, rows in columns.items():
        if len(rows) != len(ids):
            raise InputError(f"{column}: {len(rows)} rows for {len(ids)} samples, the first is {ids[0]!r}")
        for sample, row, length in zip(ids, rows, lengths, strict=True):
            if row is not None and len(row) != length:
                raise InputError(f"{column}: sample {sample!r} has {len(row)} values for {length} completion tokens")


def _check_counts(table: str, rollouts: pa.Table, values: Values) -> None:
    columns = TOPK_COLUMNS[table]
    pairs = zip(values[columns["valid"]], values[columns["ids"]], strict=True)
    for sample, (counts, ids) in zip(rollouts["sample_id"].to_pylist(), pairs, strict=True):
        bad = np.flatnonzero((counts < 0) | (counts > ids.shape[1]))
        if len(bad):
            raise InputError(
                f"{table}.valid: sample {sample!r}, token {bad[0]}: found {counts[bad[0]]} for a list of"
                f" {ids.shape[1]} entries"
            )


def _without_broken_lists(table: str, values: Values) -> Values:
    """`values` with no entries and NaN tails where a token that has entries has an unusable number."""
    columns = TOPK_COLUMNS[table]
    tails = [quantity for name, quantity in columns.items() if name.endswith("tail_logmass")]
    lists = [quantity for name, quantity in columns.items() if name.endswith("logprobs")]
    changed = {quantity: list(values[quantity]) for quantity in (columns["valid"], *tails)}
    for row, valid in enumerate(values[columns["valid"]]):
        broken = np.zeros(len(valid), bool)
        for quantity in lists:
            entries = values[quantity][row]
            broken |= (~(entries <= LOGPROB_MAX) & (np.arange(entries.shape[1]) < valid[:, None])).any(axis=1)
        for quantity in tails:
            broken |= ~(values[quantity][row] <= LOGPROB_MAX)
        broken &= valid > 0
        if broken.any():
            changed[columns["valid"]][row] = np.where(broken, 0, valid)
            for quantity in tails:
                changed[quantity][row] = np.where(broken, np.nan, values[quantity][row])
    return values | changed


def _table(name: str, rollouts: pa.Table, columns: dict[str, Any]) -> pa.Table:
    schema = schema_for(name)
    columns = {"sample_id": rollouts["sample_id"].combine_chunks(), **columns}
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType, present: Sequence[bool] | None = None) -> pa.Array:
    """One list per sample; null where `present` is false."""
    if present is not None:
        empty = np.empty(0, np.float32)
        arrays = [array if here else empty for array, here in zip(arrays, present, strict=True)]
    mask = None if present is None else pa.array([not here for here in present])
    return pa.ListArray.from_arrays(_offsets(arrays), pa.array(_joined(arrays), kind), mask=mask)


def _nested(arrays: Sequence[np.ndarray], valid: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    """One list of lists per sample: of every token its first `valid` entries."""
    kept = [array[np.arange(array.shape[1]) < count[:, None]] for array, count in zip(arrays, valid, strict=True)]
    counts = _joined(valid).astype(np.int64)
    inner = pa.ListArray.from_arrays(_edges(counts), pa.array(_joined(kept), kind))
    return pa.ListArray.from_arrays(_offsets(valid), inner)


def _offsets(arrays: Sequence[np.ndarray]) -> pa.Array:
    return _edges(np.array([len(array) for array in arrays], np.int64))


def _edges(counts: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if len(arrays) else np.empty(0)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To float16 and back; what is finite stays finite."""
    finite = np.isfinite(values)
    return np.where(finite, np.maximum(values, _FLOAT16_MIN), values).astype(np.float16).astype(np.float32)
