"""Rows of `estimator: credit` that are policy gradients: a=1 everywhere, A scaled by m, delta added after it.

Each function is one row of the table; its keywords are the row's fields with the table's defaults, and choices that the
table leaves open (said at the keyword). Without a context, m = 1 and delta = 0 in rows that have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

from .terms import (
    Clip,
    Reduction,
    Result,
    Sheet,
    View,
    advantages,
    categories,
    correct,
    divergence,
    k3,
    log_ratios,
    returns,
    sign,
    student_support,
    surrogate,
    usable,
)
from .toy import Toy

DAPO = Clip(0.2, 0.28)
Factor = Callable[[float, float], float]


def clipped(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def safe_exp(x: float) -> float:
    """exp, large and finite for very large x: it is clipped afterwards."""
    return math.exp(min(x, 700.0))


def policy_rows(
    toy: Toy,
    a_of_sample: list[float],
    m: list[list[float]],
    delta: list[list[float]],
    ratio: str,
    clip: Clip,
    reduction: Reduction,
) -> Sheet:
    """A sheet with the term `rl`: PPO(rho, m A + delta) at every token, and the tables m and delta."""
    sheet = Sheet(toy, reduction)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t in range(len(sample.tokens)):
            whole = m[i][t] * a_of_sample[i] + delta[i][t]
            sheet.put("rl", i, t, surrogate(view, t, whole, ratio, clip), count=1)
            sheet.note("m", i, t, m[i][t])
            sheet.note("delta", i, t, delta[i][t])
            sheet.note("a", i, t, 1.0)
    return sheet


def everywhere(toy: Toy, value: float) -> list[list[float]]:
    return [[value] * len(sample.tokens) for sample in toy.samples]


def grpo(
    toy: Toy,
    *,
    clip: Clip = DAPO,
    advantage: str = "std",
    eps: float = 1e-6,
    ddof: int = 1,
    kl_ref: float = 0.0,
    reduction: Reduction = Reduction(),
) -> Result:
    """a = m = 1, and kl_ref * k3 to the reference at every token."""
    a_of_sample = advantages(toy, advantage, eps, ddof)
    sheet = policy_rows(toy, a_of_sample, everywhere(toy, 1.0), everywhere(toy, 0.0), "ppo", clip, reduction)
    if kl_ref:
        for i, sample in enumerate(toy.samples):
            view = View(sample)
            for t in range(len(sample.tokens)):
                sheet.put("kl_ref", i, t, kl_ref * k3(view, t), count=1)
    return sheet.result(A=a_of_sample)


def rlrt(
    toy: Toy,
    *,
    mix: float = 0.5,
    eps: float = 1.0,  # table: 1 / .5 / .2
    success: float = 0.5,
    at: str = "rollout",
    clip: Clip = DAPO,
    advantage: str = "std",
    reduction: Reduction = Reduction(),
) -> Result:
    """Correct samples: m = (1-mix) + mix clip(exp(-sign(A) d), 1-eps, 1+eps); others and without a context m = 1."""
    a_of_sample = advantages(toy, advantage)
    m = everywhere(toy, 1.0)
    for i, sample in enumerate(toy.samples):
        d = log_ratios(View(sample), at, needs_context=True)
        for t in range(len(sample.tokens)):
            if usable(sample, t, True) and correct(sample, success) and a_of_sample[i] != 0:
                m[i][t] = (1 - mix) + mix * clipped(safe_exp(-sign(a_of_sample[i]) * d[t]), 1 - eps, 1 + eps)
    sheet = policy_rows(toy, a_of_sample, m, everywhere(toy, 0.0), "ppo", clip, reduction)
    return sheet.result(A=a_of_sample)


def modulated_by_sign(
    toy: Toy,
    d_of: Callable[[View], list[float]],
    mix: float,
    low: float,
    high: float,
    negative_only: bool,
    clip: Clip,
    advantage: str,
    reduction: Reduction,
) -> Result:
    """m = (1-mix) + mix clip(exp(sign(A) d), low, high); A = 0: m = 1."""
    a_of_sample = advantages(toy, advantage)
    m = everywhere(toy, 1.0)
    for i, sample in enumerate(toy.samples):
        d = d_of(View(sample))
        for t in range(len(sample.tokens)):
            a = a_of_sample[i]
            if usable(sample, t, True) and a != 0 and not (negative_only and a > 0):
                m[i][t] = (1 - mix) + mix * clipped(safe_exp(sign(a) * d[t]), low, high)
    sheet = policy_rows(toy, a_of_sample, m, everywhere(toy, 0.0), "ppo", clip, reduction)
    return sheet.result(A=a_of_sample)


def rlsd(
    toy: Toy,
    *,
    mix: float = 0.5,  # of this step, after warm-up and decay
    low: float = 0.8,
    high: float = 1.2,
    negative_only: bool = False,
    at: str = "rollout",
    clip: Clip = DAPO,
    advantage: str = "std",
    reduction: Reduction = Reduction(),
) -> Result:
    """m = (1-mix) + mix clip(exp(sign(A) d), .8, 1.2)."""

    def d_of(view: View) -> list[float]:
        return log_ratios(view, at, needs_context=True)

    return modulated_by_sign(toy, d_of, mix, low, high, negative_only, clip, advantage, reduction)


def visd(
    toy: Toy,
    *,
    mix: float = 0.5,  # 0 after 600 steps
    low: float = 0.8,
    high: float = 1.2,
    top_k: int = 16,
    negative_only: bool = False,
    at: str = "rollout",
    clip: Clip = DAPO,
    advantage: str = "std",
    reduction: Reduction = Reduction(),
) -> Result:
    """RLSD with d~ = [log q(y) - lse_S log q] - [log p(y) - lse_S log p], S = the teacher's top 16 and y."""

    def d_of(view: View) -> list[float]:
        found = []
        for t, y in enumerate(view.sample.tokens):
            ids = view.teacher[t].topk(min(top_k, view.teacher.shape[1])).indices.tolist()
            ids = ids if y in ids else [*ids, y]
            p = {"rollout": view.old, "live": view.live.detach()}[at][t]
            q = view.teacher[t]
            found.append(float((q[y] - q[ids].logsumexp(0)) - (p[y] - p[ids].logsumexp(0))))
        return found

    return modulated_by_sign(toy, d_of, mix, low, high, negative_only, clip, advantage, reduction)


