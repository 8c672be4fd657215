"""Every completion of a small token tree, with its probability, as samples of a `credit_rows.Toy`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from credit_rows import Sample, Toy
from torch import Tensor

STOP = 0
Prefix = tuple[int, ...]


def prefixes(v: int, depth: int) -> Iterator[Prefix]:
    """Every text that can be continued: no stop token, shorter than depth."""
    for length in range(depth):
        yield from itertools.product(range(1, v), repeat=length)


@dataclass
class Tree:
    """Student and teacher logits [V] at every prefix. A completion ends at the stop token or, cut, at `depth` tokens."""

    v: int
    depth: int
    student: dict[Prefix, Tensor]  # leaves that require grad
    teacher: dict[Prefix, Tensor]

    @classmethod
    def random(cls, seed: int, v: int, depth: int) -> Tree:
        noise = torch.Generator().manual_seed(seed)

        def logits(scale: float) -> dict[Prefix, Tensor]:
            return {at: scale * torch.randn(v, generator=noise, dtype=torch.float64) for at in prefixes(v, depth)}

        student = {at: x.requires_grad_() for at, x in logits(0.8).items()}
        return cls(v, depth, student, logits(1.2))

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.student.values())

    def completions(self) -> list[Prefix]:
        ended = [(*at, STOP) for at in self.student]
        return ended + [(*at, y) for at in self.student if len(at) == self.depth - 1 for y in range(1, self.v)]

    def log_prob(self, of: dict[Prefix, Tensor], y: Prefix) -> Tensor:
        """log P of a completion, live for the student."""
        terms = [of[y[:t]].log_softmax(0)[y[t]] for t in range(len(y))]
        return torch.stack(terms).sum()

    def chance(self, y: Prefix) -> float:
        return math.exp(self.log_prob(self.student, y).item())

    def expected(self, value: Callable[[Prefix], float | Tensor]) -> Tensor:
        """E_{y ~ p} value(y), live through p and through a live value."""
        return torch.stack([self.log_prob(self.student, y).exp() * value(y) for y in self.completions()]).sum()

    def sample(self, y: Prefix, prompt: int = 0, reward: float = 0.0) -> Sample:
        """A completion as a sample: on-policy (p_old = p), all masks 1."""
        live = torch.stack([self.student[y[:t]] for t in range(len(y))])
        teacher = torch.stack([self.teacher[y[:t]] for t in range(len(y))])
        ones = [1] * len(y)
        return Sample(
            prompt, list(y), live, live.detach(), teacher, teacher, ones, ones, ones, reward, stops=y[-1] == STOP
        )

    def gradient(self, of: Tensor) -> list[Tensor]:
        """d of / d parameters."""
        found = torch.autograd.grad(of, self.parameters, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, self.parameters, strict=True)]

    def chained(self, samples: Sequence[Sample], gradients: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        """sum of weight * (d loss / d live), carried on to the parameters."""
        total = sum((w * (g.detach() * s.live).sum() for s, g, w in zip(samples, gradients, weights, strict=True)), 0)
        assert isinstance(total, Tensor)
        return self.gradient(total)


def groups(tree: Tree, reward: Callable[[Prefix], float], size: int) -> tuple[Toy, list[float]]:
    """Every tuple of `size` completions as a group of its own, and per sample its tuple's probability."""
    samples, weights = [], []
    for number, members in enumerate(itertools.product(tree.completions(), repeat=size)):
        chance = math.prod(tree.chance(y) for y in members)
        for y in members:
            samples.append(tree.sample(y, number, reward(y)))
            weights.append(chance)
    return Toy(samples), weights


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
