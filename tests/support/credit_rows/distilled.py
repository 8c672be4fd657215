"""Rows of `estimator: credit` with a divergence as their main term, and those that route between it and rewards.

A position of a sample in the divergence's route whose signal is invalid has D = 0; whether it stays in the own count is
`Reduction.count_silent`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .terms import (
    Clip,
    Reduction,
    Result,
    Sheet,
    View,
    advantages,
    capped_ratio,
    categories,
    correct,
    divergence,
    ppo,
    student_support,
    usable,
)
from .toy import Toy

OWN = Reduction(denominator="own")


def position(
    view: View, t: int, kind: str, top_k: int | None, outside: str, support_at: str, term_clip: float | None = None
) -> Tensor:
    """D at one position: teacher against live student over the student's top k."""
    ids = student_support(view, t, top_k, support_at)
    p, q = categories(view.live[t], view.teacher[t], ids, outside)
    return divergence(kind, p, q, 0.5, term_clip)


def sdpo(
    toy: Toy,
    *,
    kind: str = "jsd",
    top_k: int | None = 100,
    outside: str = "bucket",
    is_clip: float | None = 2.0,
    support_at: str = "rollout",
    reduction: Reduction = OWN,
) -> Result:
    """b = 1 where a context exists, a = 0; JSD(1/2) over the student's top 100 + tail, times min(2, sg rho)."""
    sheet = Sheet(toy, reduction)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t in range(len(sample.tokens)):
            if sample.has_context:
                d = position(view, t, kind, top_k, outside, support_at) if usable(sample, t, True) else 0.0
                c = capped_ratio(view, t, is_clip)
                sheet.put("divergence", i, t, c * d, sheet.own(usable(sample, t, True)))
                sheet.note("c", i, t, c)
                sheet.note("b", i, t, 1.0)
                sheet.note("D", i, t, float(torch.as_tensor(d).detach()))
    return sheet.result()


def srpo(
    toy: Toy,
    *,
    beta: float = 1.0,
    kind: str = "jsd",
    top_k: int | None = 100,
    outside: str = "bucket",
    is_clip: float | None = 2.0,
    success: float = 0.5,
    feedback: bool = False,
    advantage: str = "mean",
    clip: Clip = Clip(0.2, 0.28),
    support_at: str = "rollout",
    routed_needs_signal: bool = False,  # the mean of w: over z = 1 and k = 1, or also a valid signal
    reduction: Reduction = Reduction(),
) -> Result:
    """z = (1 - correct) (c exists). z = 1: SDPO's divergence, times w = exp(-beta H_q) / its mean over routed tokens of
    the batch. z = 0: GRPO. A group without a correct sample has z = 0 (with `feedback` it may be routed), a sample
    whose judge failed too."""
    a_of_sample = advantages(toy, advantage)
    sheet = Sheet(toy, reduction)
    z = []
    for i, sample in enumerate(toy.samples):
        sibling = any(correct(toy.samples[j], success) for j in toy.group(i))
        wrong = sample.judged and not correct(sample, success)
        z.append(int(wrong and sample.has_context and (sibling or feedback)))
    routed = [
        math.exp(-beta * View(sample).entropy(t))
        for i, sample in enumerate(toy.samples)
        for t in range(len(sample.tokens))
        if z[i] and sheet.k(i, t) and (sample.signal[t] or not routed_needs_signal)
    ]
    mean = sum(routed) / len(routed) if routed else 1.0
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t in range(len(sample.tokens)):
            if z[i] == 0:
                sheet.put("rl", i, t, ppo(view.rho(t), a_of_sample[i], clip), count=1)
                sheet.note("a", i, t, 1.0)
                continue
            d = position(view, t, kind, top_k, outside, support_at) if usable(sample, t, True) else 0.0
            c = capped_ratio(view, t, is_clip)
            w = math.exp(-beta * view.entropy(t)) / mean
            sheet.put("divergence", i, t, w * c * d, sheet.own(usable(sample, t, True)))
            for name, value in (("b", 1.0), ("w", w), ("c", c), ("D", float(torch.as_tensor(d).detach()))):
                sheet.note(name, i, t, value)
    return sheet.result(A=a_of_sample, z=z)


def sdft(
    toy: Toy,
    *,
    top_k: int | None = 100,
    is_clip: float | None = 2.0,
    support_at: str = "rollout",
    reduction: Reduction = OWN,
) -> Result:
    """JSD(.5) over the student's top 100, renormalised, times min(2, sg rho)."""
    return sdpo(toy, top_k=top_k, outside="renormalize", is_clip=is_clip, support_at=support_at, reduction=reduction)


