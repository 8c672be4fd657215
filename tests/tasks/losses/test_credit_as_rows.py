"""Every row of the family against the plain second implementation, which shares nothing with the product (`credit_rows`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from credit_configs import CONFIGURED, GROUP, PLAIN, Row, named
from credit_rows import ROWS, Gate, Toy, toys
from credited import gradients_of, loss_of, stored_of

from tasks.losses.token_credit.additions.anti_sd import WAITS
from tasks.losses.token_credit.config import CreditConfig


def test_the_gate_of_antisd_is_its_second_implementation() -> None:
    """Twelve steps whose entropies rise and fall: closed in the warm-up, open, closed, and unchanged between."""
    config = CreditConfig.model_validate({"reward": GROUP, "add": "anti_sd", "clip": PLAIN})
    gate, memory, seen = Gate(), {}, []
    for number, sharpness in enumerate([1.0, 1.2, 0.9, 1.1, 1.0, 0.5, 1.05, 3.0, 1.05, 0.4, 1.04, 4.0]):
        toy = toys(number)
        toy = replace(toy, samples=[replace(s, teacher=sharpness * s.teacher) for s in toy.samples])
        remembered, memory = config.add.remember(memory, stored_of(toy, config))
        wanted = ROWS["antisd"](toy, gate=gate)
        gate = wanted.parts["gate"]
        assert remembered == gate.g
        loss = loss_of(config, toy, remembered=remembered)
        for mine, theirs in zip(gradients_of(loss, toy), wanted.gradients(toy), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        seen.append(remembered)
    assert set(seen[:5]) == {0.0} and {0.0, 1.0} == set(seen[5:])


def test_a_warm_up_without_scored_tokens_goes_on_to_the_first_step_that_has_some() -> None:
    """The gate then opens as it does after a warm-up with tokens, and a state that was saved before goes on too."""
    config = CreditConfig.model_validate({"reward": GROUP, "add": {"kind": "anti_sd", "warm_steps": 2}, "clip": PLAIN})
    toy = toys(1)
    none = replace(toy, samples=[replace(s, has_context=False) for s in toy.samples])
    gate, memory, seen = Gate(), {}, []
    for step in (none, none, none, toy, toy, none):
        remembered, memory = config.add.remember(memory, stored_of(step, config))
        gate = ROWS["antisd"](step, gate=gate, warm_steps=2).parts["gate"]
        assert remembered == gate.g
        seen.append(remembered)
    assert seen == [0, 0, 0, 0, 1, 1]
    half, of_it = [], {}
    for step in (none, toy, toy):  # one step with tokens is a warm-up, as it always was
        remembered, of_it = config.add.remember(of_it, stored_of(step, config))
        half.append(remembered)
    assert half == [0, 0, 1]


def test_a_state_of_the_earlier_rule_goes_on_by_it_and_has_another_content() -> None:
    """Its warm-up ended after `warm_steps` steps without a token too, and its gate stayed shut. The key of its next round has the
    state's content, so a state of the new rule differs from it exactly where the two rules do: without any scored token."""
    config = CreditConfig.model_validate({"reward": GROUP, "add": {"kind": "anti_sd", "warm_steps": 3}, "clip": PLAIN})
    toy = toys(1)
    none = replace(toy, samples=[replace(s, has_context=False) for s in toy.samples])

    def after(*steps: Toy, memory: Any = {}) -> tuple[list[float], Any]:  # noqa: B006  nothing changes it
        seen = []
        for step in steps:
            remembered, memory = config.add.remember(memory, stored_of(step, config))
            seen.append(remembered)
        return seen, memory

    def earlier(steps: float) -> Any:
        return {"steps": np.array([steps]), "entropies": np.empty(0), "warm": np.empty(0), "gate": np.zeros(1)}

    for done in (1, 3, 4):
        _, now = after(*[none] * done)
        assert now.keys() - earlier(done).keys() == {WAITS} and now["steps"] == [done]
    for with_token in ([toy], [none, toy], [toy, none, none, toy]):
        assert WAITS not in after(*with_token)[1]
    seen, shut = after(none, toy, toy, memory=earlier(3))
    assert seen == [0, 0, 0] and shut.keys() == earlier(6).keys() and not len(shut["warm"])
    seen, warm = after(none, toy, toy, memory=earlier(1))  # a token within its warm-up: both rules agree
    assert seen == [0, 0, 1] and len(warm["warm"]) == 1
    seen, _ = after(none, toy, toy, memory=after(none, none, none)[1])
    assert seen == [0, 0, 1]


@pytest.mark.parametrize("row", CONFIGURED, ids=named)
@pytest.mark.parametrize("seed", range(6))
def test_a_row_is_its_second_implementation(row: Row, seed: int) -> None:
    toy, config = row.of(toys(seed, graded=seed % 2 == 1)), row.objective
    wanted = ROWS[row.name](toy, **row.fields)
    gradients = wanted.gradients(toy)
    assert any(float(each.abs().max()) > 1e-6 for each in gradients)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-4)):
        loss = loss_of(config, toy, step=row.step, contexts=row.contexts, dtype=dtype)
        largest = max(1.0, abs(float(wanted.loss.detach())))
        assert float(loss.detach()) == pytest.approx(float(wanted.loss.detach()), abs=tolerance * largest)
        for mine, theirs in zip(gradients_of(loss, toy), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
