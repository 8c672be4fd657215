"""Log-masses: accurate where 1 - sum cancels, floored where nothing is left, and without gradient at the floor."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from tasks.losses.support import Categories, categories, listed_mask, log1mexp, masked_logsumexp

INFINITY = float("inf")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def exact(x: float) -> float:
    """log(1 - exp(x)) to sixty digits."""
    with localcontext() as context:
        context.prec = 60
        return float((1 - Decimal(x).exp()).ln())


@dtypes
def test_log1mexp_is_accurate_near_zero_and_far_from_it(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e-9, -1e-6, -1e-3, -0.1, -0.69, -0.7, -1.0, -5.0, -16.0, -30.0, -60.0], dtype=dtype)
    x.requires_grad_()
    found = log1mexp(x, -80.0)
    wanted = torch.tensor([exact(float(value)) for value in x.detach()], dtype=dtype)
    precision = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.detach(), wanted, rtol=precision, atol=0)
    (grad,) = torch.autograd.grad(found.sum(), x)
    slope = torch.tensor([-1 / math.expm1(-float(value)) for value in x.detach()], dtype=dtype)
    torch.testing.assert_close(grad, slope, rtol=4 * precision, atol=0)


@dtypes
@pytest.mark.parametrize("x", [0.0, -1e-20, 1e-7, 0.5])
def test_log1mexp_stops_at_its_floor(dtype: torch.dtype, x: float) -> None:
    """Also where rounding made a mass a little larger than one."""
    mass = torch.tensor([x], dtype=dtype, requires_grad=True)
    found = log1mexp(mass, -30.0)
    (grad,) = torch.autograd.grad(found.sum(), mass)
    assert -30.0 <= float(found.detach()) < -29.9
    assert float(grad) == 0


def test_log1mexp_of_no_mass_is_zero() -> None:
    mass = torch.tensor([-INFINITY], requires_grad=True)
    found = log1mexp(mass, -30.0)
    (grad,) = torch.autograd.grad(found.sum(), mass)
    assert float(found.detach()) == float(grad) == 0


def test_lists_are_as_long_as_they_say() -> None:
    listed = listed_mask(torch.zeros(3, 4, dtype=torch.int64), torch.tensor([0, 3, 4]))
    assert listed.tolist() == [[False] * 4, [True] * 3 + [False], [True] * 4]


def test_padding_adds_nothing_whatever_its_term() -> None:
    valid = torch.tensor([[True, True, False], [False, False, False]])
    compared = Categories(torch.zeros(2, 3), torch.zeros(2, 3), valid)
    assert compared.sum(torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])).tolist() == [3.0, 0.0]


def test_mass_of_an_empty_list_is_low_and_without_gradient() -> None:
    scores = torch.tensor([[-1.0, -INFINITY, 0.5], [1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    found = masked_logsumexp(scores, mask)
    (grad,) = torch.autograd.grad(found.sum(), scores)
    assert float(found[0].detach()) == pytest.approx(-1.0) and float(found[1].detach()) < -1e30
    assert grad.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_floors_hold_each_for_its_own() -> None:
    """Categories stop at `logprob_min`, the bucket at `tail_logmass_min`, of student and teacher alike."""
    student = torch.tensor([[0.0, -50.0, -2.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-60.0, 0.0, -3.0]], dtype=torch.float64)
    far = torch.tensor([-200.0], dtype=torch.float64, requires_grad=True)
    found = categories(
        student,
        teacher,
        torch.ones(1, 3, dtype=torch.bool),
        torch.ones(1, dtype=torch.bool),
        outside="bucket",
        logprob_min=-10.0,
        tail_logmass_min=-20.0,
        student_tail_N=far,
        teacher_tail_N=far.detach(),
    )
    assert found.log_p_NC.tolist() == [[0.0, -10.0, -2.0, -20.0]]
    assert found.log_q_NC.tolist() == [[-10.0, 0.0, -3.0, -20.0]]
    grads = torch.autograd.grad(found.log_p_NC.sum(), (student, far))
    assert grads[0].tolist() == [[1.0, 0.0, 1.0]] and grads[1].tolist() == [0.0]
