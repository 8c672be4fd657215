"""Behaviours: who writes the tokens of a rollout. The seam, its registry, and one file per behaviour.

A behaviour is a config (`rollout.behaviour`) and a generator. For one completion `write` yields what the engine is to continue
(`Draw`), is sent what the engine drew (`Drawn`), may ask again, and returns the `Completion`. The sampler runs all
completions of a shard at once; each may take as many turns as it likes.

One that reads the teacher may yield a `Score` too: it asks student and teacher for the distributions of the tokens that follow
some prefixes, and is sent a `Scored`. The sampler collects the scores that completions wait for, gives both models their tokens
in one forward, and calls `digest` once for all of them.

What a behaviour does may depend on the optimizer step (`at`). Keys hold the behaviour that holds for a round."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from storage.errors import ConfigError
from storage.schemas import TableSchema
from tasks.losses.registry import Kind, Registry

if TYPE_CHECKING:
    from torch import Tensor

Label = Literal["student", "blended", "teacher"]
"""Who wrote a completion: the column `behaviour` of rollouts."""
Read = Literal["teacher", "drafts", "completions"]
"""What a behaviour may need beside the student: the teacher's weights in the sampler's process; completions that the teacher
wrote in advance; completions that came with the prompts."""


@dataclass(frozen=True)
class Draft:
    """A completion that was written before: T token ids that the student has too, their log-probabilities under the
    distribution that they were drawn from (0 where it is not known), stop or length."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Start:
    """One completion to write: token ids of its prompt, the most tokens that it may have, its seed, and the ids that end a
    completion for the student, and (where the behaviour reads it) those that do for the teacher and are the same token to the
    student; where it reads drafts or completions, the one for this sample; the sample's index among those of its prompt."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...] = ()
    teacher_stop_ids: tuple[int, ...] = ()
    draft: Draft | None = None
    index: int = 0


@dataclass(frozen=True)
class Draw:
    """What the student's engine is to continue: token ids (the prompt's included), at most so many new ones, the draw's seed, and
    ids that end this draw beside those that end every completion."""

    tokens: tuple[int, ...]
    max_tokens: int
    seed: int
    stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """What the engine wrote: T token ids, their log-probabilities under the distribution sampled from, stop or length."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Score:
    """What student and teacher are to read: the first tokens of a completion (without the prompt, of which each model has its
    own). Asked for are the distributions of the token that follows its first `after` tokens, its first `after` + 1, and so on, up
    to all of them: N = len(tokens) - after + 1."""

    tokens: tuple[int, ...]
    after: int


@dataclass(frozen=True)
class Scored:
    """The answer: by name what the behaviour's `digest` made, tensors (N, ...) on its device, a row for each position."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Stops:
    """The ids that end a completion for the student, and for the teacher. `unmapped`: ids that are another token to the teacher
    than to the student, or that one of them lacks."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    unmapped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A completion: T token ids with one log-probability each under the distribution that they were really drawn from (0 for
    a token that was not drawn), stop or length, and how many leading tokens the student did not write. `values`: by name the
    cells of the behaviour's own table (`Behaviour.table`), without `sample_id`. `label`: who wrote it, where that is not the
    behaviour's label."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prefix_length: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    label: Label | None = None


Ask = Draw | Score
Answer = Drawn | Scored


class Behaviour(Kind):
    """Who writes the tokens of a rollout. Part of the rollouts' keys, unless it is `student`."""

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    """Whether every token after a completion's prefix is drawn from the student: what sampled estimators need."""
    prefixes: ClassVar[bool] = False
    """Whether completions may begin with tokens that the student did not write (`Completion.prefix_length`)."""
    weighable: ClassVar[bool] = False
    """Whether `sampling_logprobs` are of distributions that importance weights lead back from to the student's: every token was
    drawn, from what can be any token of the student's."""
    pairs: ClassVar[bool] = False
    """Whether samples are written in pairs: of each two that follow each other (`pair_of`) one is the student's and one the
    teacher's. What an objective that compares two completions needs."""
    table: ClassVar[TableSchema | None] = None
    """A table of its own beside `rollouts`, one row per sample, made with them: an artifact of the table's name, with the shards
    of the rollouts. Its first column is `sample_id`; lists have one entry per token. Set `prefixed`."""

    @abstractmethod
    def write(self, start: Start) -> Generator[Any, Any, Completion]:
        """Write one completion: yields a `Draw` and is sent a `Drawn`, or a `Score` and is sent a `Scored`. Must depend on
        nothing but `start` and the answers: it is repeated in replays."""

    @property
    def reads(self) -> frozenset[Read]:
        """What it needs beside the student. Only this enters the rollouts' key and is loaded."""
        return frozenset()

    @property
    def draws(self) -> bool:
        """Whether the student's engine draws any token; if not, the student is not in the rollouts' key."""
        return True

    def draft_index(self, sample_index: int) -> int:
        """Which of its prompt's drafts a sample gets, modulo their number."""
        return sample_index

    @property
    def last_change(self) -> int:
        """The optimizer step from which `at` gives the same."""
        return 0

    def at(self, step: int) -> Behaviour:
        """The behaviour that holds for a round whose first optimizer step is `step` (from 0), without schedules: what the
        rollouts' key holds. It may be another kind, and may read less."""
        return self

    def digest(self, student_NV: Tensor, teacher_NV: Tensor, stops: Stops) -> Mapping[str, Tensor]:
        """What `write` is sent of the distributions that it asked for, by name, a row for each of N: log-probabilities
        (temperature 1) over V ids, those of both models. Called for many completions at once; runs where the models do."""
        return {"student": student_NV, "teacher": teacher_NV}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float | None]:
        """What the round's metrics say of the rows of its own table."""
        return {}

    def problems(self, sampling: Any) -> list[str]:
        """What does not fit the fields beside it in `rollout` (a `RolloutConfig`), by field, and what to do."""
        return []

    @property
    def label(self) -> Label:
        """Who writes the completions."""
        return "student"


def pair_of(sample_index: int) -> int:
    """The number of a sample's pair among those of its prompt: two samples that follow each other are one, from index 0."""
    return sample_index // 2


BEHAVIOURS: Registry[Behaviour] = Registry("behaviour")
register = BEHAVIOURS.register

from tasks.behaviours import mixture, pairs, student, teacher_prefix, trust_region  # noqa: E402, F401  # they register themselves

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
