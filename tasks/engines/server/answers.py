"""What a teacher's server answers to a request, and how it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from tasks.engines.listed import Listed
from tasks.engines.server.client import TeacherServerError
from tasks.signals.tables import LOGPROB_MAX

_FLOOR = -9999.0
"""What vLLM writes for -inf, which JSON does not have."""


class Logprob(msgspec.Struct):
    logprob: float
    rank: int | None = None


class Choice(msgspec.Struct):
    index: int
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Completion(msgspec.Struct):
    choices: list[Choice]


class Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[Model]


class Malformed(Exception):
    """An answer that does not hold what was asked."""


def read_answer(data: bytes, sequences: Sequence[Sequence[int]], counts: Sequence[int], k: int) -> list[Listed]:
    """The last `counts[i]` tokens of every sequence with their k candidates. Malformed for less than was asked."""
    try:
        answer = msgspec.json.decode(data, type=Completion)
    except msgspec.DecodeError as error:
        raise Malformed(f"it is not what /v1/completions of vLLM answers ({error})") from error
    choices = {choice.index: choice for choice in answer.choices}
    if sorted(choices) != list(range(len(sequences))):
        raise Malformed(f"it has {len(answer.choices)} sequences, asked for {len(sequences)}")
    found = []
    for index, (ids, count) in enumerate(zip(sequences, counts, strict=True)):
        places = choices[index].prompt_logprobs
        if places is None or len(places) != len(ids):
            raise Malformed(f"it has {len(places or ())} tokens with log-probabilities, asked for {len(ids)}")
        if not count:
            found.append(Listed.empty(k))
            continue
        rows = [_read_place(places[at], ids[at], at, k) for at in range(len(ids) - count, len(ids))]
        found.append(
            Listed(
                np.array([row[0] for row in rows], np.float32),
                np.array([row[1] for row in rows], np.int64).reshape(count, k),
                np.array([row[2] for row in rows], np.float32).reshape(count, k),
            )
        )
    return found


def _read_place(
    place: Mapping[int, Logprob] | None, token: int, at: int, k: int
) -> tuple[float, list[int], list[float]]:
    if place is None or token not in place:
        raise Malformed(f"token {at} of a sequence has no log-probability of the token {token} itself")
    own, rank = value_of(place[token]), place[token].rank
    # the token itself comes on top of the candidates, unless it is one of them
    among = rank <= k if rank is not None else len(place) == k
    kept = {other: entry for other, entry in place.items() if among or other != token}
    if len(kept) != k:
        raise Malformed(f"token {at} of a sequence has {len(kept)} candidates, asked for {k}")
    order = sorted(kept.items(), key=lambda pair: (-value_of(pair[1]), pair[1].rank or 0))
    values = [value_of(entry) for _, entry in order]
    if values and (values[0] > LOGPROB_MAX or sum(map(math.exp, values)) > 1 + LOGPROB_MAX):
        raise Malformed(
            f"the candidates of token {at} have a mass above 1: these are no log-probabilities; start the server with"
            " --logprobs-mode raw_logprobs"
        )
    return own, [other for other, _ in order], values


def value_of(entry: Logprob) -> float:
    return -math.inf if entry.logprob <= _FLOOR else entry.logprob


def decoded(data: bytes, kind: Any, where: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise TeacherServerError(f"supervise.teacher: {where} does not answer as vLLM does ({error})") from error
