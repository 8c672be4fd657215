"""The identities behind rewards and token credit, by exact enumeration of all completions of small token trees.

Sum over tokens / number of samples (`normalisation: constant`, length 1), temperature 1, no truncation, the stop token
included, k = 1, float64 to 1e-10. Where a quantity is biased, its factor is asserted.

Each test asks an engine: `engine(row, toy, **fields)` returns an `Answer` (loss, each token's share of it, and its
gradient with respect to every sample's live logits). `plain` asks the rows of `tests/support/credit_rows`. To put an
implementation under the same tests, write such a function that builds its batch from a `Toy` (described in
`credit_rows/toy.py`; `sample.live` may be computed from a tree's parameters, detach it) and add it to `ENGINES`. It has
to know these rows and fields only, the rest has the table's defaults:

    grpo       advantage, clip                      antisd     gate
    rlsd       advantage, clip                      power-opd  mask_stop
    sod        advantage, clip                      veto       beta, kind, student_ and teacher_temperature
    vopd       baseline, ratio, at, clip            resd       kind, top_k
    opd        reward, kind, gamma                  sdpo, sdft kind, top_k, is_clip
    distil     kind, gamma, sequence_gradient       ptd-po     top_k, kl_ref, advantage

and `reduction`: CONSTANT, or SEQUENCE in identity 6. Values are compared in identities 1 and 15; everything else
compares gradients, so that a surrogate may differ by a constant.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from credit_engine import product
from credit_rows import ROWS, Clip, Gate, Reduction, Sample, Toy, toys
from token_trees import Prefix, Tree, cosine, flat, groups
from torch import Tensor

CONSTANT = Reduction(normalisation="constant")
SEQUENCE = Reduction(normalisation="sequence")
OPEN = Clip(lo=1.0, hi=1e9, dual=None)
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


class Answer(NamedTuple):
    loss: float
    per_token: list[list[float]]
    gradients: list[Tensor]


Engine = Callable[..., Answer]


def plain(row: str, toy: Toy, **fields: Any) -> Answer:
    result = ROWS[row](toy, **fields)
    return Answer(result.loss.item(), result.per_token, result.gradients(toy))


def ours(row: str, toy: Toy, **fields: Any) -> Answer:
    return Answer(*product(row, toy, **fields))


ENGINES: list[Engine] = [plain, ours]


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.__name__)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


def reward(y: Prefix) -> float:
    """Different for most completions, and not a function of the length."""
    return math.sin(1.0 + sum((t + 2) * token for t, token in enumerate(y)))


def success(y: Prefix) -> float:
    return float(reward(y) > 0)


def expected_over_groups(
    engine: Engine, tree: Tree, r: Callable[[Prefix], float], size: int, advantage: str, reduction: Reduction = CONSTANT
) -> Tensor:
    """E of the loss's gradient over all groups: the batch holds every group, so its mean is undone and weighted."""
    toy, weights = groups(tree, r, size)
    answer = engine("grpo", toy, advantage=advantage, clip=OPEN, reduction=reduction)
    many = len(toy.samples) // size
    return flat(tree.chained(toy.samples, answer.gradients, [w * many for w in weights]))


def expected_over_completions(engine: Engine, tree: Tree, row: str, **fields: Any) -> Tensor:
    """E over completions of the loss's gradient."""
    completions = tree.completions()
    toy = Toy([tree.sample(y) for y in completions])
    answer = engine(row, toy, reduction=CONSTANT, **fields)
    weights = [tree.chance(y) * len(completions) for y in completions]
    return flat(tree.chained(toy.samples, answer.gradients, weights))


def log_ratio(sample: Sample, t: int) -> float:
    y = sample.tokens[t]
    return float(sample.teacher[t].log_softmax(0)[y] - sample.live[t].detach().log_softmax(0)[y])


def score(sample: Sample, t: int) -> Tensor:
    """d log p(y_t) / d logits [V]."""
    p = sample.live[t].detach().softmax(0)
    return torch.nn.functional.one_hot(torch.tensor(sample.tokens[t]), len(p)).double() - p


# 1, 2: the surrogate


def on_policy(seed: int) -> Toy:
    """A varied batch whose student has not moved since the rollout; one segment per sample."""
    toy = toys(seed)
    for sample in toy.samples:
        sample.live = sample.old.clone().requires_grad_()
        sample.segment_ends = [len(sample.tokens)]
    return toy


