"""The pieces of the expression of `estimator: credit`, each for one token or one sample, float64.

    PPO(rho, A) = -min(rho A, clip(rho, 1-lo, 1+hi) A); where A < 0 also at most -c A (dual clip)
    L = (1/N) sum_{i,t} k_it [ a_it PPO(rho_it, m_it A_i + delta_it) + b_it w_it c_it D(q_it, p_it) ] + L_seq

`Sheet` collects the terms and divides; rows fill it in loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .toy import Sample, Toy


@dataclass
class Clip:
    """PPO's clip below and above 1, and the dual clip's c (None: off)."""

    lo: float = 0.2
    hi: float = 0.2
    dual: float | None = 3.0


@dataclass
class Reduction:
    """How sums over tokens become the loss.

    normalisation: `token` sum / count, `sequence` mean over samples of (sum / count) of the sample, `constant`
    sum / (samples * length).
    denominator: the count. `all`: sum of k. `own`: each term by its own count.
    count_empty: under `sequence`, whether a sample without any counted token is in the mean over samples (with 0).
    count_silent: whether a position of a term's route whose signal is invalid (value 0) stays in the term's own count.
    drop_equal_groups: samples of all-equal groups lose their tokens (k = 0).
    """

    normalisation: str = "token"
    denominator: str = "all"
    length: float = 1.0
    count_empty: bool = False
    count_silent: bool = True
    drop_equal_groups: bool = False


@dataclass
class Result:
    """loss: a scalar that back-propagates, also where it is zero. per_token: each token's share of it, already divided;
    they sum to the loss, but for PBSD. parts: what the row computed on the way (A, m, delta, a, b, w, N, ...)."""

    loss: Tensor
    per_token: list[list[float]]
    parts: dict[str, Any]

    def gradients(self, toy: Toy) -> list[Tensor]:
        """d loss / d live of every sample, zeros where it does not depend on it."""
        lives = [sample.live for sample in toy.samples]
        found = torch.autograd.grad(self.loss, lives, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, lives, strict=True)]


# Log-probabilities of one sample


@dataclass
class View:
    """Log-probabilities [T, V] of a sample's four models at one temperature each, and shorthands at the sampled token."""

    sample: Sample
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    live: Tensor = field(init=False)
    old: Tensor = field(init=False)
    teacher: Tensor = field(init=False)
    reference: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.sample
        self.live = (s.live / self.student_temperature).log_softmax(-1)
        self.old = (s.old / self.student_temperature).log_softmax(-1).detach()
        self.teacher = (s.teacher / self.teacher_temperature).log_softmax(-1).detach()
        self.reference = s.reference.log_softmax(-1).detach()

    def logp(self, t: int) -> Tensor:
        """log p(y_t), live."""
        return self.live[t, self.sample.tokens[t]]

    def logp_old(self, t: int) -> float:
        return float(self.old[t, self.sample.tokens[t]])

    def logq(self, t: int) -> float:
        return float(self.teacher[t, self.sample.tokens[t]])

    def rho(self, t: int) -> Tensor:
        """p(y_t) / p_old(y_t), live."""
        return (self.logp(t) - self.logp_old(t)).exp()

    def d(self, t: int, at: str) -> float:
        """log q(y_t) - log p(y_t), p at `rollout` or `live`; says nothing about masks."""
        p = {"rollout": self.logp_old(t), "live": self.logp(t).item()}[at]
        return self.logq(t) - p

    def entropy(self, t: int, of: str = "q") -> float:
        """H of the full vocabulary in nats: of q under its context, or of p_old."""
        logs = {"q": self.teacher, "p": self.old}[of][t]
        return float(-(logs.exp() * logs).sum())


def usable(sample: Sample, t: int, needs_context: bool) -> bool:
    """Whether d and D of this token exist: the student wrote it, the signal is valid, the context is there."""
    return bool(sample.written[t] and sample.signal[t] and (sample.has_context or not needs_context))


def log_ratios(view: View, at: str, needs_context: bool) -> list[float]:
    """d of every token, 0 where it does not exist."""
    s = view.sample
    return [view.d(t, at) if usable(s, t, needs_context) else 0.0 for t in range(len(s.tokens))]


# Rewards


def correct(sample: Sample, success: float) -> bool:
    """r >= success; a sample whose judge failed is neither correct nor wrong: ask `judged` first."""
    return sample.judged and sample.reward >= success


