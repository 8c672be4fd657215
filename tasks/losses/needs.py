"""What an objective needs: stored signals, values of samples, quantities of the live student. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SupportKind = Literal["teacher_topk", "student_topk", "union", "full"]


@dataclass(frozen=True)
class SignalNeed:
    """One signal of supervision, by the name it is registered under (`tasks.signals`); `k` is the least number of entries per
    token where the signal is a top-K list."""

    name: str
    k: int | None = None


@dataclass(frozen=True)
class StudentRequest:
    """What a head provider must compute of the live student; it may leave out the rest.

    `support` gives the ids of which scores are wanted: normalised over the vocabulary when `log_normaliser` is set,
    else raw logits (K rows of the head then suffice). `tail` is the student's log-mass outside the support,
    `overlap` the share of the teacher's list among as many top entries of the student (where the support holds that
    list: not for `student_topk`); both imply the full vocabulary, as do `token_logprobs` and `entropy`. `exclude_ids`
    do not exist for support, normaliser and tail of tokens whose support lists them; elsewhere they are ids like any
    other. `token_logprobs` and `entropy` ignore them. `stop_ids` are one category, everywhere (`losses/stop_ids.py`); a
    support never lists another than the first of them."""

    support: SupportKind | None = None
    token_logprobs: bool = False
    log_normaliser: bool = False
    tail: bool = False
    entropy: bool = False
    overlap: bool = False
    exclude_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()

    @property
    def whole_vocabulary(self) -> bool:
        """Whether anything asked for depends on logits outside the support."""
        return self.token_logprobs or self.log_normaliser or self.tail or self.entropy or self.overlap


def everything(support: SupportKind, exclude_ids: tuple[int, ...] = ()) -> StudentRequest:
    """What the metrics of an objective with a support need of the student."""
    return StudentRequest(
        support=support,
        token_logprobs=True,
        log_normaliser=True,
        tail=True,
        entropy=True,
        overlap=True,
        exclude_ids=exclude_ids,
    )


@dataclass(frozen=True)
class CreditNeeds:
    """What a credit reads beside log-probabilities and positions; the trainer's data has it only where it is needed."""

    reward: bool = False
    """the reward of each sample, from the stage `judge`; NaN where its judge failed"""
    groups: bool = False
    """which samples have the same prompt; with `reward`, the rewards of all of them"""
    teacher_entropy: bool = False
    student_entropy: bool = False
    """of the student that wrote the rollouts"""
    segment_ends: tuple[int, ...] = ()
    """token ids that end a segment of a completion, each the last token of its segment; none: no segments"""
    contexts: bool = False
    """which samples have a context of their own, that the teacher reads"""
    written: bool = False
    """which tokens the student wrote, and which have valid numbers, also where the loss mask leaves them out"""
    ended: bool = False
    """which completions end with a stop token"""
    spans: bool = False
    """which tokens are in the spans that the judge found"""
    judged_segments: bool = False
    """the segments of a completion that the judge found"""
    signals: tuple[SignalNeed, ...] = ()
    """further signals of supervision, beside `sampled`, `mask` and the lists of the support and of `side`"""


@dataclass(frozen=True)
class Needs:
    """Everything that an objective needs.

    `metrics` is a second request, for steps that log: the trainer computes it without gradient beside `student` and
    hands it to the objective as `observed`, so that logging changes no bit of the loss."""

    signals: tuple[SignalNeed, ...]
    student: StudentRequest
    metrics: StudentRequest
    draws: bool = False
    """one uniform number per token, from a counter-based generator keyed by (seed, sample id, position)"""
    takes_prefixes: bool = False
    """keep tokens that the teacher wrote in the batch, marked by `teacher_prefix_N`: the objective has a term for them"""
    pairs: bool = False
    """samples are pairs, one of the student's and one of the teacher's: both are in one micro-batch"""
    credit: CreditNeeds = CreditNeeds()