def centred(toy: Toy, i: int) -> float:
    """r - the mean of the group's judged samples; 0 where the judge failed."""
    mine = toy.samples[i]
    judged = [s.reward for s in toy.samples if s.prompt == mine.prompt and not math.isnan(s.reward)]
    return 0.0 if math.isnan(mine.reward) else mine.reward - statistics.mean(judged)


def grpo_whole(a: float, sample: Sample, t: int) -> float:
    return a


def rlsd_whole(a: float, sample: Sample, t: int) -> float:
    if not (a and sample.has_context and sample.signal[t]):
        return a
    u = math.exp(log_ratio(sample, t))
    return a * (0.5 + 0.5 * min(max(u if a > 0 else 1 / u, 0.8), 1.2))


def sod_whole(a: float, sample: Sample, t: int) -> float:
    return a + (log_ratio(sample, t) if sample.signal[t] else 0.0)


@pytest.mark.parametrize(("row", "whole"), [("grpo", grpo_whole), ("rlsd", rlsd_whole), ("sod", sod_whole)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_1_on_policy_the_gradient_is_the_score_times_the_advantage(
    engine: Engine, row: str, whole: Callable[[float, Sample, int], float], seed: int
) -> None:
    """m A + delta, as written out here per row; the loss's value is minus their mean, not 0."""
    toy = on_policy(seed)
    answer = engine(row, toy, advantage="mean", clip=Clip(), reduction=CONSTANT)
    n, value = len(toy.samples), 0.0
    for i, sample in enumerate(toy.samples):
        for t in range(len(sample.tokens)):
            a = sample.k(t) * whole(centred(toy, i), sample, t)
            value -= a / n
            torch.testing.assert_close(answer.gradients[i][t], -a / n * score(sample, t), **EXACT)
            assert answer.per_token[i][t] == pytest.approx(-a / n, abs=1e-12)
    assert abs(value) > 1e-3
    assert answer.loss == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("rho", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1])
def test_2_where_the_clip_stops_the_gradient(engine: Engine, rho: float, dual: float | None) -> None:
    """One token each, p_old(y) = .25, p(y) = .25 rho: A = 1/2 and A = -1/2."""

    def logits(p: float) -> Tensor:
        return torch.tensor([[p, (1 - p) / 2, (1 - p) / 2]], dtype=torch.float64).log()

    def one(r: float) -> Sample:
        live = logits(0.25 * rho).requires_grad_()
        return Sample(0, [0], live, logits(0.25), logits(0.25), logits(0.25), [1], [1], [1], r)

    toy = Toy([one(1.0), one(0.0)])
    good, bad = engine("grpo", toy, advantage="mean", clip=Clip(0.2, 0.28, dual), reduction=CONSTANT).gradients
    assert (good.abs().max() == 0) == (rho > 1.28)
    assert (bad.abs().max() == 0) == (rho < 0.8 or (dual is not None and rho > dual))
    for found, sample, a in ((good, toy.samples[0], 0.5), (bad, toy.samples[1], -0.5)):
        if found.abs().max() > 0:
            torch.testing.assert_close(found[0], -0.5 * rho * a * score(sample, 0), **EXACT)


# 3 to 6: groups


@pytest.mark.parametrize("size", [2, 3])
def test_3_4_leave_one_out_is_unbiased_and_the_own_sample_in_the_mean_costs_a_factor(engine: Engine, size: int) -> None:
    tree = Tree.random(0, v=2, depth=3)
    true = flat(tree.gradient(tree.expected(reward)))
    assert true.abs().max() > 1e-2
    torch.testing.assert_close(-expected_over_groups(engine, tree, reward, size, "leave_one_out"), true, **EXACT)
    biased = -expected_over_groups(engine, tree, reward, size, "mean")
    torch.testing.assert_close(biased, (size - 1) / size * true, **EXACT)


def factor_of_std(s: float, size: int, eps: float = 1e-6) -> float:
    """What dividing by the std (ddof 1, eps) multiplies grad s by: E over k ~ Bin(G, s) right ones of
    (k/G)(1-k/G) / (std + eps), over s(1-s). With ddof 0 and eps 0 it is E[sqrt(k(G-k))/G] / (s(1-s))."""
    total = 0.0
    for k in range(1, size):
        std = math.sqrt(k * (size - k) / (size * (size - 1)))
        chance = math.comb(size, k) * s**k * (1 - s) ** (size - k)
        total += chance * k * (size - k) / size**2 / (std + eps)
    return total / (s * (1 - s))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_5_the_std_scales_a_binary_reward_by_its_success_rate(engine: Engine, size: int) -> None:
    """One direction within a prompt. From groups of 4 on, prompts of different success get different factors, so that
    the sum over prompts has another direction; in groups of 2 and 3 every mixed group has the same std."""
    found, true, factors = [], [], []
    for seed, right in ((1, success), (3, lambda y: 1 - success(y))):
        tree = Tree.random(seed, v=2, depth=2)
        rate = tree.expected(right)
        factors.append(factor_of_std(rate.item(), size))
        true.append(flat(tree.gradient(rate)))
        found.append(-expected_over_groups(engine, tree, right, size, "std"))
        torch.testing.assert_close(found[-1], factors[-1] * true[-1], **EXACT)
    assert (abs(factors[0] / factors[1] - 1) > 0.01) == (size > 3)
    whole, scaled = true[0] + true[1], found[0] + found[1]  # one set of parameters behind both prompts
    assert (cosine(scaled, whole) < 1 - 1e-5) == (size > 3)


def test_5_the_std_changes_the_direction_for_other_rewards(engine: Engine) -> None:
    tree = Tree.random(0, v=2, depth=3)
    true = flat(tree.gradient(tree.expected(reward)))
    assert cosine(-expected_over_groups(engine, tree, reward, 3, "std"), true) < 1 - 1e-3


def test_6_a_mean_per_sequence_is_biased_by_length(engine: Engine) -> None:
    """It is E[(r - E r)/T grad log P] of completions of T tokens: not the direction of grad E r."""
    tree = Tree.random(1, v=3, depth=2)
    mean = tree.expected(reward).item()

    def shortened(y: Prefix) -> Tensor:
        return (reward(y) - mean) / len(y) * tree.log_prob(tree.student, y) * tree.chance(y)

    biased = flat(tree.gradient(torch.stack([shortened(y) for y in tree.completions()]).sum()))
    found = -expected_over_groups(engine, tree, reward, 2, "leave_one_out", SEQUENCE)
    torch.testing.assert_close(found, biased, **EXACT)
    assert cosine(found, flat(tree.gradient(tree.expected(reward)))) < 1 - 1e-2


# 7, 8: sequences


def position_divergence(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """Of student logits p, live, and teacher logits q; written apart from the rows."""
    p, q = p.softmax(0), q.softmax(0)
    m = (p + q) / 2
    return {
        "reverse_kl": (p * (p / q).log()).sum(),
        "forward_kl": (q * (q / p).log()).sum(),
        "jsd": 0.5 * (q * (q / m).log()).sum() + 0.5 * (p * (p / m).log()).sum(),
        "cross_entropy": -(q * p.log()).sum(),
    }[kind]


def summed(tree: Tree, kind: str, y: Prefix) -> Tensor:
    """sum_t D_t of a completion."""
    return torch.stack(
        [position_divergence(kind, tree.student[y[:t]], tree.teacher[y[:t]]) for t in range(len(y))]
    ).sum()


def frozen_states(tree: Tree, kind: str) -> Tensor:
    """Gradient of E sum_t D_t with the distribution of states held constant."""
    total = torch.stack([tree.chance(y) * summed(tree, kind, y) for y in tree.completions()]).sum()
    return flat(tree.gradient(total))


@pytest.mark.parametrize(("v", "depth"), [(2, 3), (3, 3)])
def test_7_discount_1_is_the_sequence_kl_and_discount_0_the_states_kl(engine: Engine, v: int, depth: int) -> None:
    tree = Tree.random(3, v, depth)

    def sequence_log_ratio(y: Prefix) -> Tensor:
        return tree.log_prob(tree.student, y) - tree.log_prob(tree.teacher, y)

    whole = flat(tree.gradient(tree.expected(sequence_log_ratio)))
    states = frozen_states(tree, "reverse_kl")
    torch.testing.assert_close(expected_over_completions(engine, tree, "opd", kind="discounted"), whole, **EXACT)
    torch.testing.assert_close(expected_over_completions(engine, tree, "opd", kind="token"), states, **EXACT)
    assert cosine(whole, states) < 1 - 1e-3
    future = expected_over_completions(engine, tree, "opd", kind="mean_future")
    for other in (whole, states):
        assert (future - other).norm() > 1e-2 * other.norm()


def test_7_with_one_later_token_gamma_is_the_share_of_the_missing_part(engine: Engine) -> None:
    tree = Tree.random(4, v=3, depth=2)
    none, half, whole = (
        expected_over_completions(engine, tree, "opd", kind="discounted", gamma=gamma) for gamma in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, none + 0.5 * (whole - none), **EXACT)
    assert (whole - none).norm() > 1e-2


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "cross_entropy"])
def test_8_the_sequence_gradient_makes_a_direct_divergence_unbiased(engine: Engine, kind: str) -> None:
    tree = Tree.random(5, v=3, depth=3)
    true = flat(tree.gradient(tree.expected(lambda y: summed(tree, kind, y))))
    found = expected_over_completions(engine, tree, "distil", kind=kind)
    torch.testing.assert_close(found, true, **EXACT)
    local = expected_over_completions(engine, tree, "distil", kind=kind, sequence_gradient=False)
    torch.testing.assert_close(local, frozen_states(tree, kind), **EXACT)
    assert (local - true).norm() > 1e-2


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "cross_entropy"])
def test_8_only_later_positions_count_in_each_sample(engine: Engine, kind: str) -> None:
    """s > t and s >= t have the same expectation, so the terms of one completion tell them apart."""
    tree = Tree.random(5, v=3, depth=3)
    sample = tree.sample((1, 2, 0))
    (found,) = engine("distil", Toy([sample]), kind=kind, reduction=CONSTANT).gradients
    values = []
    for t in range(3):
        logits = sample.live[t].detach().requires_grad_()
        d = position_divergence(kind, logits, sample.teacher[t])
        values.append((d.item(), torch.autograd.grad(d, logits)[0]))
    for t in range(3):
        later = sum(value for value, _ in values[t + 1 :])
        torch.testing.assert_close(found[t], values[t][1] + later * score(sample, t), **EXACT)


