"""The plain rows on varied batches: finite everywhere, indifferent to the order of samples, and 0 without tokens; and
their pieces with state or order on numbers computed by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from credit_rows import ON_TOYS, ROWS, Gate, Toy, toys
from credit_rows.distilled import trace_lambda
from credit_rows.rewarded import quantile
from credit_rows.terms import log_tail, returns


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_varied_batch_has_finite_gradients_in_any_order(row: str, seed: int) -> None:
    toy = toys(seed, graded=seed == 1)
    fields = ON_TOYS.get(row, {})
    result = ROWS[row](toy, **fields)
    gradients = result.gradients(toy)
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 1e-6 for g in gradients)
    if row != "pbsd":  # its terms belong to pairs
        assert sum(map(sum, result.per_token)) == pytest.approx(result.loss.item(), abs=1e-12)
    order = list(range(len(toy.samples)))
    random.Random(seed).shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    shuffled = Toy([toy.samples[i] for i in order], [(place[i], place[j]) for i, j in toy.pairs])
    again = ROWS[row](shuffled, **fields)
    assert again.loss.item() == pytest.approx(result.loss.item(), abs=1e-10)
    for found, old in zip(again.gradients(shuffled), order, strict=True):
        torch.testing.assert_close(found, gradients[old], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", ROWS)
def test_without_tokens_in_the_loss_it_is_a_zero_that_back_propagates(row: str) -> None:
    toy = toys(0)
    for sample in toy.samples:
        sample.loss = [0] * len(sample.tokens)
    result = ROWS[row](toy, **ON_TOYS.get(row, {}))
    assert result.loss.item() == 0
    assert all((g == 0).all() for g in result.gradients(toy))


@pytest.mark.parametrize("row", sorted(set(ROWS) - {"grpo"}))
def test_a_position_without_a_signal_reads_nothing_of_the_teacher(row: str) -> None:
    """Changing the teacher where the signal is invalid changes neither value nor gradient. SRPO's mean of w takes every
    routed token with k = 1 as the table says, so it is asked for valid ones here."""
    toy = toys(2)
    changed = Toy([replace(s, teacher=s.teacher.clone()) for s in toy.samples], toy.pairs)
    for sample in changed.samples:
        for t, valid in enumerate(sample.signal):
            if not valid:
                sample.teacher[t] = -2 * sample.teacher[t]
    fields = ON_TOYS.get(row, {}) | ({"routed_needs_signal": True} if row == "srpo" else {})
    before, after = ROWS[row](toy, **fields), ROWS[row](changed, **fields)
    assert after.loss.item() == before.loss.item()
    for a, b in zip(after.gradients(changed), before.gradients(toy), strict=True):
        assert torch.equal(a, b)


def test_antisds_gate_opens_and_shuts_with_hysteresis() -> None:
    gate, seen = Gate(), []
    for entropies in ([1.0, 3.0], [2.0], [9.0, 0.0], [2.0], [2.0], [1.95], [2.0], [1.9], [1.86], [1.85], [1.99], [2.1]):
        gate = gate.after(entropies, warm_steps=5, close_below=0.93)
        seen.append((gate.warm, gate.g))
    assert seen[:5] == [(None, 0)] * 5
    assert seen[5:] == [(2.0, 0), (2.0, 1), (2.0, 1), (2.0, 1), (2.0, 0), (2.0, 0), (2.0, 1)]
    assert gate.after([], 5, 0.93).g == 1  # a step without tokens


def test_returns_by_hand() -> None:
    assert returns("mean_future", [1.0, 2.0, 4.0], [True] * 3) == [4.0, 6.0, 4.0]
    assert returns("mean_future", [1.0, 2.0, 4.0], [True, False, True]) == [5.0, 6.0, 4.0]
    assert returns("discounted", [1.0, 2.0, 4.0], [True] * 3, gamma=0.5) == [3.0, 4.0, 4.0]
    assert returns("token", [1.0, 2.0, 4.0], [True] * 3) == [1.0, 2.0, 4.0]


def test_schedules_and_quantiles_by_hand() -> None:
    assert [trace_lambda(step) for step in (0, 10, 25, 40, 99)] == [0.5, 0.5, 0.25, 0.0, 0.0]
    assert quantile([4.0, 1.0, 2.0], 0.2) == pytest.approx(1.4)
    assert quantile([4.0], 0.2) == 4.0


def test_the_tail_keeps_its_floor() -> None:
    logs = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    assert log_tail(logs, -30.0).exp().item() == pytest.approx(0.25)
    assert log_tail(logs.softmax(0).log(), -30.0).item() == pytest.approx(-30.0)
