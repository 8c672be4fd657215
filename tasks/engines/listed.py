"""Answers from lists of candidates: what an engine that gives the K likeliest tokens and the sampled one can say about a
completion. numpy only; used for vLLM in process and for a server.

The engine's softmax runs over all rows of its model. Rows past the shared vocabulary are padding: candidates among them are left
out, and their mass, which a trained model keeps near 0, counts as tail. The mass of a tail is 1 minus that of the list, so it is
exact to rounding of the list's sum; below `ROUNDING` it cannot be told from 0 and is set to that, because a tail of probability 0
would make every divergence of a student with mass there infinite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from storage.errors import InputError
from tasks.engines.teacher import Passage, Vocabulary
from tasks.signals import Ask, Values
from tasks.signals.tables import LOGPROB_MAX

ROUNDING = 2.0**-23
"""Mass of a tail below which the float32 sum of a list says nothing."""


@dataclass(frozen=True)
class Listed:
    """What an engine said about the tokens of one completion: T of them, each with K candidates, likeliest first."""

    logprobs_T: np.ndarray
    """float32, of the completion's own tokens"""
    ids_TK: np.ndarray
    """int64"""
    logprobs_TK: np.ndarray
    """float32"""

    @classmethod
    def empty(cls, k: int) -> Listed:
        return cls(np.empty(0, np.float32), np.empty((0, k), np.int64), np.empty((0, k), np.float32))


def candidates(ask: Ask, entropy_k: int, rows: int) -> int:
    """Length of the list that answers what is asked; 0: only the sampled tokens."""
    return min(max([*ask.top, entropy_k if ask.entropy else 0], default=0), rows)


def refuse_unreadable(passage: Passage, name: str, rows: int, limit: int | None, what: str) -> None:
    """InputError for a passage without a prompt, with an id of the prompt that the model lacks, or too long for `limit` tokens
    with the one that an engine must generate."""
    if not len(passage.prompt):
        raise InputError(f"{name}: a prompt without tokens; nothing predicts its completion's first token")
    if np.max(passage.prompt) >= rows or np.min(passage.prompt) < 0:
        raise InputError(f"{name}: token id {np.max(passage.prompt)}, but the teacher has {rows} rows")
    length = len(passage.prompt) + len(passage.completion) + 1
    if limit is not None and length > limit:
        raise InputError(
            f"{name}: {length - 1} tokens of prompt and completion and one that is generated, but {what} reads {limit}; lower"
            " rollout.max_completion_length or prompts.max_prompt_length, or let it read more"
        )


def readable(passage: Passage, rows: int) -> tuple[list[int], int]:
    """(token ids to send, completion tokens among them): all, or all before the first completion token that a model of `rows` ids
    lacks, with 0 in its place, since the distribution before that token is asked for too."""
    prompt, completion = (np.asarray(ids, np.int64) for ids in (passage.prompt, passage.completion))
    foreign = np.flatnonzero(completion >= rows)[:1].tolist()
    completion = np.append(completion[: foreign[0]], 0) if foreign else completion
    return [*prompt.tolist(), *completion.tolist()], len(completion)


def unfold(listed: Listed, passage: Passage, rows: int) -> Listed:
    """The answer for a whole completion from that for its readable part: a token that the model lacks has the log-probability
    -inf, and everything after it is NaN (see `Teacher.score`)."""
    missing = len(passage.completion) - len(listed.logprobs_T)
    logprobs_T = listed.logprobs_T.copy()
    if len(logprobs_T) and passage.completion[len(logprobs_T) - 1] >= rows:
        logprobs_T[-1] = -np.inf
    k = listed.ids_TK.shape[1]
    return Listed(
        np.concatenate([logprobs_T, np.full(missing, np.nan, np.float32)]),
        np.concatenate([listed.ids_TK, np.tile(np.arange(k), (missing, 1))]),
        np.concatenate([listed.logprobs_TK, np.full((missing, k), np.nan, np.float32)]),
    )


def values_of(listed: Sequence[Listed], ask: Ask, vocabulary: Vocabulary, entropy_k: int) -> Values:
    """What is asked, of every completion, under the names of `Teacher.score`. Lists must be as long as `candidates` says."""
    found: dict[str, list[np.ndarray]] = {}
    for one in listed:
        for name, array in _quantities(one, ask, vocabulary, entropy_k).items():
            found.setdefault(name, []).append(array)
    return found


def _quantities(one: Listed, ask: Ask, vocabulary: Vocabulary, entropy_k: int) -> Mapping[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if ask.logprobs:
        found["logprobs"] = usable(one.logprobs_T)
    if ask.entropy:
        found["entropy"] = _entropy(one, min(entropy_k, one.ids_TK.shape[1]), vocabulary.rows)
    for k in sorted(ask.top):
        ids_TK, logprobs_TK = _shared(one, k, vocabulary.shared)
        broken_T = np.isnan(logprobs_TK).any(axis=1) | np.isnan(one.logprobs_TK[:, :k]).any(axis=1)
        found[f"top{k}_ids"], found[f"top{k}_logprobs"] = ids_TK, logprobs_TK
        found[f"top{k}_valid"] = np.where(broken_T, 0, np.isfinite(logprobs_TK).sum(axis=1))
        found[f"top{k}_tail"] = tail(logprobs_TK, whole=k >= vocabulary.rows)
    return found


def _shared(one: Listed, k: int, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """The k likeliest of the shared ids, with padding candidates moved behind them as unusable entries of id 0."""
    ids_TK, logprobs_TK = one.ids_TK[:, :k], usable(one.logprobs_TK[:, :k])
    padding_TK = ids_TK >= shared
    if not padding_TK.any():
        return ids_TK, logprobs_TK
    order_TK = np.argsort(padding_TK, axis=1, kind="stable")
    ids_TK = np.take_along_axis(np.where(padding_TK, 0, ids_TK), order_TK, axis=1)
    logprobs_TK = np.take_along_axis(np.where(padding_TK, np.float32(-np.inf), logprobs_TK), order_TK, axis=1)
    return ids_TK, logprobs_TK


def tail(logprobs_TK: np.ndarray, whole: bool) -> np.ndarray:
    """Log of the mass outside each list; -inf where the list is the whole vocabulary."""
    mass_T = np.exp(logprobs_TK.astype(np.float64)).sum(axis=1)
    if whole:
        return np.where(np.isnan(mass_T), np.nan, -np.inf).astype(np.float32)
    return np.log(np.maximum(1 - mass_T, ROUNDING)).astype(np.float32)


def _entropy(one: Listed, k: int, rows: int) -> np.ndarray:
    """Of the list with the rest as one category: at most that of the whole distribution."""
    logprobs_TK = usable(one.logprobs_TK[:, :k])
    tail_T = tail(logprobs_TK, whole=k >= rows)
    every_TK = np.concatenate([logprobs_TK, tail_T[:, None]], axis=1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms_TK = np.where(np.isneginf(every_TK), 0.0, np.exp(every_TK) * every_TK)
    return (-terms_TK.sum(axis=1)).astype(np.float32)


def usable(logprobs: np.ndarray) -> np.ndarray:
    """Values above zero by rounding become zero, larger ones NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(logprobs > LOGPROB_MAX, np.float32(np.nan), np.minimum(logprobs, np.float32(0)))