def test_8_a_discount_is_biased_by_its_factor(engine: Engine) -> None:
    """With one later token at most, gamma of the missing part."""
    tree = Tree.random(6, v=3, depth=2)
    local = frozen_states(tree, "jsd")
    true = flat(tree.gradient(tree.expected(lambda y: summed(tree, "jsd", y))))
    found = expected_over_completions(engine, tree, "distil", kind="jsd", gamma=0.5)
    torch.testing.assert_close(found, local + 0.5 * (true - local), **EXACT)
    assert (found - true).norm() > 1e-3


# 9 to 11: baselines and rewards of a token


def moved(tree: Tree, seed: int) -> Tree:
    """A student away from the one that wrote the samples."""
    noise = torch.Generator().manual_seed(seed)
    student = {
        at: (x.detach() + 0.5 * torch.randn(tree.v, generator=noise, dtype=torch.float64)).requires_grad_()
        for at, x in tree.student.items()
    }
    return Tree(tree.v, tree.depth, student, tree.teacher)


def off_policy_gradient(engine: Engine, old: Tree, new: Tree, **fields: Any) -> Tensor:
    """E over completions of the old student of the gradient at the new one."""
    completions = old.completions()
    samples = [new.sample(y) for y in completions]
    for sample, y in zip(samples, completions, strict=True):
        sample.old = old.sample(y).live.detach()
    answer = engine("vopd", Toy(samples), reduction=CONSTANT, **fields)
    return flat(new.chained(samples, answer.gradients, [old.chance(y) * len(completions) for y in completions]))