def opsd(
    toy: Toy, kind: str, student_temperature: float, teacher_temperature: float, term_clip: float | None, r: Reduction
) -> Result:
    sheet = Sheet(toy, r)
    for i, sample in enumerate(toy.samples):
        view = View(sample, student_temperature, teacher_temperature)
        for t in range(len(sample.tokens)):
            if sample.has_context:
                valid = usable(sample, t, True)
                d = divergence(kind, view.live[t], view.teacher[t], 0.5, term_clip) if valid else 0.0
                sheet.put("divergence", i, t, d, sheet.own(valid))
                sheet.note("b", i, t, 1.0)
    return sheet.result()


def opsd_script(toy: Toy, *, temperature: float = 1.1, reduction: Reduction = OWN) -> Result:
    """JSD(.5) over the full vocabulary, both at T 1.1, not scaled back."""
    return opsd(toy, "jsd", temperature, temperature, None, reduction)


def opsd_paper(
    toy: Toy, *, student_temperature: float = 1.1, term_clip: float = 0.05, reduction: Reduction = OWN
) -> Result:
    """Forward KL over the full vocabulary, each term min(., .05), teacher at T 1, student at T 1.1."""
    return opsd(toy, "forward_kl", student_temperature, 1.0, term_clip, reduction)


def trace_lambda(step: int, start: float = 0.5, hold: int = 10, fall: int = 30) -> float:
    """lambda at an optimizer step (from 0): .5 for 10 steps, then linear to 0 over 30."""
    return start * min(max(1 - (step - hold) / fall, 0.0), 1.0)


def trace(
    toy: Toy,
    *,
    lam: float,
    start: float = 0.5,
    weak: bool = True,  # weak base: reverse KL on error spans of wrong samples; strong: nothing
    term_clip: float | None = 0.05,
    coverage: float = 0.25,
    success: float = 0.5,
    top_k: int | None = None,
    outside: str = "bucket",
    support_at: str = "rollout",
    span_norm: str = "sequence",
    clip: Clip = Clip(0.2, 0.28),
    advantage: str = "std",
    reduction: Reduction = Reduction(),
) -> Result:
    """Correct: forward KL on key spans. Wrong: reverse KL on error spans, or nothing. GRPO with a = 1 - lam/start on
    the tokens that have a divergence, 1 elsewhere. Coverage (united spans of the sample's kind / length) above 25%,
    no context, no judge: plain GRPO.

    Length: the completion's written tokens. span_norm, the reading of "each = sum over the span / length":
    `sequence`: the term is lam * the mean over all samples of the batch of (sum_span D / length);
    `literal`: w = lam / length inside the expression's (1/N) sum; `all`: w = lam inside it, no length.
    """
    a_of_sample = advantages(toy, advantage)
    sheet = Sheet(toy, reduction)
    n = sum(sheet.k(i, t) for i, sample in enumerate(toy.samples) for t in range(len(sample.tokens)))
    fell_back = []
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        length = sum(sample.written)
        right = correct(sample, success)
        kind = "key" if right else "error"
        covered = {t for a, b, label in sample.spans for t in range(a, b) if label == kind and sample.written[t]}
        over = bool(covered) and len(covered) / length > coverage
        fell_back.append(over)
        active = sample.judged and sample.has_context and not over and (right or weak)
        for t in range(len(sample.tokens)):
            inside = active and t in covered
            a = 1 - lam / start if inside else 1.0
            sheet.put("rl", i, t, a * ppo(view.rho(t), a_of_sample[i], clip), count=a)
            sheet.note("a", i, t, a)
            if inside and lam > 0:
                name = "forward_kl" if right else "reverse_kl"
                valid = usable(sample, t, True)
                d = position(view, t, name, top_k, outside, support_at, term_clip) if valid else 0.0
                w = {"sequence": lam * n / (len(toy.samples) * length), "literal": lam / length, "all": lam}[span_norm]
                sheet.put("divergence", i, t, w * d, sheet.own(valid))
                sheet.note("b", i, t, 1.0)
                sheet.note("w", i, t, w)
    return sheet.result(A=a_of_sample, fell_back=fell_back)


def resd(
    toy: Toy,
    *,
    kind: str = "reverse_kl",
    floor: float = 0.2,
    success: float = 0.5,
    top_k: int | None = 100,
    support_at: str = "rollout",
    tail_floor: float = -30.0,
    needs_context: bool = False,
    reduction: Reduction = OWN,
) -> Result:
    """b = 1 on all samples; student's top 100 + tail, then q' = max(q, .2 sg p) on every category, not renormalised;
    w = (1-sr) if correct else sr, divided by its mean over samples.

    sr: success rate of the judged samples, clamped to [1/B, 1-1/B], B their number. A sample whose judge failed is in
    neither count and has b = 0. needs_context: whether b = 0 without a context ("all samples" says no).
    """
    judged = [sample for sample in toy.samples if sample.judged]
    b_many = len(judged)
    sr = sum(correct(sample, success) for sample in judged) / b_many if judged else 0.0
    sr = min(max(sr, 1 / b_many), 1 - 1 / b_many) if judged else 0.0
    raw = [0.0 if not s.judged else (1 - sr if correct(s, success) else sr) for s in toy.samples]
    mean = sum(raw) / b_many if judged else 1.0
    sheet = Sheet(toy, reduction)
    for i, sample in enumerate(toy.samples):
        view = View(sample)
        for t in range(len(sample.tokens)):
            if not sample.judged or (needs_context and not sample.has_context):
                continue
            d: Tensor | float = 0.0
            if usable(sample, t, needs_context):
                ids = student_support(view, t, top_k, support_at)
                p, q = categories(view.live[t], view.teacher[t], ids, "bucket", tail_floor)
                d = divergence(kind, p, torch.maximum(q, math.log(floor) + p.detach()))
            w = raw[i] / mean if mean else 0.0
            sheet.put("divergence", i, t, w * d, sheet.own(usable(sample, t, needs_context)))
            sheet.note("b", i, t, 1.0)
            sheet.note("w", i, t, w)
    return sheet.result(sr=sr)


