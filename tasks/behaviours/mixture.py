"""A share of the completions is the student's own, the others were written before: GKD's mixture (2306.13649), and off-policy
distillation where the share is 0."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tasks.behaviours import Behaviour, Completion, Draw, Drawn, Read, Start, register
from tasks.behaviours.drafts import ReadsDrafts, uniform
from tasks.behaviours.student import StudentWrites
from tasks.schedules import ConstantSchedule, ScheduleField


@register
class Mixture(ReadsDrafts):
    """Each sample is the student's own with probability `on_policy_fraction`, else a completion that was written before.

    GKD's lambda is the on-policy fraction (2306.13649). With 0 the rollouts are a fixed set of completions (off-policy
    distillation): no engine samples, and their key does not depend on the student, so they are made and scored once for all
    objectives. Tokens that the student did not write have the mask reason teacher_prefix: take it out of
    `train.mask_reasons`, or they are not trained on."""

    kind: Literal["mixture"] = "mixture"
    equation: ClassVar[str] = "y ~ p(. | x) with probability on_policy_fraction, else a completion of the fixed set"
    paper: ClassVar[str] = "2306.13649"
    exact: ClassVar[bool] = True
    prefixes: ClassVar[bool] = True
    on_policy_fraction: ScheduleField = Field(
        description="share of samples that the student writes (GKD's lambda): a number, or a schedule over optimizer steps, whose"
        " value at a round's first step holds for its rollouts; at 1 the student writes all of them"
    )
    completions: Literal["teacher", "prompts"] = Field(
        "teacher",
        description="the others: teacher, drafts that it writes once per prompt; prompts, the `completion` of each training"
        " prompt (a file's or a dataset's), none empty or longer than max_completion_length",
    )

    @model_validator(mode="after")
    def _share(self) -> Mixture:
        lowest, highest = self.on_policy_fraction.bounds
        if not 0 <= lowest <= highest <= 1:
            raise ValueError(f"on_policy_fraction: found {lowest:g} to {highest:g}; a share of samples is from 0 to 1")
        return self

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({"drafts"} if self.completions == "teacher" else {"completions"})

    @property
    def draws(self) -> bool:
        return self.on_policy_fraction.bounds[1] > 0

    @property
    def last_change(self) -> int:
        return self.on_policy_fraction.last_change

    def at(self, step: int) -> Behaviour:
        share = self.on_policy_fraction.value(step)
        fixed = ConstantSchedule(initial=share)
        return self.model_copy(update={"on_policy_fraction": fixed}) if share < 1 else StudentWrites()

    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        if uniform(start.seed, "on policy") < self.on_policy_fraction.initial:
            answer = yield Draw(start.prompt, start.max_tokens, start.seed)
            return Completion(answer.token_ids, answer.logprobs, answer.finish_reason)
        return self.given(start)
