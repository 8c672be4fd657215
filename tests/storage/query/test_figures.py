"""Standard errors against values computed otherwise: by hand, by enumerating every resample, by the textbook's formula."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.query.figures import Figure, Sums, difference, errors_of, figure, sums_of
from storage.schemas import schema_for


def row(prompt: str, mode: str, index: int = 0, **values: Any) -> dict[str, Any]:
    plain = {"prompt_token_ids": [1], "completion_token_ids": [1], "completion_text": "", "finish_reason": "stop"}
    return plain | {"prompt_id": prompt, "mode": mode, "sample_index": index, "tokens": 1} | values


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema_for("evaluations"))


def of(values: list[list[float]], weights: list[list[float]] | None = None) -> Sums:
    """One list of samples per prompt."""
    weights = weights or [[1.0] * len(samples) for samples in values]
    total, weight = (np.array([sum(samples) for samples in each]) for each in (values, weights))
    return Sums(tuple(f"p{i}" for i in range(len(values))), total, weight, sum(map(len, values)))


def test_one_sample_per_prompt_is_the_textbooks_standard_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    found = figure([of([[value] for value in values])])
    assert found.value == pytest.approx(5 / 7) and (found.n, found.prompts) == (7, 7)
    assert found.se == pytest.approx(statistics.stdev(values) / math.sqrt(7), rel=1e-12)


def test_by_hand_three_prompts_of_four_samples() -> None:
    """Shares 1, 1/2, 0 of 4 samples each: the residuals over prompts are +2, 0, -2 of 12 samples."""
    found = figure([of([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])])
    assert found.value == 0.5 and (found.n, found.prompts) == (12, 3)
    assert found.se == pytest.approx(math.sqrt(3 / 2 * (2**2 + 2**2)) / 12, rel=1e-12)
    naive = math.sqrt(0.5 * 0.5 / 12)
    assert found.se == pytest.approx(2 * naive), "samples of one prompt are not independent"


def test_a_ratio_of_sums_agrees_with_the_jackknife_and_with_every_bootstrap() -> None:
    """KL per token over completions of unequal length. The bootstrap is enumerated: all 6^6 resamples of six prompts."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(80, 121, 6).astype(float)
    kl = tokens * generator.uniform(0.4, 0.6, 6)
    found = figure([of([[x] for x in kl], [[t] for t in tokens])])
    assert found.value == pytest.approx(kl.sum() / tokens.sum())
    resamples = np.array(list(itertools.product(range(6), repeat=6)))
    ratios = kl[resamples].sum(1) / tokens[resamples].sum(1)
    assert found.se == pytest.approx(ratios.std() * math.sqrt(6 / 5), rel=0.02)  # the bootstrap divides by G, not G - 1
    left_out = np.array([(kl.sum() - kl[i]) / (tokens.sum() - tokens[i]) for i in range(6)])
    jackknife = math.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.se == pytest.approx(jackknife, rel=0.02)


def test_the_error_is_that_of_repeated_experiments() -> None:
    """Prompts of random difficulty, eight samples each: the spread of the mean over 3,000 experiments is the mean error."""
    generator = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(3000):
        difficulty = generator.beta(0.5, 0.5, 40)
        correct = generator.random((40, 8)) < difficulty[:, None]
        found = figure([of(correct.astype(float).tolist())])
        values.append(found.value)
        errors.append(found.se)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.04)
    inside = np.mean([abs(v - 0.5) <= 1.96 * e for v, e in zip(values, errors, strict=True)])
    assert 0.92 < inside < 0.97


def test_a_paired_difference_is_that_of_the_differences() -> None:
    one, other = [1, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0, 0, 1]
    found = difference([(of([[x] for x in one]), of([[x] for x in other]))])
    apart = [a - b for a, b in zip(one, other, strict=True)]
    assert found.value == pytest.approx(statistics.mean(apart))
    assert found.se == pytest.approx(statistics.stdev(apart) / math.sqrt(8), rel=1e-12)
    unpaired = math.hypot(figure([of([[x] for x in one])]).se, figure([of([[x] for x in other])]).se)
    assert found.se < unpaired and not found.told_apart
    low, high = found.interval
    assert (low, high) == (
        pytest.approx(0.25 - 1.96 * found.se, abs=1e-4),
        pytest.approx(0.25 + 1.96 * found.se, abs=1e-4),
    )


def test_only_shared_prompts_are_compared() -> None:
    one = Sums(("a", "b", "c"), np.array([1.0, 0.0, 1.0]), np.ones(3), 3)
    other = Sums(("c", "d", "a"), np.array([0.0, 1.0, 1.0]), np.ones(3), 3)
    found = difference([(one, other)])
    assert (found.value, found.prompts) == (0.5, 2) and found.se == pytest.approx(0.5)
    nothing = difference([(one, Sums(("x",), np.ones(1), np.ones(1), 1))])
    assert (nothing.value, nothing.se, nothing.told_apart) == (None, None, False)


def test_over_seeds_the_spread_of_the_students_is_added() -> None:
    """Two seeds whose students differ by more than their prompts do: the seeds' term dominates."""
    flat = [([[0.5]] * 4, 0.3), ([[0.5]] * 4, -0.1)]
    pairs = [(of([[x[0] + by] for x in values]), of(values)) for values, by in flat]
    found = difference(pairs)
    assert found.value == pytest.approx(0.1)
    assert found.se == pytest.approx(statistics.stdev([0.3, -0.1]) / math.sqrt(2), rel=1e-9)
    assert not found.told_apart, "the seeds disagree about the sign"
    one = figure([of([[1], [0], [1], [0]]), of([[1], [0], [1], [0]])])
    assert one.se == pytest.approx(figure([of([[1], [0], [1], [0]])]).se), "equal seeds add no prompts"


def test_what_is_told_apart() -> None:
    assert Figure(0.1, 0.05, 9, 9).told_apart and Figure(-0.1, 0.05, 9, 9).told_apart
    assert not Figure(0.1, 0.052, 9, 9).told_apart
    assert not Figure(0.0, 0.0, 9, 9).told_apart
    assert not Figure(0.1, None, 1, 1).told_apart


def test_sums_of_rows_leave_out_what_was_not_judged_or_is_not_finite() -> None:
    rows = table(
        row("a", "greedy", correct=True),
        row("b", "greedy", correct=False),
        row("c", "greedy", correct=None),
        row("a", "kl", 0, reverse_kl_sum=2.0, tokens=4, finish_reason="length"),
        row("a", "kl", 1, reverse_kl_sum=None, tokens=9),
        row("b", "kl", 0, reverse_kl_sum=1.0, tokens=2),
        row("b", "kl", 1, reverse_kl_sum=math.nan, tokens=9, finish_reason="length"),
        row("b", "kl", 2, reverse_kl_sum=math.inf, tokens=1),
    )
    found = sums_of(rows)
    assert found.keys() == {"accuracy_greedy", "reverse_kl", "mean_length", "clipped_ratio"}
    errors = errors_of(found)
    assert (errors["accuracy_greedy_n"], errors["reverse_kl_n"], errors["mean_length_n"]) == (2, 2, 5)
    assert (errors["mean_length_prompts"], errors["reverse_kl_se"]) == (2, 0.0)
    assert errors["accuracy_greedy_se"] == pytest.approx(0.5)
    assert found["clipped_ratio"].value == pytest.approx(2 / 5) and found["mean_length"].value == 5
    assert figure([sums_of(table(row("a", "greedy", correct=True)))["accuracy_greedy"]]) == Figure(1.0, None, 1, 1)
    assert sums_of(table()) == {}
