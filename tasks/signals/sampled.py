"""`sampled`: both models' log-probabilities and entropies of the tokens that were sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.schemas import TABLES
from tasks.signals.signal import Inputs, Shard, Signal, Written, register
from tasks.signals.tables import check_lengths, lists, rows_of
from tasks.signals.wanted import Ask, Values, Wanted

COLUMNS = {
    "student_logprobs": "student_logprobs",
    "teacher_logprobs": "teacher_logprobs",
    "student_entropy": "student_entropy",
    "teacher_entropy": "teacher_entropy",
    "behaviour_logprobs": "student_behaviour_logprobs",
}
"""Columns, and the quantities that fill them."""


@register
class Sampled(Signal):
    """Log-probabilities of the sampled tokens under both models, and the entropies of both; or of one model alone."""

    name = "sampled"
    schema = TABLES[name]
    floats = tuple(COLUMNS)
    without_student = without_teacher = True

    def wanted(self, k: int | None, sampling: Mapping[str, Any]) -> Wanted:
        return Wanted(Ask(logprobs=True, entropy=True, sampling=sampling), Ask(logprobs=True, entropy=True))

    def identity(self, inputs: Inputs, k: int | None) -> dict[str, Any]:
        return {"sampling": inputs.sampling}

    def table(self, shard: Shard) -> pa.Table:
        return sampled_table(shard.rollouts, shard.values)

    def meta(self, written: Written) -> dict[str, Any]:
        """How far the scorer's student is from the sampler: mean, 99th percentile and maximum of |behaviour - sampling
        log-probabilities|, in nats."""
        pairs = written.beside_rollouts("behaviour_logprobs", "sampling_logprobs")
        gaps = pa.chunked_array([_mismatch(*pair) for pair in pairs], pa.float32())
        metrics = {
            "sampler_mismatch_mean": pc.mean(gaps).as_py(),
            "sampler_mismatch_p99": pc.quantile(gaps, 0.99)[0].as_py() if len(gaps) else None,
            "sampler_mismatch_max": pc.max(gaps).as_py(),
        }
        return {"metrics": metrics}


def sampled_table(rollouts: pa.Table, values: Values) -> pa.Table:
    """Rows of `sampled`, in the order of the rollouts. What was not computed is null: the columns of a model that was not
    run, `behaviour_logprobs` also where another than the student alone wrote the completion.

    Raises InputError by sample for a list that is not as long as its completion."""
    given = {column: values[quantity] for column, quantity in COLUMNS.items() if quantity in values}
    check_lengths(rollouts, {f"sampled.{column}": arrays for column, arrays in given.items()})
    own = [behaviour == "student" for behaviour in rollouts["behaviour"].to_pylist()]
    columns: dict[str, Any] = {
        column: lists(arrays, pa.float32(), own if column == "behaviour_logprobs" else None)
        for column, arrays in given.items()
    }
    for column in COLUMNS:
        columns.setdefault(column, pa.nulls(rollouts.num_rows, pa.list_(pa.float32())))
    return rows_of(TABLES["sampled"], rollouts, columns)


def _mismatch(behaviour: pa.ChunkedArray, sampling: pa.ChunkedArray) -> pa.Array:
    """|behaviour - sampling log-probabilities| of every token that has both, as numbers."""
    here = pc.is_valid(behaviour)
    gap = pc.abs(pc.subtract(pc.list_flatten(behaviour.filter(here)), pc.list_flatten(sampling.filter(here))))
    return pa.concat_arrays(gap.filter(pc.is_finite(gap)).chunks or [pa.array([], pa.float32())])
