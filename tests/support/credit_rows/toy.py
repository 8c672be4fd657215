"""The input of the plain rows: a batch of one optimizer step with every number that a row may ask for.

`Toy` holds samples in the order of the batch, those of one group (same prompt, same round) under one `prompt` number, and
pairs for PBSD. Per sample, T tokens over V ids, float64:

    prompt        the group's number
    tokens        [T] sampled ids
    live          [T, V] logits of the student now; requires grad (a leaf, or computed from other parameters)
    old           [T, V] logits of the student at rollout time (p_old)
    teacher       [T, V] logits of the teacher under its context; under the plain prompt where there is no context
    reference     [T, V] logits of the reference model
    written       [T] 1: the student wrote this token; 0: a tool's or a teacher's token
    signal        [T] 1: the teacher's number at this position is valid
    loss          [T] loss mask
    reward        the verifier's number; NaN: the judge failed
    has_context   whether the teacher read a privileged context
    segment_ends  half-open ends of segments, in tokens; the last one is T. Equal neighbours: an empty segment
    spans         (start, end, kind) half-open in tokens, kind "key" or "error"; may overlap
    stops         whether the last token is a stop token (False: cut by length)

The mask of the loss is `loss * written`. Logits are those after a merge of stop ids, at temperature 1.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sample:
    prompt: int
    tokens: list[int]
    live: Tensor
    old: Tensor
    teacher: Tensor
    reference: Tensor
    written: list[int]
    signal: list[int]
    loss: list[int]
    reward: float
    has_context: bool = True
    segment_ends: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    stops: bool = True

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.written) == len(self.signal) == len(self.loss) == self.live.shape[0]
        if not self.segment_ends:
            self.segment_ends = [len(self.tokens)]

    @property
    def judged(self) -> bool:
        return not math.isnan(self.reward)

    def k(self, t: int) -> int:
        """The loss mask of a token that the student wrote."""
        return self.loss[t] * self.written[t]


@dataclass
class Toy:
    samples: list[Sample]
    pairs: list[tuple[int, int]] = field(default_factory=list)  # indices of (y+, y-), for PBSD

    @property
    def vocabulary(self) -> int:
        return self.samples[0].live.shape[1]

    def group(self, i: int) -> list[int]:
        """Indices of all samples of sample i's group, itself included."""
        return [j for j, other in enumerate(self.samples) if other.prompt == self.samples[i].prompt]


def made_sample(draw: random.Random, noise: torch.Generator, prompt: int, length: int, v: int, reward: float) -> Sample:
    """A random sample: a few masked tokens, segments (some empty), at most one short span and one overlap."""

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(length, v, generator=noise, dtype=torch.float64)

    old = normal(1.5)
    cuts = sorted(draw.randint(0, length) for _ in range(draw.randint(0, 3)))
    start = draw.randrange(length)
    kind = "key" if reward >= 0.5 else "error"
    spans = [] if draw.random() < 0.3 else [(start, start + 1, kind)]
    if spans and draw.random() < 0.3:  # an overlap, united; often above the coverage
        spans.append((start, min(start + 2, length), kind))
    written = [int(draw.random() < 0.9) for _ in range(length)]
    return Sample(
        prompt=prompt,
        tokens=[draw.randrange(v) for _ in range(length)],
        live=(old + normal(0.4)).requires_grad_(),
        old=old,
        teacher=old + normal(1.0),
        reference=old + normal(0.5),
        written=written,
        signal=[int(draw.random() < 0.85) for _ in range(length)],
        loss=[int(draw.random() < 0.9) and written[t] for t in range(length)],
        reward=reward,
        segment_ends=[*cuts, length],
        spans=spans,
        stops=draw.random() < 0.8,
    )


def toys(seed: int, graded: bool = False) -> Toy:
    """A varied batch: V 5 to 8, groups of 2 to 4 samples of 1 to 6 tokens.

    By group: 0 right and wrong (with a sample without context, and one whose d is large), 1 all right, 2 all wrong,
    3 with a failed judge among others, 4 two samples of which one judge failed (one judged sample only), 5 right and
    wrong with an empty loss mask and a single-token sample. `graded`: rewards of group 0 between 0 and 1.
    """
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    v = draw.randint(5, 8)

    def sample(prompt: int, reward: float, length: int | None = None) -> Sample:
        return made_sample(draw, noise, prompt, draw.randint(1, 6) if length is None else length, v, reward)

    bad = math.nan
    mixed = [0.9, 0.3, 0.6, 0.0] if graded else [1.0, 0.0, 1.0, 0.0]
    rewards = [
        mixed,
        [1.0] * draw.randint(2, 4),
        [0.0] * draw.randint(2, 4),
        [1.0, bad, 0.0],
        [1.0, bad],
        [0.0, 1.0, 0.0],
    ]
    samples = [sample(prompt, reward) for prompt, group in enumerate(rewards) for reward in group]
    first = {s.prompt: i for i, s in reversed(list(enumerate(samples)))}
    samples[first[0] + 1] = sample(0, mixed[1], 5)
    samples[first[0] + 1].has_context = False
    samples[first[0] + 2] = sample(0, mixed[2], 4)
    samples[first[0] + 3] = sample(0, mixed[3], 6)
    for i, sign in ((first[0] + 2, 1), (first[0] + 3, -1)):  # |d| of about 10 at the sampled token
        for t, y in enumerate(samples[i].tokens):
            samples[i].teacher[t, y] += 10 * sign
    for i in range(first[2], first[3]):  # no correct sibling; one keeps a context all the same
        samples[i].has_context = i == first[2]
    samples[first[3] + 1].has_context = False
    samples[first[5]].loss = [0] * len(samples[first[5]].tokens)
    samples[first[5] + 2] = sample(5, 0.0, 1)
    samples[first[5] + 2].written = samples[first[5] + 2].signal = samples[first[5] + 2].loss = [1]
    pairs = [(first[0], first[0] + 1), (first[0] + 2, first[0] + 3), (first[5] + 1, first[5] + 2)]
    return Toy(samples, pairs)