def test_9_a_baseline_of_the_prefix_leaves_the_expected_gradient(engine: Engine) -> None:
    tree = Tree.random(7, v=3, depth=2)
    plain_opd = expected_over_completions(engine, tree, "vopd", baseline=False)
    torch.testing.assert_close(plain_opd, frozen_states(tree, "reverse_kl"), **EXACT)
    torch.testing.assert_close(expected_over_completions(engine, tree, "vopd", baseline=True), plain_opd, **EXACT)


def test_9_under_an_active_clip_it_does_not(engine: Engine) -> None:
    """Off-policy, one position: with the ratio alone the baseline still cancels, with the clip it leaves a difference."""
    old = Tree.random(8, v=4, depth=1)
    new = moved(old, 9)
    for clip, same in ((OPEN, True), (Clip(0.05, 0.05, None), False)):
        without, with_it = (
            off_policy_gradient(engine, old, new, baseline=baseline, ratio="ppo", at="rollout", clip=clip)
            for baseline in (False, True)
        )
        assert without.norm() > 1e-2
        assert ((with_it - without).norm() < 1e-10) == same


def one_position(seed: int, v: int = 5) -> Tree:
    return Tree.random(seed, v, depth=1)


F_DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "reverse_kl": (lambda u: -u.log(), lambda u: math.log(u) - 1),
    "forward_kl": (lambda u: u * u.log(), lambda u: u),
    "jsd": (
        lambda u: 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log()),
        lambda u: 0.5 * math.log((1 + u) / 2),
    ),
    "pearson": (lambda u: (u - 1) ** 2, lambda u: u**2 - 1),
    "neyman": (lambda u: (1 - u) ** 2 / u, lambda u: 2 - 2 / u),
    "hellinger": (lambda u: (u.sqrt() - 1) ** 2, lambda u: math.sqrt(u) - 1),
    "total_variation": (lambda u: 0.5 * (u - 1).abs(), lambda u: math.copysign(0.5, u - 1)),
}


