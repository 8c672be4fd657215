"""Products with a large head are those of torch.mm, to rounding; with a small one to the bit."""

from __future__ import annotations

import pytest
import torch

from tasks.losses.products import LARGE, hidden_gradient, logits_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [LARGE - 1, LARGE, LARGE + 13])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_products_are_exact_to_rounding(dtype: torch.dtype, rows: int, tokens: int) -> None:
    torch.manual_seed(0)
    hidden, weight, gradient = torch.randn(tokens, 24), torch.randn(rows, 24), torch.randn(tokens, rows)
    hidden, weight, gradient = (value.to(dtype) for value in (hidden, weight, gradient))
    tolerance = 8 * torch.finfo(dtype).eps
    for found, left, right in (
        (logits_of(hidden, weight), hidden, weight.t()),
        (hidden_gradient(gradient, weight), gradient, weight),
    ):
        exact = left.double() @ right.double()
        largest = left.double().abs() @ right.double().abs()
        assert found.dtype == dtype and found.is_contiguous() and found.shape == exact.shape
        assert ((found.double() - exact).abs() <= tolerance * largest).all()
        if rows < LARGE:
            assert torch.equal(found, left @ right)


def test_a_column_of_a_transposed_or_sliced_matrix_is_no_matter() -> None:
    torch.manual_seed(1)
    weight = torch.randn(24, LARGE).t()
    hidden = torch.randn(50, 24)[7:16]
    torch.testing.assert_close(logits_of(hidden, weight), hidden @ weight.t(), rtol=1e-5, atol=1e-5)
    gradient = torch.randn(LARGE, 9).t()
    torch.testing.assert_close(hidden_gradient(gradient, weight), gradient @ weight, rtol=1e-4, atol=1e-3)
