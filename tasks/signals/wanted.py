"""What is asked of student and teacher about every completion token. Torch-free.

Names of the answers (`Values`), for a model `m` of student and teacher; T completion tokens, K candidates:

- `m_logprobs` (T), `m_entropy` (T): of the sampled tokens, temperature 1, full vocabulary, in nats;
- `m_top<k>_ids`, `m_top<k>_logprobs` (T, K), `m_top<k>_valid`, `m_top<k>_tail` (T): its k likeliest ids, likeliest first, how
  many of them are usable, and the log of the mass of all others;
- `teacher_on<k>_logprobs` (T, K), `teacher_on<k>_tail` (T): the teacher's, of the ids in `student_top<k>_ids`;
- `student_behaviour_logprobs`, `student_outside` (T): the student's, under the distribution sampled from, and which tokens lie
  outside of that distribution's set by the scorer's rounding;
- `reverse_kl` (T): exact KL(student || teacher) over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

Values = dict[str, list[np.ndarray]]
"""Per quantity one array per sample."""


@dataclass(frozen=True)
class Ask:
    """What one model is asked about every completion token."""

    logprobs: bool = False
    entropy: bool = False
    top: frozenset[int] = frozenset()
    """for each of these k: its own list of candidates"""
    on: frozenset[int] = frozenset()
    """for each of these k: its log-probabilities of the ids in the other model's list of k"""
    sampling: Mapping[str, Any] | None = None
    """temperature, top_p, top_k, min_p: log-probabilities under the distribution sampled from"""

    def __str__(self) -> str:
        """What is asked, for people."""
        parts = ["log-probabilities of the sampled tokens"] * self.logprobs + ["entropies"] * self.entropy
        parts += [f"its {k} likeliest tokens" for k in sorted(self.top)]
        parts += [f"log-probabilities of the student's {k} likeliest tokens" for k in sorted(self.on)]
        parts += ["log-probabilities under the distribution sampled from"] * bool(self.sampling)
        return ", ".join(parts) or "nothing"

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def __or__(self, other: Ask) -> Ask:
        """What both ask."""
        return Ask(
            self.logprobs or other.logprobs,
            self.entropy or other.entropy,
            self.top | other.top,
            self.on | other.on,
            self.sampling or other.sampling,
        )


@dataclass(frozen=True)
class Wanted:
    """What is asked of the two models. ValueError for questions that only the other model can answer, and for
    log-probabilities on a list that is not asked for."""

    student: Ask = Ask()
    teacher: Ask = Ask()
    reverse_kl: bool = False

    def __post_init__(self) -> None:
        if self.student.on or self.teacher.sampling or not self.teacher.on <= self.student.top:
            raise ValueError(
                "only the teacher is asked about the other's lists, which must be among those that the student is asked"
                " for; only the student for the distribution sampled from"
            )

    def __or__(self, other: Wanted) -> Wanted:
        """What both want."""
        return Wanted(self.student | other.student, self.teacher | other.teacher, self.reverse_kl or other.reverse_kl)

    @property
    def models(self) -> tuple[str, ...]:
        """Those that must be run."""
        asked = {"student": self.student, "teacher": self.teacher}
        return tuple(name for name, ask in asked.items() if ask or self.reverse_kl)

    @property
    def largest(self) -> int:
        """Candidates of the longest list; 0 without one."""
        return max(self.student.top | self.teacher.top, default=0)
