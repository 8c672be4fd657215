"""A plugin's behaviour that does what it must not, and one that writes everything itself."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, Literal

from opdflow.plugin import Behaviour, Completion, Draw, Drawn, Start, register

WAYS = (
    "raise",
    "raise_late",
    "no_draw",
    "no_tokens",
    "foreign",
    "too_long",
    "nothing",
    "none",
    "short",
    "longer",
    "nan",
)


@register
class Faulty(Behaviour):
    """Fails in one of several ways."""

    kind: Literal["faulty"] = "faulty"
    way: str = "raise"

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        if self.way == "raise":
            raise ZeroDivisionError("a bug")
        first: Any = {
            "no_draw": start,
            "no_tokens": Draw((), 1, start.seed),
            "foreign": Draw((*start.prompt, 256), 1, start.seed),
            "too_long": Draw(start.prompt, 4000, start.seed),
            "nothing": Draw(start.prompt, 0, start.seed),
        }.get(self.way, Draw(start.prompt, start.max_tokens, start.seed))
        answer = yield first
        made = Completion(answer.token_ids, answer.logprobs, answer.finish_reason)
        if self.way == "raise_late":
            return made.token_ids[len(made.token_ids)]  # type: ignore[return-value]
        return {  # type: ignore[return-value]
            "none": None,
            "short": replace(made, logprobs=made.logprobs[1:]),
            "longer": replace(made, token_ids=[1] * 9, logprobs=[0.0] * 9),
            "nan": replace(made, logprobs=[float("nan")] * len(made.token_ids)),
        }[self.way]


@register
class Silent(Behaviour):
    """Asks the student for nothing."""

    kind: Literal["silent"] = "silent"

    @property
    def label(self) -> Literal["student", "blended", "teacher"]:
        return "teacher"

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        return Completion([5, 7], [0.0, 0.0], "stop", 2)
        yield  # a generator
