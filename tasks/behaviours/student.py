"""The student writes every token itself: plain on-policy sampling."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar, Literal

from tasks.behaviours import Behaviour, Completion, Draw, Drawn, Start, register


@register
class StudentWrites(Behaviour):
    """The student draws every token."""

    kind: Literal["student"] = "student"
    equation: ClassVar[str] = "y_t ~ p(. | x, y_<t), after temperature, top-k and top-p"
    exact: ClassVar[bool] = True
    weighable: ClassVar[bool] = True

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        answer = yield Draw(start.prompt, start.max_tokens, start.seed)
        return Completion(answer.token_ids, answer.logprobs, answer.finish_reason)