@dataclass
class Gate:
    """AntiSD's memory: optimizer steps seen, H_q of the warm-up's tokens, their median once it is over, and g."""

    step: int = 0
    entropies: list[float] = field(default_factory=list)
    warm: float | None = None
    g: int = 0

    def after(self, entropies: list[float], warm_steps: int, close_below: float) -> Gate:
        """The gate as it applies to the step whose tokens have these entropies. A warm-up that saw no token goes on."""
        if self.step < warm_steps or (self.warm is None and not self.entropies):
            return Gate(self.step + 1, self.entropies + entropies, None, 0)
        warm = median(self.entropies) if self.warm is None and self.entropies else self.warm
        g = self.g
        if entropies and warm is not None:
            now = median(entropies)  # of an even number: the mean of the middle two
            if now < close_below * warm:
                g = 0
            elif now >= warm:
                g = 1
        return Gate(self.step + 1, self.entropies, warm, g)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def antisd(
    toy: Toy,
    *,
    gate: Gate,
    coef: float = 0.5,
    warm_steps: int = 5,
    close_below: float = 0.93,
    at: str = "rollout",
    clip: Clip = Clip(),
    advantage: str = "std",
    reduction: Reduction = Reduction(),
) -> Result:
    """delta = -.5 g phi, phi = 1/2 (softplus(d) - log 2). parts["gate"]: the state after this step, whose g was used.

    The medians run over written * signal tokens of samples with a context (H_q is defined under it), whatever their
    loss mask; the first 5 steps' tokens are pooled.
    """
    a_of_sample = advantages(toy, advantage)
    views = [View(sample) for sample in toy.samples]
    entropies = [v.entropy(t) for v in views for t in range(len(v.sample.tokens)) if usable(v.sample, t, True)]
    gate = gate.after(entropies, warm_steps, close_below)
    delta = everywhere(toy, 0.0)
    for i, view in enumerate(views):
        d = log_ratios(view, at, needs_context=True)
        for t in range(len(view.sample.tokens)):
            if usable(view.sample, t, True):
                delta[i][t] = -coef * gate.g * 0.5 * (softplus(d[t]) - math.log(2))
    sheet = policy_rows(toy, a_of_sample, everywhere(toy, 1.0), delta, "ppo", clip, reduction)
    return sheet.result(A=a_of_sample, gate=gate)