def f_gradient(tree: Tree, f: Callable[[Tensor], Tensor]) -> Tensor:
    """grad E_p f(q/p) at the tree's only position."""
    p, q = tree.student[()].softmax(0), tree.teacher[()].softmax(0)
    return flat(tree.gradient((p * f(q / p)).sum()))


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_10_w_f_is_the_advantage_of_an_f_divergence(engine: Engine, kind: str) -> None:
    f, w = F_DIVERGENCES[kind]
    tree = one_position(10)
    true = f_gradient(tree, f)
    assert true.norm() > 1e-2
    found = expected_over_completions(engine, tree, "opd", reward=lambda d: w(math.exp(d)))
    torch.testing.assert_close(found, true, **EXACT)


def test_10_antisd_climbs_the_jsd(engine: Engine) -> None:
    """With the gate open and no reward, minus half the JSD's gradient: descending the loss raises the JSD."""
    tree = one_position(11)
    jsd = f_gradient(tree, F_DIVERGENCES["jsd"][0])
    found = expected_over_completions(engine, tree, "antisd", gate=Gate(step=9, warm=1e-3, g=1))
    torch.testing.assert_close(found, -0.5 * jsd, **EXACT)
    shut = expected_over_completions(engine, tree, "antisd", gate=Gate(step=0))
    assert shut.abs().max() == 0


@pytest.mark.parametrize("seed", range(5))
def test_11_power_opd_rests_at_the_teacher_alone(engine: Engine, seed: int) -> None:
    tree = one_position(20 + seed)
    assert expected_over_completions(engine, tree, "power-opd", mask_stop=False).norm() > 1e-4
    with torch.no_grad():
        tree.student[()].copy_(tree.teacher[()] + 3.0)  # the same distribution
    assert expected_over_completions(engine, tree, "power-opd", mask_stop=False).abs().max() < 1e-10


# 12 to 15: direct terms


@pytest.mark.parametrize("beta", [0.3, 1.2])
def test_12_veto_adds_an_entropy(engine: Engine, beta: float) -> None:
    """grad KL(p to sg Q) = grad KL(p to q) + beta grad H(p): descending it lowers the entropy, the more the larger beta."""
    tree = one_position(12)
    p, q = tree.student[()].log_softmax(0), tree.teacher[()].log_softmax(0)
    kl, entropy = (p.exp() * (p - q)).sum(), -(p.exp() * p).sum()
    temperatures = {"student_temperature": 1.0, "teacher_temperature": 1.0}
    toy = Toy([tree.sample((0,))])
    answer = engine("veto", toy, beta=beta, kind="reverse_kl", reduction=CONSTANT, **temperatures)
    found = flat(tree.chained(toy.samples, answer.gradients, [1.0]))
    torch.testing.assert_close(found, flat(tree.gradient(kl + beta * entropy)), **EXACT)


