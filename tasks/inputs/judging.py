"""What gives completions their rewards: the config of the stage `judge`, and what a verifier may return."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from storage.errors import ConfigError
from storage.identity import Identity, omit_at
from tasks.inputs.verifiers import ExactMatch, FunctionVerifier, MathVerify, function_place

GIVEN = ("prompt", "token_ids", "tokens")
"""What a function gets beside completion and answer, if it has a parameter of that name."""
KEYS = ("reward", "feedback", "segments", "spans")
"""What a function may return in a dict."""
LATE_LEAST = 64
"""Completions from which on judging is given up where verifiers were stopped at their limit at more than half of them."""
TOOK_LONGER = "took longer than judge.timeout"
"""Part of the reason why a completion that a verifier was stopped at has no reward."""


class Weighted(Identity):
    """What each verifier of `judge` has beside its own fields."""

    weight: float = Field(
        1.0, ge=0, description="factor of its reward in the sum; 0: it is recorded, and does not count"
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.:-]{0,63}$",
        description="in metrics and errors; null: its kind, or the function's target",
    )


class JudgeExactMatch(Weighted, ExactMatch):
    """1 if the completion, or what a pattern extracts from it, equals the answer, else 0."""


class JudgeMathVerify(Weighted, MathVerify):
    """1 if the completion's last expression equals the answer mathematically (math-verify), else 0."""


class JudgeFunction(Weighted, FunctionVerifier):
    """A function of yours, `def score(completion: str, answer: str | None)`, which returns True or False, a finite number, or
    {reward, feedback, segments, spans} (docs/rewards.md). It also gets what it has a parameter for: prompt (text), token_ids,
    tokens (texts). Its module is looked for beside the config and on the import path.

    Its source file enters the key of the rewards; what it imports does not."""


JudgeVerifier = Annotated[JudgeExactMatch | JudgeMathVerify | JudgeFunction, Field(discriminator="kind")]
AnyVerifier = JudgeExactMatch | JudgeMathVerify | JudgeFunction


class JudgeConfig(Identity):
    """Rewards of the training rollouts: the weighted sum of what the verifiers give. It runs in rounds whose objective, or whose
    teacher's context, needs it."""

    verifiers: tuple[JudgeVerifier, ...] = Field(description="one or several; their rewards are added")
    timeout: float = Field(
        10.0,
        gt=0,
        le=600,
        description="seconds that one verifier may take for one completion. What takes longer is stopped, and the completion has"
        " no reward; math_verify has a limit of its own, at which a completion is wrong",
    )
    success_threshold: float | None = Field(
        None,
        description="reward from which a completion counts as correct, in the metrics and for {sibling} and {verdict} of a"
        " teacher's context; null: 0.5 where every reward of the round is 0 or 1, else none is counted as correct or wrong, and"
        " such contexts are refused",
    )
    max_feedback: int | None = Field(
        None,
        ge=1,
        description="characters of feedback that are kept of a completion; the text's end says how many are cut off; null: all",
        json_schema_extra=omit_at(None),
    )

    @field_validator("timeout")
    @classmethod
    def _one_spelling(cls, value: float) -> float:
        """10 and 10.0 give one key."""
        return float(value)

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if not self.verifiers:
            raise ValueError("judge.verifiers: the list is empty; give at least one, {kind: exact_match} for example")
        names = self.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"judge.verifiers: two are called {twice[0]!r}; give each a `name` of its own (without one it is the kind, or the"
                " function's target)"
            )
        if not any(verifier.weight for verifier in self.verifiers):
            raise ValueError(
                "judge.verifiers: every weight is 0, so every reward would be 0; give one a weight above 0"
            )
        return self

    @property
    def names(self) -> list[str]:
        """One per verifier, in order."""
        return [name_of(verifier) for verifier in self.verifiers]


def name_of(verifier: AnyVerifier) -> str:
    """What a verifier is called in metrics and errors."""
    return verifier.name or (verifier.target if isinstance(verifier, JudgeFunction) else verifier.kind)


def given_to(config: FunctionVerifier) -> tuple[str, ...]:
    """Which of `GIVEN` the function takes. ConfigError for a function that is not found, that does not take a completion and an
    answer, or that needs something else."""
    function = function_place(config)[0]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin: it takes what it is given
        return ()
    kinds = {p.kind for p in parameters}
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ConfigError(
            f"judge: {config.target!r} takes {len(places)} positional parameters; write"
            " `def score(completion: str, answer: str | None)`"
        )
    others = [*places[2:], *(p for p in parameters if p.kind == p.KEYWORD_ONLY)]
    unknown = [p.name for p in others if p.default is p.empty and p.name not in GIVEN]
    if unknown:
        raise ConfigError(
            f"judge: {config.target!r} needs the parameter {unknown[0]!r}; beside completion and answer it can have"
            f" {', '.join(GIVEN)}, and others with a default"
        )
    everything = inspect.Parameter.VAR_KEYWORD in kinds
    return tuple(name for name in GIVEN if everything or name in {p.name for p in others})


# --- what a verifier returns -----------------------------------------------------------------------------------------