def judged_rewards(toy: Toy, i: int) -> list[float]:
    return [toy.samples[j].reward for j in toy.group(i) if toy.samples[j].judged]


def all_equal(toy: Toy, i: int) -> bool:
    """On raw rewards, over the judged samples of the group; a group with one judged sample (or none) is equal."""
    return len(set(judged_rewards(toy, i))) <= 1


def advantages(toy: Toy, kind: str, eps: float = 1e-6, ddof: int = 1) -> list[float]:
    """A_i over all judged samples of the group, before routing and masks; 0 where the judge failed or all are equal.

    `mean`: r - mean. `std`: that / (std + eps). `leave_one_out`: r - mean of the others. `none`: 0.
    """
    found = []
    for i, sample in enumerate(toy.samples):
        rewards = judged_rewards(toy, i)
        if kind == "none" or not sample.judged or all_equal(toy, i):
            found.append(0.0)
            continue
        n = len(rewards)
        mean = sum(rewards) / n
        if kind == "mean":
            found.append(sample.reward - mean)
        elif kind == "std":
            std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - ddof))
            found.append((sample.reward - mean) / (std + eps))
        else:
            assert kind == "leave_one_out"
            found.append(sample.reward - (sum(rewards) - sample.reward) / (n - 1))
    return found


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


# Policy gradient


def ppo(rho: Tensor, a: float, clip: Clip) -> Tensor:
    value = -torch.minimum(rho * a, rho.clamp(1 - clip.lo, 1 + clip.hi) * a)
    if a < 0 and clip.dual is not None:
        value = torch.minimum(value, torch.tensor(-clip.dual * a, dtype=rho.dtype))
    return value


def surrogate(view: View, t: int, a: float, ratio: str, clip: Clip) -> Tensor:
    """-A's surrogate at one token. `ppo`: clipped ratio. `none`: -A log p(y), no ratio and no clip."""
    if ratio == "ppo":
        return ppo(view.rho(t), a, clip)
    assert ratio == "none"
    return -a * view.logp(t)


def k3(view: View, t: int) -> Tensor:
    """Schulman's k3 estimate of KL(p to reference) at the sampled token: e^x - x - 1, x = log ref(y) - log p(y)."""
    x = float(view.reference[t, view.sample.tokens[t]]) - view.logp(t)
    return x.exp() - x - 1


def capped_ratio(view: View, t: int, is_clip: float | None) -> float:
    """c_it = min(is_clip, sg rho); 1 without a cap."""
    return 1.0 if is_clip is None else min(is_clip, view.rho(t).item())


# Divergences


def top(logs_V: Tensor, k: int) -> list[int]:
    """Ids of the k largest, largest first, the lower id first among equals."""
    return sorted(range(len(logs_V)), key=lambda v: (-float(logs_V[v]), v))[:k]


def log_tail(logs_S: Tensor, floor: float) -> Tensor:
    """log(1 - sum exp(logs)), not below the floor (no gradient below it)."""
    inside = logs_S.logsumexp(0)
    rest = -math.expm1(inside.item())
    if rest <= 0 or math.log(rest) < floor:
        return torch.tensor(floor, dtype=logs_S.dtype)
    return torch.log(-torch.expm1(inside))