def pbsd(toy: Toy, *, beta: float, needs_context: bool = True) -> Result:
    """Mean over pairs of -log sigmoid(beta [(log p - log q)(y+) - (log p - log q)(y-)]), sums over tokens with a loss mask and a
    valid signal (y+ has tokens that the student did not write: its `loss` is the loss mask, `written` says nothing); q detached,
    under the context. A pair one of whose completions has no such token, or no context, is not there. A token owns no share:
    per_token is 0."""

    def counted(i: int) -> list[int]:
        sample = toy.samples[i]
        known = sample.has_context or not needs_context
        return [t for t in range(len(sample.tokens)) if known and sample.loss[t] and sample.signal[t]]

    def log_ratio(i: int) -> Tensor:
        view, total = View(toy.samples[i]), torch.zeros((), dtype=torch.float64)
        for t in counted(i):
            total = total + view.logp(t) - view.logq(t)
        return total

    result = Sheet(toy, Reduction()).result()
    whole = [(i, j) for i, j in toy.pairs if counted(i) and counted(j)]
    values = [-torch.nn.functional.logsigmoid(beta * (log_ratio(i) - log_ratio(j))) for i, j in whole]
    for value in values:
        result.loss = result.loss + value / len(values)
    result.parts["pairs"] = [value.item() for value in values]
    return result


def distil(
    toy: Toy,
    *,
    kind: str = "cross_entropy",
    sequence_gradient: bool = True,
    gamma: float = 1.0,
    needs_context: bool = True,
    top_k: int | None = None,
    outside: str = "bucket",
    support_at: str = "rollout",
    reduction: Reduction = OWN,
) -> Result:
    """b = 1 with D = H(sg q, p), and sg(sum_{s>t} gamma^(s-t) D_s) log p(y_t) at each token; both have k at t, and D_s
    counts where k_s = 1. The second part has the divergence's denominator; its value, sg(sum) log p(y_t), has no meaning of
    its own."""
    sheet = Sheet(toy, reduction)
    for i, sample in enumerate(toy.samples):
        if needs_context and not sample.has_context:
            continue
        view = View(sample)
        tokens = range(len(sample.tokens))
        d = [
            position(view, t, kind, top_k, outside, support_at)
            if usable(sample, t, needs_context)
            else torch.tensor(0.0)
            for t in tokens
        ]
        for t in tokens:
            later = sum(gamma ** (s - t) * float(d[s].detach()) for s in tokens if s > t and sheet.k(i, s))
            sheet.put("divergence", i, t, d[t], sheet.own(usable(sample, t, needs_context)))
            sheet.note("D", i, t, float(d[t].detach()))
            sheet.note("later", i, t, later)
            sheet.note("b", i, t, 1.0)
            if sequence_gradient:
                sheet.put("sequence", i, t, later * view.logp(t), sheet.own(usable(sample, t, needs_context)))
    return sheet.result()


def veto(
    toy: Toy,
    *,
    beta: float,  # of this step: linear from 1.2 to its end
    kind: str = "reverse_kl",
    teacher_temperature: float = 0.2,
    student_temperature: float = 0.5,
    top_k: int | None = None,
    support_at: str = "rollout",
    reduction: Reduction = OWN,
) -> Result:
    """D(Q, p) with Q = q p^beta / Z, p detached, both at their temperatures. top_k: over the student's top k,
    renormalised (Q's ratios within the set are those of the whole vocabulary)."""
    sheet = Sheet(toy, reduction)
    for i, sample in enumerate(toy.samples):
        view = View(sample, student_temperature, teacher_temperature)
        for t in range(len(sample.tokens)):
            target = (view.teacher[t] + beta * view.live[t].detach()).log_softmax(-1)
            p, q = categories(view.live[t], target, student_support(view, t, top_k, support_at), "renormalize")
            d = divergence(kind, p, q) if usable(sample, t, False) else 0.0
            sheet.put("divergence", i, t, d, sheet.own(usable(sample, t, False)))
    return sheet.result()
