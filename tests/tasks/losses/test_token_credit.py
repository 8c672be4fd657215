"""`estimator: credit`: values by hand, what must not matter, tokens and groups without anything to learn, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from credit_configs import CONFIGURED, DAPO, FULL, GROUP, PLAIN, TOP, Row, named
from credit_rows.toy import Sample, Toy, toys
from credited import batch_of, gradients_of, loss_of, planned, weights_of
from plain_head import PlainHead
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import ObjectiveConfig
from tasks.losses.token_credit.additions import ADDITIONS, Addition
from tasks.losses.token_credit.config import CreditConfig
from tasks.losses.token_credit.rewards import GroupReward
from tasks.losses.token_credit.stored import Tokens

OBJECTIVE = TypeAdapter(ObjectiveConfig)
BY_NAME = list({row.name: row for row in reversed(CONFIGURED)}.values())
"""One row per name."""


def two(rewards: tuple[float, float], shift: float = 0.0) -> Toy:
    """Two samples of a prompt, one token each of three ids; the live student has moved by `shift` at the sampled one."""
    old = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
    samples = []
    for reward in rewards:
        live = old.clone()
        live[0, 1] += shift
        one = {"prompt": 0, "tokens": [1], "written": [1], "signal": [1], "loss": [1], "reward": reward}
        teacher = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64)
        samples.append(Sample(live=live.requires_grad_(), old=old, teacher=teacher, reference=old, **one))
    return Toy(samples)


def test_grpo_by_hand() -> None:
    """Advantages 1/2 and -1/2 (std off): minus the mean of A grad log p at rho = 1; clipped tokens have no gradient."""
    config = CreditConfig.model_validate({"reward": GROUP | {"std": False}, "clip": PLAIN})
    toy = two((1.0, 0.0))
    loss = loss_of(config, toy)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    right, wrong = gradients_of(loss, toy)
    p = toy.samples[0].live.detach().softmax(-1)
    torch.testing.assert_close(right, -0.5 * 0.5 * (torch.tensor([[0.0, 1.0, 0.0]]).double() - p))
    torch.testing.assert_close(wrong, -right)
    moved = two((1.0, 0.0), shift=2.0)  # rho > 1.2: the right sample is clipped, the wrong one is not
    right, wrong = gradients_of(loss_of(config, moved), moved)
    assert float(right.abs().max()) == 0 and float(wrong.abs().max()) > 0.1


def test_advantages_by_hand() -> None:
    """Over judged samples alone; 0 without a verdict and where all are equal."""
    nan = math.nan
    rewards = torch.tensor([1.0, 0.0, nan, 0.25, 0.25, nan, 3.0, nan, nan], dtype=torch.float64).numpy()
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 3]).numpy()
    deviation = math.sqrt(0.5)
    std = GroupReward().advantages(rewards, groups)
    assert std == pytest.approx([0.5 / (deviation + 1e-6), -0.5 / (deviation + 1e-6), 0, 0, 0, 0, 0, 0, 0])
    others = GroupReward(std=False, center="leave_one_out").advantages(rewards, groups)
    assert others == pytest.approx([1, -1, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("row", BY_NAME, ids=named)
def test_neither_micro_batches_nor_order_matter(row: Row) -> None:
    toy, config = row.of(toys(3)), row.objective
    whole = gradients_of(loss_of(config, toy, step=row.step, contexts=row.contexts), toy)
    parts = [[i] for i in reversed(range(len(toy.samples)))]
    cut = gradients_of(loss_of(config, toy, step=row.step, contexts=row.contexts, parts=parts), toy)
    other = replace(toy, samples=toy.samples[::-1])
    turned = gradients_of(loss_of(config, other, step=row.step, contexts=row.contexts), other)[::-1]
    for one, two_, three in zip(whole, cut, turned, strict=True):
        torch.testing.assert_close(two_, one, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(three, one, rtol=1e-12, atol=1e-13)


def _changed(toy: Toy, **fields: Any) -> Toy:
    return replace(toy, samples=[replace(s, **{n: v(s) for n, v in fields.items()}) for s in toy.samples])


NOTHING = {
    "masked": {"loss": lambda s: [0] * len(s.tokens)},
    "equal": {"reward": lambda s: 1.0},
    "unjudged": {"reward": lambda s: math.nan},
    "failed": {"reward": lambda s: 0.0},
    "contexts": {"has_context": lambda s: False},
    "signals": {"signal": lambda s: [0] * len(s.tokens)},
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_learn_is_a_zero_that_back_propagates(case: str) -> None:
    """For every row: no number is NaN, and what has nothing to learn from has no gradient."""
    for row in BY_NAME:
        toy, config = _changed(row.of(toys(4)), **NOTHING[case]), row.objective
        loss = loss_of(config, toy, step=row.step, contexts=row.contexts)
        gradients = gradients_of(loss, toy)
        assert all(bool(each.isfinite().all()) for each in gradients) and bool(loss.isfinite()), row.name
        rewarded = config.reward.uses_rewards and config.beside is None and config.add.kind == "none"
        distilled = not config.policy and config.reward.kind == "none" and row.contexts
        dead = case == "masked"
        dead |= case in ("equal", "unjudged", "failed") and rewarded and not (config.likelihood or config.reference)
        dead |= case in ("contexts", "signals") and distilled
        dead |= row.name == "srpo" and case in ("equal", "unjudged", "failed")  # no route and no advantage
        if dead:
            assert all(float(each.abs().max()) == 0 for each in gradients), row.name


def test_what_is_masked_may_be_anything() -> None:
    """Infinite and invalid numbers at masked tokens reach neither loss nor gradient."""
    for row in BY_NAME:
        toy, config = row.of(toys(5)), row.objective
        batch = batch_of(toy, config, planned(toy, config, row.step, row.contexts), torch.float64)
        out = batch.loss_mask_N <= 0
        assert bool(out.any())
        logits = torch.cat([sample.live for sample in toy.samples])
        objective, weights = make_objective(config), weights_of(toy, config).double()

        def loss(spoil: float | None, batch: Any = batch, out: Tensor = out) -> Tensor:
            if spoil is not None:
                lists = ("teacher_support_logprobs_NK", "student_support_logprobs_NK")
                fields = {
                    name: getattr(batch, name).masked_fill(
                        out if getattr(batch, name).dim() == 1 else out[:, None], spoil
                    )
                    for name in ("student_logprobs_N", "teacher_logprobs_N", "teacher_tail_logmass_N", *lists)
                    if getattr(batch, name) is not None
                }
                batch = replace(batch, **fields)
            view = PlainHead()(logits, nn.Identity(), batch, objective.needs.student)  # noqa: B023
            return (weights * objective(batch, view).per_token_N).sum()  # noqa: B023

        plain = gradients_of(loss(None), toy)
        for spoil in (math.nan, -math.inf):
            for mine, theirs in zip(gradients_of(loss(spoil), toy), plain, strict=True):
                assert torch.equal(mine, theirs), (row.name, spoil)


def test_the_published_divergence_of_ptd_po_has_no_gradient_and_ours_has() -> None:
    (row,) = (row for row in BY_NAME if row.name == "ptd-po")
    toy = row.of(toys(2))
    without = CreditConfig.model_validate({**row.config, "reference": None, "reward": GROUP | {"std": False}})
    alone = CreditConfig.model_validate({"reward": GROUP | {"std": False}, "clip": PLAIN})
    apart = zip(gradients_of(loss_of(without, toy), toy), gradients_of(loss_of(alone, toy), toy), strict=True)
    assert max(float((one - two_).abs().max()) for one, two_ in apart) > 1e-3


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "reward, add, beside", "nothing is trained on"),
    ({"reward": GROUP, "route": "srpo"}, "beside", "sends tokens to a divergence"),
    ({"reward": "group", "route": "srpo", "beside": {}}, "success_threshold", "which samples are correct"),
    (
        {"reward": "group", "scale": "rlrt"},
        "success_threshold",
        "give reward: {kind: group, success_threshold: 0.5} (0.5",
    ),
    ({"reward": {"kind": "group", "center": "leave_one_out"}}, "std", "leave_one_out"),
    ({"add": "log_ratio", "scale": "rlsd"}, "scale", "no reward"),
    ({"add": "log_ratio", "route": "contexts", "beside": {}}, "route", "no policy gradient"),
    ({"reward": "group", "route": "contexts", "beside": {}}, "route", "no policy gradient"),
    ({"add": {"kind": "log_ratio", "coef": -1}}, "coef", "greater than 0"),
    ({"beside": {"coef": -0.5}}, "coef", "greater than 0"),
    ({"beside": {"is_clip": 0}}, "is_clip", "greater than 0"),
    ({"beside": {"target": {"kind": "product"}}}, "support.outside", "product of the tails"),
    ({"beside": {"target": {"kind": "product", "beta": -1}, "support": FULL}}, "beta", "negative"),
    ({"beside": {"support": TOP, "student_temperature": 1.1}}, "temperature", "outside the list is unknown"),
    ({"beside": {"support": TOP | {"k": 1, "outside": "renormalize"}}}, "support.k", "identically zero"),
    ({"beside": {"support": TOP | {"outside": "drop"}}}, "outside", "no divergence"),
    ({"beside": {"term_clip": 0.05}}, "term_clip", "forward_kl or reverse_kl"),
    ({"beside": {"cross_entropy": True}}, "cross_entropy", "forward_kl"),
    ({"beside": {"divergence": {"kind": "alpha", "alpha": 2.9}, "logprob_min": -60}}, "logprob_min", "float32"),
    ({"beside": {"on_errors": {"kind": "reverse_kl"}}}, "on_errors", "spans"),
    ({"reward": GROUP, "route": {"kind": "spans", "weight": -0.1}, "beside": {}}, "weight", "negative"),
    ({"add": {"kind": "dasd"}}, "beta", "required"),
    ({"add": {"kind": "sod", "segments_of": "judge"}}, "add.segments_of", "reward: group"),
    ({"add": {"kind": "sod", "segments_of": "judge", "segment_ends": [5]}}, "segment_ends", "leave the ids out"),
    ({"reward": "group", "scale": "visd"}, "advantage_at", "live"),
    ({"add": {"kind": "vopd", "support": "full", "k": 8}}, "advantage_at", "live"),
    ({"add": {"kind": "vopd", "k": 4}, "beside": {"support": TOP | {"k": 8}}}, "beside, add, scale", "different lists"),
    ({"reward": "group", "returns": "mean_future"}, "returns", "nothing is added"),
    ({"add": "log_ratio", "returns": "mean_future", "advantage_at": "live"}, "returns", "advantage_at: rollout"),
    ({"reward": "group", "add": "anti_sd", "returns": "discounted"}, "returns", "step to step"),
    ({"add": "log_ratio", "ratio": "none", "clip": {}}, "clip", "ratio is none"),
    ({"reward": GROUP, "reference": {"where": "unrouted"}}, "reference.where", "where: all"),
    ({"reward": GROUP | {"drop_equal_groups": True}, "route": "failed_groups", "beside": {}}, "drop_equal", "all fail"),
    ({"reward": GROUP | {"drop_equal_groups": True}, "route": "spans", "beside": {}}, "drop_equal", "all fail"),
    (
        {
            "reward": GROUP | {"drop_equal_groups": True},
            "route": {"kind": "srpo", "feedback": True},
            "beside": {},
        },
        "drop_equal",
        "all fail",
    ),
    ({"reward": "group", "normalisation": "constant"}, "normalisation_length", "required"),
]


@pytest.mark.parametrize(("config", "field", "reason"), REFUSED)
def test_refused_with_the_field_and_the_reason(config: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        OBJECTIVE.validate_python({"estimator": "credit", **config})
    assert field in str(caught.value) and reason in str(caught.value)


def test_an_advantage_of_the_prefix_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ADDITIONS, "classes", dict(ADDITIONS.classes))

    @ADDITIONS.register
    class Everywhere(Addition):
        """The same everywhere."""

        kind: Literal["everywhere"] = "everywhere"
        equation = "delta = 1"
        paper = ""
        of_prefix = True

        def __call__(self, tokens: Tokens) -> Tensor:
            return tokens.d_N * 0 + 1

    with pytest.raises(ValidationError, match="expected gradient is zero"):
        OBJECTIVE.validate_python({"estimator": "credit", "add": "everywhere"})
    assert OBJECTIVE.validate_python({"estimator": "credit", "add": "everywhere", "reward": "group"}).add.of_prefix


@pytest.mark.parametrize("row", CONFIGURED, ids=named)
def test_a_config_survives_its_json(row: Row) -> None:
    config = row.objective
    assert OBJECTIVE.validate_json(config.model_dump_json()) == config


def test_what_is_asked_for() -> None:
    """Rewards only where they are used, and an exact sampler only where a sampled token's probability is in the loss."""
    of = {row.name: row.objective for row in BY_NAME}
    assert {name for name, c in of.items() if not c.needs().credit.reward} == {
        "sdpo", "sdft", "opsd-script", "opsd-paper", "distil", "iw-opd", "vopd", "power-opd", "veto", "top-d", "opd", "dasd",
    } - {"dasd"}  # fmt: skip
    assert {name for name, c in of.items() if not c.requires_untruncated_sampling} == {
        "sdpo", "sdft", "opsd-script", "opsd-paper", "veto", "resd",
    }  # fmt: skip
    needs = of["srpo"].needs()
    assert [(need.name, need.k) for need in needs.signals] == [("sampled", None), ("mask", None), ("student_topk", 4)]
    assert needs.credit.contexts and needs.credit.teacher_entropy and not of["sod"].needs().credit.contexts
    assert of["grpo"].needs().student.support is None and DAPO["high"] == of["grpo"].clip.high
