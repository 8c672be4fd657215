"""A plugin's behaviour: completions begin with given tokens, the student goes on, and may go on once more after its end."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar, Literal

from pydantic import Field

from opdflow.plugin import Behaviour, Completion, Draw, Drawn, Start, register


@register
class ForcedStart(Behaviour):
    """The first tokens are given, the student draws the rest in two turns."""

    kind: Literal["forced_start"] = "forced_start"
    equation: ClassVar[str] = "y_<n given, then y_t ~ p(. | x, y_<t)"
    tokens: tuple[int, ...] = Field((1,), min_length=1, description="token ids that every completion begins with")

    @property
    def label(self) -> Literal["student", "blended", "teacher"]:
        return "teacher"

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        given = list(self.tokens)
        first = yield Draw((*start.prompt, *given), 1, start.seed)
        room = start.max_tokens - len(given) - 1
        ids, logprobs, reason = first.token_ids, first.logprobs, first.finish_reason
        if reason == "length" and room > 0:
            more = yield Draw((*start.prompt, *given, *ids), room, start.seed + 1)
            ids, logprobs, reason = ids + more.token_ids, logprobs + more.logprobs, more.finish_reason
        return Completion(given + ids, [0.0] * len(given) + logprobs, reason, len(given))
