"""`estimator: pairs` (PBSD): its second implementation, its gradient by hand and by enumeration, and pairs that are not whole."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from credit_rows import ROWS, Sample, Toy, toys
from paired import gradients_of, loss_of, samples_of
from pydantic import TypeAdapter, ValidationError
from token_trees import Tree, flat

from tasks.losses.build import make_objective
from tasks.losses.config import ObjectiveConfig, PairsConfig
from tasks.losses.types import StudentView, TokenBatch
from tasks.trainer.pairing import PairPlanner

OBJECTIVE = TypeAdapter(ObjectiveConfig)
BETA = 0.3
CONFIG = PairsConfig(beta=BETA)


def varied(seed: int) -> Toy:
    """Toys with all their samples in pairs but for one where they are odd; several pairs are not whole."""
    toy = toys(seed)
    order = list(range(len(toy.samples)))
    random.Random(seed).shuffle(order)
    return replace(toy, pairs=list(zip(order[::2], order[1::2], strict=False)))


def one(tokens: list[int], seed: int = 0, **fields: Any) -> Sample:
    """A completion over five ids, all of whose tokens count."""
    noise = torch.Generator().manual_seed(seed)
    live, teacher = (torch.randn(len(tokens), 5, generator=noise, dtype=torch.float64) for _ in range(2))
    ones = {name: [1] * len(tokens) for name in ("written", "signal", "loss")}
    values: dict[str, Any] = {
        "prompt": 0,
        "live": live.requires_grad_(),
        "old": live,
        "teacher": teacher,
        "reference": teacher,
    }
    return Sample(tokens=tokens, **(values | ones | {"reward": math.nan} | fields))


def margin(plus: Sample, minus: Sample) -> float:
    """h(y+) - h(y-), all tokens of both."""

    def h(sample: Sample) -> float:
        at = (range(len(sample.tokens)), sample.tokens)
        return float((sample.live.detach().log_softmax(-1)[at] - sample.teacher.log_softmax(-1)[at]).sum())

    return h(plus) - h(minus)


@pytest.mark.parametrize("contexts", [True, False], ids=["contexts", "none"])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_its_second_implementation(seed: int, contexts: bool) -> None:
    toy, beta = varied(seed), (0.01, 0.1, 1.0, 5.0)[seed % 4]
    wanted = ROWS["pbsd"](toy, beta=beta, needs_context=contexts)
    gradients = wanted.gradients(toy)
    assert any(float(each.abs().max()) > 1e-6 for each in gradients)
    assert 0 < len(wanted.parts["pairs"]) < len(toy.pairs), "some pairs are whole, some are not"
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-4)):
        loss = loss_of(PairsConfig(beta=beta), toy, contexts=contexts, dtype=dtype)
        largest = max(1.0, abs(float(wanted.loss.detach())))
        assert float(loss.detach()) == pytest.approx(float(wanted.loss.detach()), abs=tolerance * largest)
        for mine, theirs in zip(gradients_of(loss, toy), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_a_single_pair_by_hand() -> None:
    """Value -log sigmoid(beta margin); gradient -beta sigmoid(-beta margin) (grad log p(y+) - grad log p(y-))."""
    toy = Toy([one([1, 4, 0], 1), one([2, 2], 2)], [(0, 1)])
    found = margin(*toy.samples)
    loss = loss_of(CONFIG, toy)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-BETA * found)), rel=1e-7)
    coefficient = -BETA / (1 + math.exp(BETA * found))
    assert abs(found) > 0.1
    for sample, mine, sign in zip(toy.samples, gradients_of(loss, toy), (1, -1), strict=True):
        score = torch.nn.functional.one_hot(torch.tensor(sample.tokens), 5) - sample.live.detach().softmax(-1)
        torch.testing.assert_close(mine, sign * coefficient * score, rtol=1e-7, atol=1e-9)


def test_equal_completions_of_the_same_distributions_pull_nowhere() -> None:
    """The margin is 0 and the loss log 2; what pulls one up pulls the other down, so shared parameters do not move."""
    plus = one([3, 0, 2], 3)
    minus = replace(plus)
    toy = Toy([plus, minus], [(0, 1)])
    loss = loss_of(CONFIG, toy)
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-7)
    (shared,) = torch.autograd.grad(loss, [plus.live])
    assert float(shared.abs().max()) < 1e-12
    apart = Toy([plus, replace(plus, live=plus.live.detach().clone().requires_grad_())], [(0, 1)])
    up, down = gradients_of(loss_of(CONFIG, apart), apart)
    torch.testing.assert_close(up, -down)
    score = torch.nn.functional.one_hot(torch.tensor(plus.tokens), 5) - plus.live.detach().softmax(-1)
    torch.testing.assert_close(up, -BETA / 2 * score, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_large_margin_is_finite(ahead: int) -> None:
    """Where y+ is far ahead nothing is left to learn; far behind, the gradient is beta times that of the margin."""
    toy = Toy([one([1, 2]), one([1, 2], 1)], [(0, 1)])
    toy.samples[ahead].teacher[:, [1, 2]] -= 1e5  # the student is far above the teacher there
    loss = loss_of(CONFIG, toy)
    gradients = gradients_of(loss, toy)
    assert bool(loss.isfinite()) and all(bool(each.isfinite().all()) for each in gradients)
    found = margin(*toy.samples)
    if ahead == 0:
        assert found > 1e4 and float(loss.detach()) == 0 and all(float(each.abs().max()) == 0 for each in gradients)
    else:
        score = torch.nn.functional.one_hot(torch.tensor([1, 2]), 5) - toy.samples[0].live.detach().softmax(-1)
        assert found < -1e4 and float(loss.detach()) == pytest.approx(-BETA * found, rel=1e-6)
        torch.testing.assert_close(gradients[0], -BETA * score, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_neither_micro_batches_nor_order_matter(seed: int) -> None:
    toy, draw = varied(seed), random.Random(seed)
    whole = gradients_of(loss_of(CONFIG, toy), toy)
    pairs = list(range(len(toy.pairs)))
    draw.shuffle(pairs)
    rows = [row for pair in pairs for row in draw.sample((2 * pair, 2 * pair + 1), 2)]
    units = [[2 * n, 2 * n + 1] for n in range(len(pairs))]
    draw.shuffle(units)
    cut = draw.randint(1, len(units) - 1)
    parts = [
        [place for unit in units[:cut] for place in reversed(unit)],
        [place for unit in units[cut:] for place in unit],
    ]
    ways = ({"rows": rows}, {"rows": rows, "parts": parts}, {"parts": units})
    for found in (loss_of(CONFIG, toy, **way) for way in ways):
        for mine, theirs in zip(gradients_of(found, toy), whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


def test_by_enumeration_a_small_beta_is_the_forward_kl_of_sequences() -> None:
    """E over y+ ~ q and y- ~ p of 2/beta times the gradient, for beta to 0, is -E_q grad log p(y) + E_p grad log p(y): the
    gradient of KL(q to p) over whole completions, for the second part is 0. The next term is of the order of beta."""
    tree = Tree.random(5, v=3, depth=2)
    every = tree.completions()
    toy = Toy([tree.sample(y) for pair in ((a, b) for a in every for b in every) for y in pair])
    toy.pairs = [(2 * n, 2 * n + 1) for n in range(len(every) ** 2)]
    chances = [
        math.exp(tree.log_prob(tree.teacher, a).item()) * tree.chance(b) * len(toy.pairs) for a in every for b in every
    ]
    assert sum(chances) == pytest.approx(len(toy.pairs))
    kl = torch.stack(
        [-tree.log_prob(tree.student, y) * math.exp(tree.log_prob(tree.teacher, y).item()) for y in every]
    ).sum()
    wanted, found = flat(tree.gradient(kl)), {}
    for beta in (1e-2, 5e-3):
        gradients = gradients_of(loss_of(PairsConfig(beta=beta), toy), toy)
        weights = [chance for chance in chances for _ in range(2)]
        found[beta] = flat(tree.chained(toy.samples, gradients, weights)) * 2 / beta
    errors = [float((found[beta] - wanted).norm()) for beta in (1e-2, 5e-3)]
    assert float(wanted.norm()) > 0.1 and errors[0] < 0.05 * float(wanted.norm())
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05), "what is left is of the order of beta"
    extrapolated = 2 * found[5e-3] - found[1e-2]
    torch.testing.assert_close(extrapolated, wanted, rtol=1e-3, atol=1e-4)


def test_at_the_privileged_distribution_the_expected_gradient_is_zero() -> None:
    """p = q: every margin is 0, and y+ and y- come from one distribution."""
    tree = Tree.random(7, v=3, depth=2)
    tree.teacher = {at: logits.detach().clone() for at, logits in tree.student.items()}
    every = tree.completions()
    toy = Toy([tree.sample(y) for a in every for b in every for y in (a, b)])
    toy.pairs = [(2 * n, 2 * n + 1) for n in range(len(every) ** 2)]
    gradients = gradients_of(loss_of(CONFIG, toy), toy)
    weights = [tree.chance(a) * tree.chance(b) for a in every for b in every for _ in range(2)]
    assert float(flat(tree.chained(toy.samples, gradients, weights)).abs().max()) < 1e-12
    assert max(float(each.abs().max()) for each in gradients) > 1e-4


# --- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loss", "signal", "context"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_pair_without_a_partner_is_a_zero_and_leaves_the_mean(which: int, how: str) -> None:
    samples = [one([1, 4, 0], 1), one([2, 2], 2), one([3, 3, 3], 3), one([0], 4)]
    lost = {"has_context": False} if how == "context" else {how: [0] * len(samples[which].tokens)}
    samples[which] = replace(samples[which], **lost)
    toy = Toy(samples, [(0, 1), (2, 3)])
    loss = loss_of(CONFIG, toy)
    alone = loss_of(CONFIG, replace(toy, pairs=[(2, 3)]))
    assert float(loss.detach()) == pytest.approx(float(alone.detach()), rel=1e-6)
    gradients = gradients_of(loss, toy)
    assert all(float(each.abs().max()) == 0 for each in gradients[:2])
    for mine, theirs in zip(gradients[2:], gradients_of(alone, toy)[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)
    planner = PairPlanner(samples_of(toy))
    planner(range(4), 0)
    assert planner.metrics == {"pairs": 2, "pairs_left_out": 1}


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 1)])
def test_without_a_whole_pair_it_is_a_zero_that_back_propagates(gone: tuple[int, ...]) -> None:
    samples = [one([1, 4, 0], 1), one([2, 2], 2)]
    for which in gone:
        samples[which] = replace(samples[which], loss=[0] * len(samples[which].tokens))
    toy = Toy(samples, [(0, 1)])
    loss = loss_of(CONFIG, toy)
    assert float(loss.detach()) == 0
    assert all(float(each.abs().max()) == 0 for each in gradients_of(loss, toy))


def test_masked_tokens_are_in_no_sum() -> None:
    """A token that is masked, or whose signal is not valid, is as if it were not there."""
    plus, minus = one([1, 4, 0], 1), one([2, 2], 2)
    masked = Toy([replace(plus, loss=[1, 0, 1]), replace(minus, signal=[0, 1])], [(0, 1)])
    short = Toy(
        [
            replace(
                sample,
                tokens=[sample.tokens[t] for t in at],
                live=sample.live.detach()[at].requires_grad_(),
                teacher=sample.teacher[at],
                **{name: [1] * len(at) for name in ("written", "signal", "loss")},
            )
            for sample, at in ((plus, [0, 2]), (minus, [1]))
        ],
        [(0, 1)],
    )
    mine, theirs = loss_of(CONFIG, masked), loss_of(CONFIG, short)
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-7)
    for found, wanted, at in zip(gradients_of(mine, masked), gradients_of(theirs, short), ([0, 2], [1]), strict=True):
        torch.testing.assert_close(found[at], wanted, rtol=1e-6, atol=1e-12)
        assert (
            float(found.sum(-1).abs().max()) < 1e-9 and not found[[t for t in range(len(found)) if t not in at]].any()
        )


def batch(sign: list[float], share: list[float], mask: list[float], logprobs: list[float]) -> TokenBatch:
    n = len(sign)
    return TokenBatch(
        token_ids_N=torch.zeros(n, dtype=torch.long),
        loss_mask_N=torch.tensor(mask),
        sample_N=torch.arange(n),
        position_N=torch.zeros(n, dtype=torch.long),
        teacher_logprobs_N=torch.tensor(logprobs),
        planned={"pair": torch.zeros(n), "sign": torch.tensor(sign), "share": torch.tensor(share)},
    )


@pytest.mark.parametrize("spoil", [math.nan, -math.inf])
def test_what_is_masked_may_be_anything(spoil: float) -> None:
    objective, found = make_objective(CONFIG), []
    for value in (-1.0, spoil):
        live = torch.tensor([-0.5, -0.7, value], requires_grad=True)
        tokens = batch([1, -1, -1], [0.5, 0.5, spoil], [1, 1, 0], [-1.0, -2.0, value])
        out = objective(tokens, StudentView(token_logprobs_N=live)).per_token_N
        (gradient,) = torch.autograd.grad(out.sum(), live)
        found.append((out.detach(), gradient))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and bool(a.isfinite().all()) and a[2] == 0


def test_a_pair_that_is_torn_apart_is_an_error_and_not_another_loss() -> None:
    view = StudentView(token_logprobs_N=torch.tensor([-0.5, -0.7], requires_grad=True))
    with pytest.raises(ValueError, match="one completion of a pair without the other"):
        make_objective(CONFIG)(batch([1, 1], [0.5, 0.5], [1, 1], [-1.0, -2.0]), view)
    with pytest.raises(ValueError, match=r"batch\.planned"):
        make_objective(CONFIG)(replace(batch([1, -1], [1, 1], [1, 1], [-1.0, -1.0]), planned=None), view)


# --- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [None, 0, -0.1, math.inf, math.nan])
def test_beta_is_given_and_positive(beta: float | None) -> None:
    with pytest.raises(ValidationError, match="beta"):
        OBJECTIVE.validate_python({"estimator": "pairs"} | ({} if beta is None else {"beta": beta}))


def test_what_is_asked_for() -> None:
    config = OBJECTIVE.validate_python({"estimator": "pairs", "beta": 0.5})
    assert OBJECTIVE.validate_json(config.model_dump_json()) == config and config.experimental
    needs = config.needs()
    assert [need.name for need in needs.signals] == ["sampled", "mask"]
    assert needs.pairs and needs.takes_prefixes and not needs.credit.reward
    assert not make_objective(config).tokenwise
