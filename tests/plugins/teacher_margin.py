"""A plugin that brings a signal (how far the teacher's likeliest token is ahead of its second), and a token weight that wants
it: all that there is to adding a signal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from opdflow.plugin import (
    Ask,
    Column,
    Shard,
    Signal,
    SignalNeed,
    TableSchema,
    TokenWeight,
    Wanted,
    Weighable,
    Written,
    register,
)
from tasks.signals.tables import check_lengths, lists, rows_of


@register
class TeacherMargin(Signal):
    """How far the teacher's likeliest token is ahead of its second likeliest, in nats."""

    name = "teacher_margin"
    schema = TableSchema(
        name,
        "Signal: the teacher's certainty.",
        (
            Column("sample_id", pa.string(), "prompt_id/round/sample_index"),
            Column("margins", pa.list_(pa.float32()), "T differences of its two largest log-probabilities"),
        ),
        prefixed=True,
    )
    floats = ("margins",)

    def wanted(self, k: int | None, sampling: Mapping[str, Any]) -> Wanted:
        return Wanted(teacher=Ask(top=frozenset([2])))

    def table(self, shard: Shard) -> pa.Table:
        margins = [top[:, 0] - top[:, 1] for top in shard.values["teacher_top2_logprobs"]]
        check_lengths(shard.rollouts, {"teacher_margin.margins": margins})
        return rows_of(self.schema, shard.rollouts, {"margins": lists(margins, pa.float32())})

    def meta(self, written: Written) -> dict[str, Any]:
        return {"metrics": {"teacher_margin": pc.mean(pc.list_flatten(written.read("margins"))).as_py()}}


@register
class MarginWeight(TokenWeight):
    """Tokens count by how sure the teacher is of its choice."""

    kind: Literal["teacher_margin"] = "teacher_margin"
    needs = (SignalNeed("teacher_margin"),)
    equation = "tanh(log q_1 - log q_2)"
    paper = ""

    def __call__(self, tokens: Weighable) -> Tensor:
        return tokens.signals["teacher_margin_margins"].tanh()
