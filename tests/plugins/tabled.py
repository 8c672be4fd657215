"""A plugin's behaviour with a table of its own: per token how unlikely it was, per sample the number of draws."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa

from opdflow.plugin import Behaviour, Column, Completion, Draw, Drawn, Start, TableSchema, register

SURPRISE = TableSchema(
    "surprise",
    "How unlikely tokens were.",
    (
        Column("sample_id", pa.string(), "sample"),
        Column("nats", pa.list_(pa.float32()), "T surprises"),
        Column("draws", pa.int32(), "requests to the engine"),
    ),
    prefixed=True,
)


@register
class Tabled(Behaviour):
    """The student writes, and every token's surprise is kept. `wrong`: what is wrong with the cells."""

    kind: Literal["tabled"] = "tabled"
    table: ClassVar[TableSchema | None] = SURPRISE
    wrong: Literal["", "missing", "short", "nan"] = ""

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        answer = yield Draw(start.prompt, start.max_tokens, start.seed)
        nats = [-p for p in answer.logprobs]
        cells: dict[str, Any] = {"nats": nats, "draws": 1}
        if self.wrong == "missing":
            del cells["draws"]
        if self.wrong == "short":
            cells["nats"] = nats[1:]
        if self.wrong == "nan":
            cells["nats"] = [float("nan")] * len(nats)
        return Completion(answer.token_ids, answer.logprobs, answer.finish_reason, 0, cells)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float | None]:
        return {"surprise_max": max(value for row in rows for value in row["nats"])}
