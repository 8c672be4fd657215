"""`teacher_topk`: the teacher's k likeliest tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.schemas import TABLES
from tasks.signals.signal import Inputs, Shard, Signal, Written, register
from tasks.signals.topk import topk_table, without_list
from tasks.signals.wanted import Ask, Wanted


@register
class TeacherTopk(Signal):
    """The teacher's k likeliest tokens at every position, and the mass of all others. Needs no run of the student."""

    name = "teacher_topk"
    schema = TABLES[name]
    listed = True
    checked = ("valid",)
    lists = {"teacher": ("logprobs", "tail_logmass")}  # noqa: RUF012

    def identity(self, inputs: Inputs, k: int | None) -> dict[str, Any]:
        cut = inputs.settings.tail_mass
        return super().identity(inputs, k) | ({} if cut is None else {"tail_mass": cut})

    def wanted(self, k: int | None, sampling: Mapping[str, Any]) -> Wanted:
        return Wanted(teacher=Ask(top=frozenset([k or 0])))

    def table(self, shard: Shard) -> pa.Table:
        quantities = {
            "ids": f"teacher_top{shard.k}_ids",
            "logprobs": f"teacher_top{shard.k}_logprobs",
            "valid": f"teacher_top{shard.k}_valid",
            "tail_logmass": f"teacher_top{shard.k}_tail",
        }
        return topk_table(self.schema, quantities, shard, shard.tail_mass)

    def unusable(self, rows: pa.Table) -> tuple[int, int]:
        """Tokens without a list."""
        return without_list(rows)

    def meta(self, written: Written) -> dict[str, Any]:
        """`teacher_mass`: the mean probability of a list, over the tokens that have one."""
        tail = pc.list_flatten(written.read("tail_logmass"))
        mass = pc.subtract(1.0, pc.exp(tail.filter(pc.invert(pc.is_nan(tail))).cast(pa.float64())))
        return {"metrics": {"teacher_mass": pc.mean(mass).as_py()}}
