"""The solver of trust-region blending: reference values, limits, and properties over arbitrary distributions."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DATA

from tasks.losses import blending
from tasks.losses.blending import acceptance, blend, draw, residual, without

REFERENCE = json.loads(Path(os.environ.get("OPD_REFERENCE", DATA / "objectives.json")).read_text())
INF = float("inf")


def reference_logprobs() -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.tensor(REFERENCE[name], dtype=torch.float64).log_softmax(-1)
        for name in ("student_logits", "teacher_logits")
    )


@pytest.mark.parametrize("case", REFERENCE["trust_region_blending"], ids=lambda case: f"eps{case['epsilon']}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-4)])
def test_it_agrees_with_numbers_made_apart_from_it(case, dtype, tolerance):
    student, teacher = (logprobs.to(dtype) for logprobs in reference_logprobs())
    found = blend(student, teacher, case["epsilon"])
    expected = case["per_position"]
    assert len(expected) == len(student)
    np.testing.assert_allclose(
        found.beta_N, [p["beta"] for p in expected], atol=tolerance * 10 if dtype == torch.float32 else tolerance
    )
    np.testing.assert_allclose(found.logprobs_NV.exp(), [p["mu"] for p in expected], rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.kl_N, [p["kl"] for p in expected], rtol=0, atol=tolerance)


def distributions(rows: int = 3, size: int = 6):
    logits = st.lists(
        st.one_of(st.floats(-8, 8), st.floats(-80, 80), st.just(-INF)), min_size=size, max_size=size
    ).filter(lambda row: max(row) > -INF)
    return st.lists(logits, min_size=rows, max_size=rows).map(lambda x: torch.tensor(x, dtype=torch.float32))


@settings(deadline=None, max_examples=150)
@given(distributions(), distributions(), st.floats(0, 5), st.floats(0, 5), st.booleans())
def test_what_holds_for_every_pair(student_logits, teacher_logits, epsilon, more, double):
    dtype = torch.float64 if double else torch.float32
    student, teacher = (x.to(dtype).log_softmax(-1) for x in (student_logits, teacher_logits))
    found, wider = blend(student, teacher, epsilon), blend(student, teacher, epsilon + more)
    assert bool((found.kl_N.double() <= epsilon).all()) and bool((found.kl_N >= 0).all())
    assert bool(((found.beta_N >= 0) & (found.beta_N <= 1)).all())
    torch.testing.assert_close(found.logprobs_NV.exp().sum(-1), torch.ones(3, dtype=dtype))
    assert bool((wider.beta_N >= found.beta_N - 1e-5).all())
    assert bool((wider.kl_N >= found.kl_N - 1e-4).all())
    mu, p = found.logprobs_NV.double().exp(), student.double().exp()
    spent = torch.where(mu > 0, mu * (found.logprobs_NV.double() - student.double()), 0).sum(-1)
    torch.testing.assert_close(spent, found.kl_N.double(), atol=2e-4, rtol=1e-3)
    # Pinsker: what bounds how often a draft is rejected
    assert bool(((mu - p).abs().sum(-1) / 2 <= math.sqrt(epsilon / 2) + 1e-3).all())


@settings(deadline=None, max_examples=50)
@given(distributions(), distributions())
def test_the_limits_are_exact(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    none = blend(student, teacher, 0)
    assert torch.equal(none.logprobs_NV, student) and not none.beta_N.any() and not none.kl_N.any()
    whole = torch.where(teacher > -INF, teacher.exp() * (teacher - student), 0).sum(-1)
    finite = whole.isfinite()
    everything = blend(student, teacher, float(whole[finite].max()) + 0.01 if finite.any() else 1.0)
    assert torch.equal(everything.logprobs_NV[finite], teacher[finite]) and bool((everything.beta_N[finite] == 1).all())
    same = blend(student, student, 0.01)
    assert torch.equal(same.logprobs_NV, student) and not same.kl_N.any()


def test_distributions_without_a_common_id_give_the_student():
    student = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    teacher = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).log()
    found = blend(student, teacher, 10.0)
    assert torch.equal(found.logprobs_NV, student) and float(found.beta_N) == float(found.kl_N) == 0
    # half of the student's mass is common: any beta above 0 costs log 2
    partly = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).log()
    assert float(blend(student, partly, 0.69).beta_N) == 0
    wide = blend(student, partly, 0.70)
    assert 0.99 < float(wide.beta_N) < 1 and wide.logprobs_NV.exp().tolist() == [[1.0, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="negative"):
        blend(student, teacher, -1e-9)


def test_the_solution_is_the_largest_that_fits():
    student, teacher = (
        torch.randn(200, 50, generator=torch.Generator().manual_seed(seed)).double().mul(3).log_softmax(-1)
        for seed in (1, 2)
    )
    for epsilon in (1e-4, 0.01, 0.3):
        found = blend(student, teacher, epsilon)
        assert bool((found.beta_N < 1).all())
        torch.testing.assert_close(found.kl_N, torch.full_like(found.kl_N, epsilon), rtol=1e-8, atol=0)
        blended = (student + found.beta_N[:, None] * (teacher - student)).log_softmax(-1)
        torch.testing.assert_close(found.logprobs_NV, blended)


@settings(deadline=None, max_examples=50)
@given(distributions(), distributions(), st.floats(1e-3, 2), st.sets(st.integers(0, 7), min_size=1, max_size=4))
def test_ids_that_the_teacher_lacks_are_no_part_of_the_blend(student_logits, teacher_logits, epsilon, lacking):
    """Against the definition, by a scan over b in float64."""
    student, teacher = (x.double().log_softmax(-1) for x in (student_logits, teacher_logits))
    found = blend(student, without(teacher, sorted(lacking)), epsilon)
    assert bool((found.kl_N <= epsilon).all())
    grid = np.linspace(0, 1, 2001)[1:]
    for row in range(len(student)):
        p, q = student[row].exp().numpy(), teacher[row].exp().numpy().copy()
        q[[token for token in lacking if token < len(q)]] = 0
        common = (p > 0) & (q > 0)
        beta, mu = float(found.beta_N[row]), found.logprobs_NV[row].exp().numpy()
        if not common.any():
            assert beta == 0 and np.array_equal(mu, p)
            continue
        logs = (1 - grid[:, None]) * np.log(p[common]) + grid[:, None] * np.log(q[common] / q.sum())
        logs -= np.logaddexp.reduce(logs, axis=1)[:, None]
        spent = (np.exp(logs) * (logs - np.log(p[common]))).sum(1)
        fits = grid[spent <= epsilon]
        # what is left of p costs -log of its mass, however small b is: else the student
        largest = fits[-1] if len(fits) else 0
        assert largest - 1e-9 <= beta <= largest + 1 / 2000 + 1e-9 or math.isclose(spent[0], epsilon, rel_tol=1e-6)
        if beta > 0:
            assert not mu[~common].any()
        else:
            assert np.array_equal(mu, p)


def test_a_teacher_without_the_lacking_ids():
    logprobs = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    torch.testing.assert_close(without(logprobs, [1, 3, 9]).exp(), torch.tensor([[0.25, 0.0, 0.75, 0.0]]))
    assert without(logprobs, []) is logprobs and without(logprobs, [4]) is logprobs
    assert without(logprobs, [0, 1, 2, 3]).tolist() == [[-INF] * 4]
    nothing = blend(logprobs, without(logprobs, [0, 1, 2, 3]), 5.0)
    assert torch.equal(nothing.logprobs_NV, logprobs) and float(nothing.beta_N) == float(nothing.kl_N) == 0


def test_draws_by_a_uniform_number():
    weights = torch.tensor([0.0, 2.0, 0.0, 6.0, 0.0])
    found = [draw(weights, u) for u in (0.0, 0.2499, 0.25, 0.5, 1 - 2**-53)]
    assert found == [1, 1, 3, 3, 3]
    assert acceptance(-INF, -1.0) == 0 and acceptance(-1.0, -INF) == 1 and acceptance(-2.0, -1.0) == math.exp(-1)
    p = torch.tensor([0.5, 0.5]).log()
    torch.testing.assert_close(
        residual(torch.tensor([0.8, 0.2]).log(), p), torch.tensor([0.3, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(residual(p, p), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_the_search_passes_over_the_vocabulary_few_times(monkeypatch):
    """Bisection would take 24 passes: too many at a real vocabulary."""
    calls, at = [], blending._at
    monkeypatch.setattr(blending, "_at", lambda *arguments: calls.append(1) or at(*arguments))
    generator = torch.Generator().manual_seed(0)
    student, other = (torch.randn(32, 20_000, generator=generator).mul(2.5) for _ in range(2))
    teacher = (0.6 * student + other).log_softmax(-1)
    for epsilon in (1e-4, 0.01, 0.05, 0.5):
        calls.clear()
        found = blend(student.log_softmax(-1), teacher, epsilon)
        assert 0.99 * epsilon <= float(found.kl_N.min()) and float(found.kl_N.max()) <= epsilon
        assert len(calls) <= 8
