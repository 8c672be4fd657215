"""Merged stop ids in completions: the rollouts keep the id that was sampled, scoring and training count the category."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from storage.errors import InputError


def merge_stop_ids(rollouts: pa.Table, stop_ids: Sequence[int]) -> pa.Table:
    """The rollouts with the first of `stop_ids` in place of any of them at a completion's end; the table itself where fewer than
    two are given.

    Raises InputError by sample for a completion that has one before its end: there it is an ordinary token, and counting it as
    the end would be wrong."""
    if len(stop_ids) < 2:
        return rollouts
    column = rollouts["completion_token_ids"].combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    offsets = column.offsets.to_numpy()
    ids = column.flatten().to_numpy(zero_copy_only=False).copy()
    offsets = offsets - offsets[0]
    stops = np.isin(ids, np.array(list(stop_ids)))
    last = np.zeros(len(ids), bool)
    last[offsets[1:][np.diff(offsets) > 0] - 1] = True
    if (inside := np.flatnonzero(stops & ~last)).size:
        row = int(np.searchsorted(offsets, inside[0], side="right")) - 1
        raise InputError(
            f"rollouts.completion_token_ids: sample {rollouts['sample_id'][row].as_py()!r}, token {inside[0] - offsets[row]}:"
            f" found {ids[inside[0]]}, one of the stop ids {list(stop_ids)}, before the completion's end. As an ordinary token"
            " there (a turn's end, say) it cannot be merged with the others: set prompts.tokenizers.stop_ids: mask, or take"
            " models with equal stop ids"
        )
    ids[stops] = stop_ids[0]
    merged = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, column.type.value_type))
    place = rollouts.schema.get_field_index("completion_token_ids")
    return rollouts.set_column(place, rollouts.schema.field(place), merged.cast(column.type))
