"""`student_topk`: the rollout-time student's k likeliest tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from storage.schemas import TABLES
from tasks.signals.signal import Shard, Signal, register
from tasks.signals.topk import topk_table, without_list
from tasks.signals.wanted import Ask, Wanted


@register
class StudentTopk(Signal):
    """The rollout-time student's k likeliest tokens at every position, with both models' log-probabilities of them."""

    name = "student_topk"
    schema = TABLES[name]
    listed = True
    checked = ("valid",)
    lists = {  # noqa: RUF012
        "student": ("student_logprobs", "student_tail_logmass"),
        "teacher": ("teacher_logprobs", "teacher_tail_logmass"),
    }

    def wanted(self, k: int | None, sampling: Mapping[str, Any]) -> Wanted:
        return Wanted(student=Ask(top=frozenset([k or 0])), teacher=Ask(on=frozenset([k or 0])))

    def table(self, shard: Shard) -> pa.Table:
        quantities = {
            "ids": f"student_top{shard.k}_ids",
            "student_logprobs": f"student_top{shard.k}_logprobs",
            "teacher_logprobs": f"teacher_on{shard.k}_logprobs",
            "valid": f"student_top{shard.k}_valid",
            "student_tail_logmass": f"student_top{shard.k}_tail",
            "teacher_tail_logmass": f"teacher_on{shard.k}_tail",
        }
        return topk_table(self.schema, quantities, shard)

    def unusable(self, rows: pa.Table) -> tuple[int, int]:
        """Tokens without a list."""
        return without_list(rows)
