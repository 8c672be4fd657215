"""From computed values to rows of the signal tables. numpy and Arrow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import InputError
from storage.schemas import TableSchema

LOGPROB_MAX = 1e-3
"""A log-probability above this is no rounding error: float32 sums of a whole vocabulary stay well below it."""
ENTROPY_MIN = -1e-3
"""An entropy below this is no rounding error: its sum has the same terms."""


def usable_logprobs(values: np.ndarray) -> np.ndarray:
    """Which log-probabilities of sampled tokens are usable: finite, and above zero by rounding at most."""
    return np.isfinite(values) & (values <= LOGPROB_MAX)


def usable_entropies(values: np.ndarray) -> np.ndarray:
    """Which entropies are usable: finite, and below zero by rounding at most."""
    return np.isfinite(values) & (values >= ENTROPY_MIN)


def check_lengths(rollouts: pa.Table, columns: Mapping[str, Sequence[Any]]) -> None:
    """`columns`: by name one list per sample, or None, which is not looked at."""
    ids, lengths = rollouts["sample_id"].to_pylist(), pc.list_value_length(rollouts["completion_token_ids"]).to_pylist()
    for column, rows in columns.items():
        if len(rows) != len(ids):
            raise InputError(f"{column}: {len(rows)} rows for {len(ids)} samples, the first is {ids[0]!r}")
        for sample, row, length in zip(ids, rows, lengths, strict=True):
            if row is not None and len(row) != length:
                raise InputError(f"{column}: sample {sample!r} has {len(row)} values for {length} completion tokens")


def arrays_of(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """The lists of a column as views of its values, one array per row; None where the row is null. No object per token."""
    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    values, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy().tolist()
    ends = zip(offsets[:-1], offsets[1:], array.is_valid().to_pylist(), strict=True)
    return [values[start:end] if here else None for start, end, here in ends]


def rows_of(schema: TableSchema, rollouts: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """The table of a signal: the samples of the rollouts, and its columns."""
    columns = {"sample_id": rollouts["sample_id"].combine_chunks(), **columns}
    return pa.table([columns[name] for name in schema.names], schema=schema.arrow)


def lists(arrays: Sequence[np.ndarray], kind: pa.DataType, present: Sequence[bool] | None = None) -> pa.Array:
    """One list per sample; null where `present` is false."""
    if present is not None:
        empty = np.empty(0, np.float32)
        arrays = [array if here else empty for array, here in zip(arrays, present, strict=True)]
    mask = None if present is None else pa.array([not here for here in present])
    return pa.ListArray.from_arrays(_offsets(arrays), pa.array(_joined(arrays), kind), mask=mask)


def nested(arrays: Sequence[np.ndarray], valid: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
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