def categories(
    p_V: Tensor, q_V: Tensor, support: list[int] | None, outside: str, tail_floor: float = -30.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over the categories: the support's ids, with the rest as a `bucket`,
    renormalised away (`renormalize`), or dropped (`drop`). Support None: the whole vocabulary."""
    if support is None:
        return p_V, q_V
    p, q = p_V[support], q_V[support]
    if outside == "bucket":
        return torch.cat([p, log_tail(p, tail_floor)[None]]), torch.cat([q, log_tail(q, tail_floor)[None]])
    if outside == "renormalize":
        return p - p.logsumexp(0), q - q.logsumexp(0)
    assert outside == "drop"
    return p, q


def divergence(kind: str, p: Tensor, q: Tensor, beta: float = 0.5, term_clip: float | None = None) -> Tensor:
    """Sum over categories; p live, q the detached target, both as logs. term_clip: min(term, c) per category."""
    q = q.detach()
    if kind == "forward_kl":
        terms = q.exp() * (q - p)
    elif kind == "reverse_kl":
        terms = p.exp() * (p - q)
    elif kind == "cross_entropy":
        terms = -q.exp() * p
    else:
        assert kind == "jsd"
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        terms = beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)
    if term_clip is not None:
        assert kind in ("forward_kl", "reverse_kl")
        terms = terms.clamp(max=term_clip)
    return terms.sum()


def student_support(view: View, t: int, k: int | None, at: str) -> list[int] | None:
    """The student's top k ids of p_old (`rollout`) or of p (`live`); None for the whole vocabulary."""
    return None if k is None else top({"rollout": view.old, "live": view.live.detach()}[at][t], k)


# Returns


def returns(kind: str, rewards: list[float], counted: list[bool], gamma: float = 1.0) -> list[float]:
    """Per token: `token` r_t; `discounted` sum_{s>=t} gamma^(s-t) r_s; `mean_future` r_t + mean of later r_s.

    Sums and means run over the counted tokens; gamma's exponent is the distance in tokens of the completion.
    """
    found = []
    for t, r in enumerate(rewards):
        later = [s for s in range(t + 1, len(rewards)) if counted[s]]
        if kind == "token":
            found.append(r)
        elif kind == "discounted":
            found.append(r + sum(gamma ** (s - t) * rewards[s] for s in later))
        else:
            assert kind == "mean_future"
            found.append(r + (sum(rewards[s] for s in later) / len(later) if later else 0.0))
    return found


# The sum


class Sheet:
    """Terms of a batch by name, each with a value and a count per token; the loss masks are applied here."""

    def __init__(self, toy: Toy, reduction: Reduction) -> None:
        self.toy, self.reduction = toy, reduction
        self.values: dict[str, list[list[Tensor | float]]] = {}
        self.counts: dict[str, list[list[float]]] = {}
        self.tables: dict[str, list[list[float]]] = {}

    def k(self, i: int, t: int) -> int:
        dropped = self.reduction.drop_equal_groups and all_equal(self.toy, i)
        return 0 if dropped else self.toy.samples[i].k(t)

    def zeros(self) -> list[list[Any]]:
        return [[0.0] * len(sample.tokens) for sample in self.toy.samples]

    def put(self, name: str, i: int, t: int, value: Tensor | float, count: float) -> None:
        """A term's value at one token, before k; count: what it adds to the term's own N (before k)."""
        self.values.setdefault(name, self.zeros())[i][t] = value
        self.counts.setdefault(name, self.zeros())[i][t] = count

    def own(self, valid: bool) -> float:
        """What a position of a term's route adds to its own count."""
        return 1.0 if valid or self.reduction.count_silent else 0.0

    def note(self, name: str, i: int, t: int, value: float) -> None:
        """A number for `parts`."""
        self.tables.setdefault(name, self.zeros())[i][t] = value

    def weight(self, name: str, i: int, own: bool) -> float:
        """What a token's k * value of this term is multiplied by."""
        samples = range(len(self.toy.samples))

        def count(j: int) -> float:
            tokens = range(len(self.toy.samples[j].tokens))
            return sum(self.k(j, t) * (self.counts[name][j][t] if own else 1) for t in tokens)

        if self.reduction.normalisation == "constant":
            return 1 / (len(self.toy.samples) * self.reduction.length)
        if self.reduction.normalisation == "token":
            n = sum(count(j) for j in samples)
            return 1 / n if n else 0.0
        assert self.reduction.normalisation == "sequence"
        many = sum(1 for j in samples if self.reduction.count_empty or count(j))
        return 1 / (many * count(i)) if count(i) else 0.0

    def result(self, own: dict[str, bool] | None = None, **parts: Any) -> Result:
        """The loss. own: terms whose denominator is not the reduction's."""
        loss = sum((0.0 * sample.live.sum() for sample in self.toy.samples), torch.zeros((), dtype=torch.float64))
        per_token = self.zeros()
        counts = {}
        for name, values in self.values.items():
            by_own = (own or {}).get(name, self.reduction.denominator == "own")
            for i, sample in enumerate(self.toy.samples):
                weight = self.weight(name, i, by_own)
                for t in range(len(sample.tokens)):
                    if self.k(i, t) and weight:
                        share = weight * values[i][t]
                        loss = loss + share
                        per_token[i][t] += float(share.detach() if isinstance(share, Tensor) else share)
            counts[name] = sum(
                self.k(i, t) * (self.counts[name][i][t] if by_own else 1)
                for i, sample in enumerate(self.toy.samples)
                for t in range(len(sample.tokens))
            )
        return Result(loss, per_token, {**self.tables, "N": counts, **parts})
