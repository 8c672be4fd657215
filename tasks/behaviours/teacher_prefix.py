"""The teacher writes the beginning of some completions and the student continues: TrOPD's guidance (2606.01249)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from tasks.behaviours import Behaviour, Completion, Draw, Drawn, Read, Start, register
from tasks.behaviours.drafts import ReadsDrafts, uniform
from tasks.behaviours.student import StudentWrites
from tasks.schedules import ConstantSchedule, ScheduleField


@register
class TeacherPrefix(ReadsDrafts):
    """The teacher writes the first tokens of some completions, and the student continues.

    The prefix is the head of a draft that the teacher wrote once for the prompt (stage `draft`). It ends before the draft's stop
    token, and before the first token that the student's vocabulary lacks. An objective with a term for prefixes (TrOPD:
    `-prefix_beta log p(y)`) trains on its tokens; for every other objective `train.mask_reasons` leaves them out.

    2606.01249 states neither the share of guided samples nor the distribution of lengths. The defaults are ours: one guided
    sample in five, lengths uniform up to the cap."""

    kind: Literal["teacher_prefix"] = "teacher_prefix"
    equation: ClassVar[str] = (
        "y_t = teacher's draft for t < n, y_t ~ p(. | x, y_<t) from n on; n ~ U{0, ..., cap(step)}"
    )
    paper: ClassVar[str] = "2606.01249"
    exact: ClassVar[bool] = True
    prefixes: ClassVar[bool] = True
    cap: ScheduleField = Field(
        description="largest prefix in tokens: a number, or a schedule over optimizer steps, whose value at a round's first step"
        " holds for its rollouts; below 1 the student writes alone. 2606.01249: {kind: cosine, from the full length to 0}"
    )
    fraction: float = Field(0.2, gt=0, le=1, description="share of the samples that begin with a prefix")
    length: Literal["uniform", "fixed"] = Field(
        "uniform", description="of a prefix: uniform in 0 .. cap, or always the cap (or the whole draft)"
    )

    @model_validator(mode="after")
    def _positive(self) -> TeacherPrefix:
        if (lowest := self.cap.bounds[0]) < 0:
            raise ValueError(f"cap: {lowest:g} tokens; a prefix cannot be shorter than 0")
        return self

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({"drafts"})

    @property
    def last_change(self) -> int:
        return self.cap.last_change

    def at(self, step: int) -> Behaviour:
        cap = int(self.cap.value(step))
        return self.model_copy(update={"cap": ConstantSchedule(initial=cap)}) if cap >= 1 else StudentWrites()

    def problems(self, sampling: Any) -> list[str]:
        longest, most = self.cap.bounds[1], sampling.max_completion_length
        if longest < most:
            return []
        return [
            f"behaviour.cap: a prefix of {longest:g} tokens leaves the student none of rollout.max_completion_length, {most};"
            f" use {most - 1} or less"
        ]

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        prefix, logprobs = self._prefix(start)
        answer = yield Draw((*start.prompt, *prefix), start.max_tokens - len(prefix), start.seed)
        return Completion(
            [*prefix, *answer.token_ids],
            [*logprobs, *answer.logprobs],
            answer.finish_reason,
            len(prefix),
            label="blended" if prefix else None,
        )

    def _prefix(self, start: Start) -> tuple[list[int], list[float]]:
        """The tokens that begin the completion, and their log-probabilities."""
        draft = start.draft
        if draft is None or uniform(start.seed, "guided") >= self.fraction:
            return [], []
        longest = min(int(self.cap.initial), start.max_tokens - 1)
        wanted = longest if self.length == "fixed" else int(uniform(start.seed, "prefix length") * (longest + 1))
        length = min(wanted, len(draft.token_ids) - (draft.finish_reason == "stop"))
        return draft.token_ids[:length], draft.logprobs[:length]
