"""What the two signals of top-K lists share: rows from candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.artifacts.packed import pack
from storage.errors import InputError
from storage.schemas import TableSchema
from tasks.signals.signal import Shard
from tasks.signals.tables import LOGPROB_MAX, check_lengths, lists, nested, rows_of
from tasks.signals.wanted import Values

_FLOAT16_MIN = float(np.finfo(np.float16).min)


def topk_table(
    schema: TableSchema, quantities: Mapping[str, str], shard: Shard, tail_mass: float | None = None
) -> pa.Table:
    """Rows of a top-K signal; `quantities` fill its columns. Only usable entries are stored; with `tail_mass`, of one model's
    lists, the fewest entries (one at least) that leave no more than this mass outside. `compact` rounds log-probabilities to
    float16 (11 significant bits); the column's type stays, and compression drops the rest. `packed` rows have other columns, see
    `storage.artifacts.packed`.

    A token with an unusable number (NaN, +inf, above LOGPROB_MAX) among its entries or tails gets an empty list and NaN
    tails; training leaves the token out. Raises InputError by sample for a list that is not as long as its
    completion, or counts more entries than it has."""
    values = {column: shard.values[quantity] for column, quantity in quantities.items()}
    check_lengths(shard.rollouts, {f"{schema.name}.{column}": arrays for column, arrays in values.items()})
    _check_counts(schema.name, shard.rollouts, values)
    values = _without_broken_lists(values)
    if tail_mass is not None:
        values = _cut_off(values, tail_mass)
    columns: dict[str, Any] = {}
    for column, arrays in values.items():
        if column == "valid":
            columns[column] = lists(arrays, pa.int16())
            continue
        if column != "ids" and shard.encoding == "compact":
            arrays = [_rounded(array) for array in arrays]
        kind = pa.int32() if column == "ids" else pa.float32()
        tail = column.endswith("tail_logmass")
        columns[column] = lists(arrays, kind) if tail else nested(arrays, values["valid"], kind)
    rows = rows_of(schema, shard.rollouts, columns)
    return pack(schema, rows) if shard.encoding == "packed" else rows


def without_list(rows: pa.Table) -> tuple[int, int]:
    """(tokens with an empty list, tokens)."""
    counts = pc.list_flatten(rows["valid"])
    return pc.sum(pc.equal(counts, 0)).as_py() or 0, len(counts)


def _check_counts(table: str, rollouts: pa.Table, values: Values) -> None:
    pairs = zip(values["valid"], values["ids"], strict=True)
    for sample, (counts, ids) in zip(rollouts["sample_id"].to_pylist(), pairs, strict=True):
        bad = np.flatnonzero((counts < 0) | (counts > ids.shape[1]))
        if len(bad):
            raise InputError(
                f"{table}.valid: sample {sample!r}, token {bad[0]}: found {counts[bad[0]]} for a list of"
                f" {ids.shape[1]} entries"
            )


def _without_broken_lists(values: Values) -> Values:
    """`values` with no entries and NaN tails where a token that has entries has an unusable number."""
    tails = [column for column in values if column.endswith("tail_logmass")]
    entries = [column for column in values if column.endswith("logprobs")]
    changed = {column: list(values[column]) for column in ("valid", *tails)}
    for row, valid in enumerate(values["valid"]):
        broken = np.zeros(len(valid), bool)
        for column in entries:
            found = values[column][row]
            broken |= (~(found <= LOGPROB_MAX) & (np.arange(found.shape[1]) < valid[:, None])).any(axis=1)
        for column in tails:
            broken |= ~(values[column][row] <= LOGPROB_MAX)
        broken &= valid > 0
        if broken.any():
            changed["valid"][row] = np.where(broken, 0, valid)
            for column in tails:
                changed[column][row] = np.where(broken, np.nan, values[column][row])
    return values | changed


def _cut_off(values: Values, tail_mass: float) -> Values:
    """`values` of one model with the fewest entries that leave at most `tail_mass` outside, and the tails of these."""
    valid, tails = [], []
    for counts, logprobs, tail in zip(values["valid"], values["logprobs"], values["tail_logmass"], strict=True):
        here = np.arange(logprobs.shape[1]) < counts[:, None]
        mass = np.exp(np.where(here, logprobs, -np.inf).astype(np.float64))
        rest = np.exp(tail.astype(np.float64))[:, None]
        outside = np.concatenate([mass, rest], axis=1)[:, ::-1].cumsum(axis=1)[:, ::-1]  # of the first i entries
        kept = np.minimum(np.maximum((outside[:, :-1] > tail_mass).sum(axis=1), 1), counts)
        with np.errstate(divide="ignore"):
            left = np.log(np.take_along_axis(outside, kept[:, None], axis=1)[:, 0])
        valid.append(kept.astype(counts.dtype))
        tails.append(np.where(kept < counts, left, tail).astype(np.float32))
    return values | {"valid": valid, "tail_logmass": tails}


def _rounded(values: np.ndarray) -> np.ndarray:
    """To float16 and back; what is finite stays finite."""
    finite = np.isfinite(values)
    return np.where(finite, np.maximum(values, _FLOAT16_MIN), values).astype(np.float16).astype(np.float32)