class Unusable(ValueError):
    """A verifier's result cannot be used; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """One verifier's result for one completion of T tokens.

    `segments`: ends of segments, half-open, increasing, in 1..T; tokens after the last end are one more segment. `spans`:
    (start, end, kind), half-open, 0 <= start < end <= T, in completion tokens."""

    reward: float
    feedback: str | None = None
    segments: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int, str], ...] | None = None


def outcome_of(found: object, tokens: int) -> Outcome:
    """What a verifier returned for a completion of so many tokens. Raises Unusable, which names the part that is wrong."""
    if not isinstance(found, Mapping):
        return Outcome(_reward(found, "it must return True, False, a number or a dict, found"))
    if unknown := [str(key) for key in found if key not in KEYS]:
        raise Unusable(f"the key {unknown[0]!r} is none of {', '.join(KEYS)}")
    if "reward" not in found:
        raise Unusable("the dict that it returned has no 'reward'")
    return Outcome(
        _reward(found["reward"], "'reward' must be True, False or a number, found"),
        _feedback(found.get("feedback")),
        _segments(found.get("segments"), tokens),
        _spans(found.get("spans"), tokens),
    )


def _reward(value: object, wrong: str) -> float:
    if not isinstance(value, numbers.Real | np.bool_):
        hint = "; does it lack a return?" if value is None else ""
        raise Unusable(f"{wrong} {_shown(value)} ({type(value).__name__}){hint}")
    try:
        reward = float(value)
    except OverflowError as error:
        raise Unusable("the reward is too large") from error
    if not math.isfinite(reward):
        raise Unusable(f"the reward is {reward}, no finite number")
    return reward


def _feedback(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unusable(f"'feedback' must be a text, found {_shown(value)} ({type(value).__name__})")
    return _text(value, "'feedback'")


def _text(value: str, what: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(f"{what} has a character that is no valid Unicode text (at {error.start})") from error
    return value


def _segments(value: object, tokens: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    ends = [_place(end, "'segments'") for end in _listed(value, "'segments' must be a list of ends in tokens")]
    for before, end in itertools.pairwise([0, *ends]):
        if end <= before:
            raise Unusable(f"'segments': the end {end} is not after {before}; ends must increase")
        if end > tokens:
            raise Unusable(f"'segments': the end {end} is past the completion of {tokens} tokens")
    return tuple(ends)


def _spans(value: object, tokens: int) -> tuple[tuple[int, int, str], ...] | None:
    if value is None:
        return None
    found = []
    for item in _listed(value, "'spans' must be a list of (start, end, kind)"):
        span = list(_listed(item, "a span must be (start, end, kind)"))
        if len(span) != 3 or not isinstance(span[2], str):
            raise Unusable(f"a span must be (start, end, kind), found {_shown(item)}")
        start, end = _place(span[0], "'spans'"), _place(span[1], "'spans'")
        if not 0 <= start < end:
            raise Unusable(f"'spans': ({start}, {end}) holds no token; 0 <= start < end is needed")
        if end > tokens:
            raise Unusable(f"'spans': ({start}, {end}) is past the completion of {tokens} tokens")
        found.append((start, end, _text(span[2], "the kind of a span")))
    return tuple(found)


def _listed(value: object, wrong: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple | np.ndarray):
        raise Unusable(f"{wrong}, found {_shown(value)}")
    return list(value)


def _place(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise Unusable(f"{what}: {_shown(value)} is no place in tokens (an int)")
    return int(value)


def _shown(value: object) -> str:
    """A value in an error; whatever its own code raises."""
    try:
        text = repr(value)
    except Exception:
        return "an object"
    return text if len(text) <= 100 else f"{text[:100]}..."


# --- several verifiers -----------------------------------------------------------------------------------------------


def summed(config: JudgeConfig, outcomes: Sequence[Outcome | None]) -> Outcome:
    """The outcomes of all verifiers as one: the weighted sum of their rewards, their feedback one after another, all spans, and
    the segments of the one that gives them. None: a verifier of weight 0 gave no verdict. Raises Unusable where two give
    segments, or the sum is not finite."""
    given = [(place, found) for place, found in enumerate(outcomes) if found is not None]
    reward = math.fsum(config.verifiers[place].weight * found.reward for place, found in given)
    if not math.isfinite(reward):
        raise Unusable(f"the weighted sum of the rewards is {reward}")
    segmented = [(place, found) for place, found in given if found.segments is not None]
    if len(segmented) > 1:
        names = " and ".join(repr(config.names[place]) for place, _ in segmented)
        raise Unusable(f"{names} both give segments; a completion has one list of them")
    feedback = [found.feedback for _, found in given if found.feedback is not None]
    spans = [span for _, found in given for span in found.spans or ()]
    return Outcome(
        reward,
        "\n".join(feedback) if feedback else None,
        segmented[0][1].segments if segmented else None,
        tuple(spans) if any(found.spans is not None for _, found in given) else None,
    )


def kept_feedback(text: str, limit: int | None) -> str:
    """The text, or its first `limit` characters and how many more there were. Longer than `limit` only where it was cut."""
    return text if limit is None or len(text) <= limit else f"{text[:limit]} [... {len(text) - limit:,} characters cut]"
