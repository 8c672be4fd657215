"""Schedules: values that change over optimizer steps. Everything that is annealed uses them (the learning rate apart, which has
a schedule of its own in `train`).

A field of the type `ScheduleField` takes `{kind: linear, initial: 0.05, final: 0, steps: 50}`, or a bare number, which stays."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from storage.identity import Identity


class Schedule(Identity):
    """A number for every optimizer step of a run, which count from 0."""

    kind: str

    @abstractmethod
    def value(self, step: int) -> float:
        """The value before the optimizer step number `step`."""

    @property
    @abstractmethod
    def last_change(self) -> int:
        """The step from which the value stays as it is."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value that it takes."""


class ConstantSchedule(Schedule):
    """The same value at every step."""

    kind: Literal["constant"] = "constant"
    initial: float = Field(allow_inf_nan=False, description="the value")

    def value(self, step: int) -> float:
        return self.initial

    @property
    def last_change(self) -> int:
        return 0

    @property
    def bounds(self) -> tuple[float, float]:
        return self.initial, self.initial


class _Annealed(Schedule):
    initial: float = Field(allow_inf_nan=False, description="the value up to the step `start`")
    final: float = Field(0.0, allow_inf_nan=False, description="the value from the step `start` + `steps` on")
    steps: int = Field(ge=1, description="optimizer steps from the first value to the last")
    start: int = Field(0, ge=0, description="the optimizer step at which the change begins; steps count from 0")

    @abstractmethod
    def share(self, progress: float) -> float:
        """How much of the first value is left, from 1 to 0, after this share of the steps."""

    def value(self, step: int) -> float:
        left = self.share(min(max(step - self.start, 0), self.steps) / self.steps)
        return self.final + (self.initial - self.final) * left

    @property
    def last_change(self) -> int:
        return self.start + self.steps

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.initial, self.final), max(self.initial, self.final)


class LinearSchedule(_Annealed):
    """Falls (or rises) by the same amount at every step."""

    kind: Literal["linear"] = "linear"

    def share(self, progress: float) -> float:
        return 1 - progress


class CosineSchedule(_Annealed):
    """Falls (or rises) as half a period of a cosine."""

    kind: Literal["cosine"] = "cosine"

    def share(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2 if progress < 1 else 0.0


def _from_number(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "constant", "initial": value} if number else value


ScheduleField = Annotated[
    Annotated[ConstantSchedule | LinearSchedule | CosineSchedule, Field(discriminator="kind")],
    BeforeValidator(_from_number),
]
"""The type of a config's field; a bare number means a constant."""
