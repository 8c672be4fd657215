"""The unbiased advantage of an f-divergence."""

from __future__ import annotations

from typing import Literal

from tasks.losses.credit import Credit, CreditContext, CreditTerms, register
from tasks.losses.divergences import Divergence


@register
class OpdPlus(Credit):
    """The unbiased advantage of minimising E f(u), where the student moves u as well; OPD+, 2606.01039.

    With reverse KL and `center: true` this is log u: sampled-token OPD."""

    kind: Literal["opd_plus"] = "opd_plus"
    equation = "delta = w_f(u) = -f(u) + u f'(u)"
    paper = "2606.01039"
    exact_samples = True
    sampled_only = False
    tokenwise = True

    def delta_at_one(self, divergence: Divergence) -> float:
        return divergence.w_at_one

    def of(self, divergence: Divergence) -> str:
        return f"delta = {divergence.w_equation}"

    def __call__(self, context: CreditContext) -> CreditTerms:
        return CreditTerms(delta=context.divergence.w(context.log_u))