def quantile(values: list[float], share: float) -> float:
    """With linear interpolation between the neighbours in order."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def dasd(
    toy: Toy,
    *,
    entropy_of: str,  # unknown: "q" (under the context) or "p" (p_old)
    normalise: Callable[[list[float]], list[float]],  # unknown: d of a completion's tokens -> x
    beta: float,  # unknown
    share: float = 0.2,
    s_floor: float = 1e-6,
    at: str = "rollout",
    advantage: str = "std",  # the row does not say whether rewards are there; "none" for delta alone
    clip: Clip = Clip(),
    reduction: Reduction = Reduction(),
) -> Result:
    """delta = beta tanh((tau - H)/s) sigmoid(|x| - 1) x; tau the .2 quantile of H, s its mean absolute deviation from
    its mean, both over the completion's own written * signal tokens."""
    a_of_sample = advantages(toy, advantage)
    delta = everywhere(toy, 0.0)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        tokens = [t for t in range(len(sample.tokens)) if usable(sample, t, True)]
        if not tokens:
            continue
        h = [view.entropy(t, entropy_of) for t in tokens]
        tau = quantile(h, share)
        mean = sum(h) / len(h)
        s = max(sum(abs(x - mean) for x in h) / len(h), s_floor)
        x = normalise([view.d(t, at) for t in tokens])
        for n, t in enumerate(tokens):
            gain = 1 / (1 + math.exp(-(abs(x[n]) - 1)))
            delta[i][t] = beta * math.tanh((tau - h[n]) / s) * gain * x[n]
    sheet = policy_rows(toy, a_of_sample, everywhere(toy, 1.0), delta, "ppo", clip, reduction)
    return sheet.result(A=a_of_sample)


def sod(
    toy: Toy,
    *,
    coef: float = 1.0,
    e: float = 1e-6,
    above: float = 0.2,
    at: str = "rollout",
    clip: Clip = Clip(),
    advantage: str = "std",
    reduction: Reduction = Reduction(),
) -> Result:
    """delta = coef w_k d; w_1 = 1, w_k = min((d_1+e)/(d_k+e), 1+.2), d_k = mean |d| of segment k's written * signal
    tokens; a segment without any is skipped. External teacher: no context is asked for."""
    a_of_sample = advantages(toy, advantage)
    delta, w = everywhere(toy, 0.0), everywhere(toy, 0.0)
    for i, sample in enumerate(toy.samples):
        d = log_ratios(View(sample), at, needs_context=False)
        first = None
        start = 0
        for end in sample.segment_ends:
            tokens = [t for t in range(start, end) if usable(sample, t, False)]
            start = end
            if not tokens:
                continue
            mean = sum(abs(d[t]) for t in tokens) / len(tokens)
            weight = 1.0 if first is None else min((first + e) / (mean + e), 1 + above)
            first = mean if first is None else first
            for t in tokens:
                w[i][t] = weight
                delta[i][t] = coef * weight * d[t]
    sheet = policy_rows(toy, a_of_sample, everywhere(toy, 1.0), delta, "ppo", clip, reduction)
    return sheet.result(A=a_of_sample, w=w)


def ptd_po(
    toy: Toy,
    *,
    threshold: float = 1.0,  # table: 1 or .2
    coef: float = 0.5,  # table: .5 / .05
    kl_ref: float = 1e-2,
    success: float = 0.5,
    top_k: int | None = 100,
    outside: str = "bucket",
    support_at: str = "rollout",
    clip: Clip = Clip(),
    advantage: str = "std",
    reduction: Reduction = Reduction(denominator="own"),
) -> Result:
    """a = m = 1; + coef * JSD(1/2) on failed samples of groups with accuracy < threshold; other groups: + kl_ref * k3.

    Accuracy over the judged samples; a group without any is an "other" one. Own counts: the JSD's tokens (of samples
    with a context), and the tokens of the other groups for k3.
    """
    a_of_sample = advantages(toy, advantage)
    sheet = policy_rows(toy, a_of_sample, everywhere(toy, 1.0), everywhere(toy, 0.0), "ppo", clip, reduction)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        judged = [toy.samples[j] for j in toy.group(i) if toy.samples[j].judged]
        hard = bool(judged) and sum(correct(s, success) for s in judged) / len(judged) < threshold
        failed = sample.judged and not correct(sample, success)
        for t in range(len(sample.tokens)):
            if not hard:
                sheet.put("kl_ref", i, t, kl_ref * k3(view, t), count=1)
            elif failed and sample.has_context:
                ids = student_support(view, t, top_k, support_at)
                p, q = categories(view.live[t], view.teacher[t], ids, outside)
                d = divergence("jsd", p, q, 0.5) if usable(sample, t, True) else 0.0
                sheet.put("divergence", i, t, coef * d, sheet.own(usable(sample, t, True)))
                sheet.note("b", i, t, 1.0)
    return sheet.result(A=a_of_sample)