@pytest.mark.parametrize("top_k", [3, 5])
def test_13_resd_has_the_gradient_of_an_unnormalised_target(engine: Engine, top_k: int) -> None:
    """p_v (log(p_v/q'_v) - L) over the student's top K and, below K = V, the tail spread over its ids by their shares.

    One sample right, one wrong: both weigh 1. q' sums to more than 1 and is not divided by it."""
    tree = one_position(13)
    toy = Toy([tree.sample((0,), reward=1.0), tree.sample((1,), reward=0.0)])
    for sample in toy.samples:
        sample.teacher = 3 * sample.teacher  # far away: the floor .2 p holds somewhere
    answer = engine("resd", toy, kind="reverse_kl", top_k=top_k, reduction=CONSTANT)
    p, q = tree.student[()].detach().softmax(0), toy.samples[0].teacher[0].softmax(0)
    inside = p.topk(top_k).indices
    outside = [v for v in range(5) if v not in inside.tolist()]
    mass_p, mass_q = torch.cat([p[inside], p[outside].sum()[None]]), torch.cat([q[inside], q[outside].sum()[None]])
    floored = torch.maximum(mass_q, 0.2 * mass_p)
    assert floored.sum() > 1.01
    logs = torch.where(mass_p > 0, (mass_p / floored).log(), 0.0)
    slope = mass_p * (logs - (mass_p * logs).sum())
    wanted = torch.zeros(5, dtype=torch.float64)
    wanted[inside] = slope[:-1]
    wanted[outside] = slope[-1] * p[outside] / p[outside].sum()
    for gradient in answer.gradients:
        torch.testing.assert_close(gradient[0], wanted / 2, **EXACT)


def test_14_stop_ids_as_one_category(engine: Engine) -> None:
    """Ids 0 and 1 both stop. Sampled on the merged category, the gradient is that of the merged reverse KL, which is not
    above the full one; moving mass between the two at a constant sum changes nothing."""
    noise = torch.Generator().manual_seed(14)
    student = torch.randn(6, generator=noise, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(6, generator=noise, dtype=torch.float64)

    def merged(logits: Tensor) -> Tensor:
        return torch.cat([logits[:2].logsumexp(0)[None], logits[2:]])

    tree = Tree(5, 1, {(): merged(student)}, {(): merged(teacher)})
    samples = [tree.sample((y,)) for y in range(5)]
    answer = engine("opd", Toy(samples), reduction=CONSTANT)
    chances = merged(student).detach().softmax(0)
    weighted = sum(5 * chances[y] * answer.gradients[y][0] for y in range(5))
    (found,) = torch.autograd.grad(merged(student), student, weighted)
    kl = position_divergence("reverse_kl", merged(student), merged(teacher))
    torch.testing.assert_close(found, torch.autograd.grad(kl, student)[0], **EXACT)
    assert kl.item() <= position_divergence("reverse_kl", student, teacher).item()
    share = student.detach()[:2].softmax(0)
    split = torch.tensor([1 / share[0], -1 / share[1]], dtype=torch.float64)  # to first order, the sum stays
    assert found[:2].norm() > 1e-3
    assert abs(float(found[:2] @ split)) < 1e-10


@pytest.mark.parametrize("row", ["sdpo", "sdft"])
def test_15_on_policy_the_importance_factor_changes_nothing(engine: Engine, row: str) -> None:
    """c = min(2, sg rho) is 1 at rho = 1, and detached; away from it, it is a weight."""
    toy = on_policy(3)
    capped, bare = (engine(row, toy, top_k=3, is_clip=c, reduction=CONSTANT) for c in (2.0, None))
    assert capped.loss == pytest.approx(bare.loss, abs=1e-12)
    torch.testing.assert_close(flat(capped.gradients), flat(bare.gradients), **EXACT)
    assert flat(bare.gradients).norm() > 1e-2
    drifted = toys(3)
    capped, bare = (engine(row, drifted, top_k=3, is_clip=c, reduction=CONSTANT) for c in (2.0, None))
    assert (flat(capped.gradients) - flat(bare.gradients)).norm() > 1e-3


def test_ptd_pos_divergence_moves_the_student(engine: Engine) -> None:
    """Its published form differentiates nothing (p detached beside a live mixture). Here one failed sample of a failed
    group has no advantage, so that the gradient is coef times the JSD's alone."""
    tree = one_position(16)
    toy = Toy([tree.sample((0,)), tree.sample((1,))])
    answer = engine("ptd-po", toy, top_k=None, kl_ref=0.0, advantage="mean", reduction=CONSTANT)
    jsd = position_divergence("jsd", tree.student[()], tree.teacher[()])
    found = flat(tree.chained(toy.samples, answer.gradients, [1.0, 1.0]))
    torch.testing.assert_close(found, 0.5 * flat(tree.gradient(jsd)), **EXACT)
    assert found.norm() > 1e-2
