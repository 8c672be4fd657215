"""Top-K lists, from their stored form to the padded arrays that objectives use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from storage.errors import InputError

_FLOOR = 1e-30
"""Least mass outside a union, so that its log stays finite."""
_ROUNDING = 2.0**-19
"""Relative error of a mass from float32 log-probabilities: a difference below this counts as 0."""


@dataclass(frozen=True)
class Rectangle:
    """The support of N tokens, padded with id 0 and -inf; the first `valid_N` entries of each row are valid."""

    ids_NK: np.ndarray
    valid_N: np.ndarray
    teacher_NK: np.ndarray
    student_NK: np.ndarray | None
    """Log-probabilities of the rollout-time student; None unless every entry has one."""
    teacher_tail_N: np.ndarray
    teacher_valid_N: np.ndarray | None = None
    """For a union: number of valid entries, at the front, from the teacher's own list."""


class Support(Protocol):
    """Source of the support of tokens."""

    def rows(self, index: np.ndarray) -> Rectangle:
        """The support of the flat completion tokens `index`."""


@dataclass(frozen=True)
class TopK:
    """A stored signal: flat token n has `counts[n]` entries from `starts[n]`, likeliest first.

    `k` entries are used; if more are stored, the rest is added to the tail."""

    k: int
    starts: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    teacher: np.ndarray
    student: np.ndarray | None
    teacher_tail: np.ndarray
    """Log of the teacher's mass outside the stored list, per token."""

    def rows(self, index: np.ndarray) -> Rectangle:
        stored, starts = self.counts[index], self.starts[index][:, None]
        place = np.arange(self.k)[None, :]
        here = place < stored[:, None]
        at = np.where(here, starts + place, 0)
        tail = self.teacher_tail[index].astype(np.float64)
        more = int(stored.max(initial=0)) - self.k
        if more > 0:
            place = self.k + np.arange(more)[None, :]
            cut = place < stored[:, None]
            lost = np.where(cut, self.teacher[np.where(cut, starts + place, 0)].astype(np.float64), -np.inf)
            tail = np.logaddexp.reduce(np.concatenate([lost, tail[:, None]], axis=1), axis=1)
        return Rectangle(
            ids_NK=np.where(here, self.ids[at], 0).astype(np.int64),
            valid_N=np.minimum(stored, self.k).astype(np.int64),
            teacher_NK=np.where(here, self.teacher[at], -np.inf).astype(np.float32),
            student_NK=None if self.student is None else np.where(here, self.student[at], -np.inf).astype(np.float32),
            teacher_tail_N=tail.astype(np.float32),
        )


@dataclass(frozen=True)
class UnionTopK:
    """The ids of either model's list, the teacher's first; between k and 2k entries."""

    teacher: TopK
    student: TopK

    def rows(self, index: np.ndarray) -> Rectangle:
        first, second = self.teacher.rows(index), self.student.rows(index)
        width = first.ids_NK.shape[1]
        of_first = np.arange(width)[None, :] < first.valid_N[:, None]
        of_second = np.arange(second.ids_NK.shape[1])[None, :] < second.valid_N[:, None]
        shared = ((second.ids_NK[:, :, None] == first.ids_NK[:, None, :]) & of_first[:, None, :]).any(axis=2)
        new = of_second & ~shared
        extra = np.where(new, np.exp(second.teacher_NK.astype(np.float64)), 0.0).sum(axis=1)
        outside = np.exp(first.teacher_tail_N.astype(np.float64))
        left = outside - extra
        tail = np.log(np.maximum(np.where(left > _ROUNDING * outside, left, 0.0), _FLOOR))
        there = np.concatenate([of_first, new], axis=1)
        order = np.argsort(~there, axis=1, kind="stable")  # valid entries to the front
        there = np.take_along_axis(there, order, axis=1)
        ids = np.take_along_axis(np.concatenate([first.ids_NK, second.ids_NK], axis=1), order, axis=1)
        teacher = np.take_along_axis(np.concatenate([first.teacher_NK, second.teacher_NK], axis=1), order, axis=1)
        return Rectangle(
            ids_NK=np.where(there, ids, 0),
            valid_N=there.sum(axis=1),
            teacher_NK=np.where(there, teacher, -np.inf).astype(np.float32),
            student_NK=None,
            teacher_tail_N=tail.astype(np.float32),
            teacher_valid_N=first.valid_N,
        )


def harmless(rectangle: Rectangle) -> Rectangle:
    """The same shape with finite, consistent values, for masked tokens. One entry is valid, because a union may be wider than
    the vocabulary."""
    n, k = rectangle.ids_NK.shape
    inside = np.full((n, k), np.log(1 - np.exp(-1.0)), np.float32)
    one = np.ones(n, np.int64)
    return Rectangle(
        ids_NK=np.zeros((n, k), np.int64),
        valid_N=one,
        teacher_NK=inside,
        student_NK=None if rectangle.student_NK is None else inside,
        teacher_tail_N=np.full(n, -1.0, np.float32),
        teacher_valid_N=None if rectangle.teacher_valid_N is None else one,
    )


def lists_of(support: Support | None) -> tuple[TopK, ...]:
    """The stored signals that a support is made of, the teacher's first."""
    if isinstance(support, UnionTopK):
        return (support.teacher, support.student)
    assert support is None or isinstance(support, TopK)
    return () if support is None else (support,)


def support_of(lists: Sequence[TopK]) -> Support | None:
    """The inverse of `lists_of`."""
    return UnionTopK(*lists) if len(lists) == 2 else lists[0] if lists else None


def check_width(name: str, widest: int, k: int | None, cut: bool = False) -> int:
    """The K to use of the signal `name`, whose lists have at most `widest` entries. InputError if the lists are narrower than the
    objective needs; lists that a tail mass `cut` off may be."""
    if cut:
        return min(k or widest, widest)
    if k is not None and k > widest:
        raise InputError(f"{name}: the objective needs K={k}, but the stored lists have at most {widest} entries")
    return k or widest
