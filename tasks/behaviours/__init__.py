"""Behaviours: who writes the tokens of a rollout. The seam, its registry, and one file per behaviour.

A behaviour is a config (`rollout.behaviour`) and a generator. For one completion `write` yields what the engine is to continue
(`Draw`), is sent what the engine drew (`Drawn`), may ask again, and returns the `Completion`. The sampler runs all
completions of a shard at once; each may take as many turns as it likes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from storage.errors import ConfigError
from tasks.losses.registry import Kind, Registry


@dataclass(frozen=True)
class Start:
    """One completion to write: token ids of its prompt, the most tokens that it may have, and its seed."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Draw:
    """What the student's engine is to continue: token ids (the prompt's included), at most so many new ones, the draw's seed."""

    tokens: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """What the engine wrote: T token ids, their log-probabilities under the distribution sampled from, stop or length."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Completion:
    """A completion: T token ids with one log-probability each under the distribution that they were really drawn from (0 for
    a token that was not drawn), stop or length, and how many leading tokens the student did not write."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prefix_length: int = 0


class Behaviour(Kind):
    """Who writes the tokens of a rollout. Part of the rollouts' keys, unless it is `student`."""

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    """Whether every token is drawn from the student: what sampled estimators need."""

    @abstractmethod
    def write(self, start: Start) -> Generator[Draw, Drawn, Completion]:
        """Write one completion. Must depend on nothing but `start` and the answers: it is repeated in replays."""

    @property
    def label(self) -> Literal["student", "blended", "teacher"]:
        """The value of the column `behaviour` of rollouts."""
        return "student"


BEHAVIOURS: Registry[Behaviour] = Registry("behaviour")
register = BEHAVIOURS.register

from tasks.behaviours import student  # noqa: E402, F401  # registers itself

if TYPE_CHECKING:
    BehaviourField = Behaviour
else:
    BehaviourField = BEHAVIOURS.annotation(names=True)
"""The type of the config's field; a plugin may have registered a behaviour later."""


def behaviour_of(config: Mapping[str, object]) -> Behaviour:
    """The behaviour that a job names. ConfigError for a kind that is not registered."""
    kind = str(config.get("kind"))
    if kind not in BEHAVIOURS.classes:
        raise ConfigError(f"rollout.behaviour: {kind!r} is not registered; there are {', '.join(BEHAVIOURS.classes)}")
    return BEHAVIOURS.classes[kind].model_validate(config)