def iw_opd(
    toy: Toy,
    *,
    gain: float = 0.5,
    floor: float = 1e-8,
    at: str = "rollout",
    ratio: str = "none",
    clip: Clip = Clip(),
    reduction: Reduction = Reduction(),
) -> Result:
    """delta = w_t d_t, w_t = 1 + .5 (1 - sum_{j<t} |d_j| / max(sum_j |d_j|, 1e-8)); d = 0 outside written * signal."""
    delta, w = everywhere(toy, 0.0), everywhere(toy, 0.0)
    for i, sample in enumerate(toy.samples):
        d = log_ratios(View(sample), at, needs_context=False)
        total = max(sum(abs(x) for x in d), floor)
        before = 0.0
        for t, x in enumerate(d):
            w[i][t] = 1 + gain * (1 - before / total)
            delta[i][t] = w[i][t] * x
            before += abs(x)
    sheet = policy_rows(toy, [0.0] * len(toy.samples), everywhere(toy, 1.0), delta, ratio, clip, reduction)
    return sheet.result(w=w)


def vopd(
    toy: Toy,
    *,
    top_k: int | None = None,  # None: KL over the full vocabulary; 100: the student's top 100, renormalised
    support_at: str = "rollout",
    at: str = "live",
    ratio: str = "none",
    baseline: bool = True,
    clip: Clip = Clip(),
    reduction: Reduction = Reduction(),
) -> Result:
    """delta = d + sg KL(p to q) of the position. baseline False: plain sampled OPD."""
    delta = everywhere(toy, 0.0)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t in range(len(sample.tokens)):
            if usable(sample, t, False):
                student = {"rollout": view.old, "live": view.live.detach()}[at][t]
                ids = student_support(view, t, top_k, support_at)
                p, q = categories(student, view.teacher[t], ids, "renormalize")
                kl = divergence("reverse_kl", p, q).item() if baseline else 0.0
                delta[i][t] = view.d(t, at) + kl
    sheet = policy_rows(toy, [0.0] * len(toy.samples), everywhere(toy, 1.0), delta, ratio, clip, reduction)
    return sheet.result()


def power_opd(
    toy: Toy,
    *,
    power: float = 5.0,
    at: str = "live",
    ratio: str = "none",
    mask_stop: bool = True,
    clip: Clip = Clip(),
    reduction: Reduction = Reduction(),
) -> Result:
    """delta = sg[q(y)^a - p(y)^a]; the terminal stop token leaves the loss mask, so it is not in N either."""
    kept = []
    for sample in toy.samples:
        loss = list(sample.loss)
        if mask_stop and sample.stops:
            loss[-1] = 0
        kept.append(replace(sample, loss=loss))
    toy = Toy(kept, toy.pairs)
    delta = everywhere(toy, 0.0)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t in range(len(sample.tokens)):
            if usable(sample, t, False):
                p = {"rollout": view.logp_old(t), "live": view.logp(t).item()}[at]
                delta[i][t] = math.exp(power * view.logq(t)) - math.exp(power * p)
    sheet = policy_rows(toy, [0.0] * len(toy.samples), everywhere(toy, 1.0), delta, ratio, clip, reduction)
    return sheet.result()


