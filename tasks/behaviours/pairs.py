"""The student and the teacher write completions of the same prompt in turn: what an objective of pairs compares."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

from tasks.behaviours import Completion, Draw, Drawn, Read, Start, pair_of, register
from tasks.behaviours.drafts import ReadsDrafts


@register
class Pairs(ReadsDrafts):
    """Of each two samples of a prompt the student writes the first and the teacher the second: a pair.

    The teacher's are drafts that it writes once for all rounds, under what it reads of the prompt (`teacher.context`). With
    `drafts.per_prompt` below the number of pairs, some share a draft. The order within a pair and the even share are ours."""

    kind: Literal["pairs"] = "pairs"
    equation: ClassVar[str] = "y_2i ~ p(. | x), y_2i+1 ~ q(. | x, c), written before"
    paper: ClassVar[str] = "2605.05040"
    experimental: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    prefixes: ClassVar[bool] = True
    pairs: ClassVar[bool] = True

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({"drafts"})

    def draft_index(self, sample_index: int) -> int:
        return pair_of(sample_index)

    def problems(self, sampling: Any) -> list[str]:
        count = sampling.num_generations
        if count % 2 == 0:
            return []
        return [
            f"num_generations: {count}, but with behaviour pairs the student and the teacher write the completions of a prompt in"
            f" turn, so that each has a partner; use an even number ({count + 1}; 2 is one pair per prompt)"
        ]

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        if start.index % 2:
            return self.given(start)
        answer = yield Draw(start.prompt, start.max_tokens, start.seed)
        return Completion(answer.token_ids, answer.logprobs, answer.finish_reason)