def sdar(
    toy: Toy,
    *,
    coef: float = 0.1,
    slope: float = 5.0,
    clip: Clip = Clip(),
    advantage: str = "std",
    reduction: Reduction = Reduction(denominator="own"),
) -> Result:
    """a = m = 1, plus coef * mean of sg[sigmoid(5 d)] (log q(y) - log p(y)), p live, d live.

    Own count: tokens with k and a context.
    """
    a_of_sample = advantages(toy, advantage)
    sheet = policy_rows(toy, a_of_sample, everywhere(toy, 1.0), everywhere(toy, 0.0), "ppo", clip, reduction)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t in range(len(sample.tokens)):
            if sample.has_context:
                sheet.put("likelihood", i, t, 0.0, sheet.own(usable(sample, t, True)))
            if usable(sample, t, True):
                gate = 1 / (1 + safe_exp(-slope * view.d(t, "live")))
                sheet.put("likelihood", i, t, coef * gate * (view.logq(t) - view.logp(t)), count=1)
                sheet.note("gate", i, t, gate)
    return sheet.result(A=a_of_sample)


def sdpg(
    toy: Toy,
    *,
    beta: float = 1e-3,
    alpha: float = 1e-3,
    clip: Clip = Clip(),
    advantage: str = "std",
    reduction: Reduction = Reduction(denominator="own"),
) -> Result:
    """a = m = 1, + beta KL(p to q) over the full vocabulary where a context exists, + alpha 1/2 (log p/p_ref)^2 of the
    sampled token at every token."""
    a_of_sample = advantages(toy, advantage)
    sheet = policy_rows(toy, a_of_sample, everywhere(toy, 1.0), everywhere(toy, 0.0), "ppo", clip, reduction)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t, y in enumerate(sample.tokens):
            if sample.has_context:
                d = divergence("reverse_kl", view.live[t], view.teacher[t]) if usable(sample, t, True) else 0.0
                sheet.put("divergence", i, t, beta * d, sheet.own(usable(sample, t, True)))
            away = view.logp(t) - float(view.reference[t, y])
            sheet.put("reference", i, t, alpha * 0.5 * away**2, count=1)
    return sheet.result(A=a_of_sample)


def opd(
    toy: Toy,
    *,
    reward: Callable[[float], float] = lambda d: d,  # r_t of the log-ratio d; 0 where there is no signal
    kind: str = "token",
    gamma: float = 1.0,
    z: bool = False,
    eps: float = 1e-6,
    ddof: int = 1,
    at: str = "rollout",
    ratio: str = "none",
    clip: Clip = Clip(),
    reduction: Reduction = Reduction(),
) -> Result:
    """Sampled-token OPD with a return: delta = R_t, A = 0. Later tokens count where the student wrote them (a token
    without a signal has r = 0). z: over all written * signal tokens of the group, (R - mean) / (std + eps); a single
    token has z = 0. A token that is not written has no return."""
    delta = everywhere(toy, 0.0)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        tokens = range(len(sample.tokens))
        r = [reward(view.d(t, at)) if usable(sample, t, False) else 0.0 for t in tokens]
        found = returns(kind, r, [bool(w) for w in sample.written], gamma)
        delta[i] = [found[t] if sample.written[t] else 0.0 for t in tokens]
    raw = [list(row) for row in delta]
    for i, sample in enumerate(toy.samples) if z else ():
        values = [
            raw[j][t]
            for j in toy.group(i)
            for t in range(len(toy.samples[j].tokens))
            if usable(toy.samples[j], t, False)
        ]
        for t in range(len(sample.tokens)):
            if len(values) < 2 or not sample.written[t]:
                delta[i][t] = 0.0
                continue
            mean = sum(values) / len(values)
            std = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - ddof))
            delta[i][t] = (raw[i][t] - mean) / (std + eps)
    sheet = policy_rows(toy, [0.0] * len(toy.samples), everywhere(toy, 1.0), delta, ratio, clip, reduction)
    return sheet.result(R=raw)


def proximal(a: float) -> Callable[[float], float]:
    """TOP-D's reward of d: log(a u + 1 - a)."""
    return lambda d: math.log(a * safe_exp(d) + 1 - a)


def top_d(toy: Toy, *, a: float, ratio: str = "ppo", clip: Clip = Clip(), reduction: Reduction = Reduction()) -> Result:
    """R_k = r_k + mean(r_{k+1..}), z over the group; r = log(a u + 1 - a) of section "Baselines"."""
    return opd(toy, reward=proximal(a), kind="mean_future", z=True, ratio=ratio, clip=clip, reduction=reduction)
