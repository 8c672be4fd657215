"""The reward of an f-divergence, taken for constant."""

from __future__ import annotations

from typing import Literal

from tasks.losses.credit import Credit, CreditContext, CreditTerms, register
from tasks.losses.divergences import Divergence


@register
class StopGradient(Credit):
    """The reward -f(u) taken for constant, as is usual; biased unless f is the reverse KL's (2606.01039).

    It is centred as it is: f(1) = 0 for every divergence."""

    kind: Literal["stop_gradient"] = "stop_gradient"
    equation = "delta = -f(u)"
    paper = "2606.01039"
    sampled_only = False
    tokenwise = True

    def of(self, divergence: Divergence) -> str:
        return f"delta = -({divergence.f_equation})"

    def __call__(self, context: CreditContext) -> CreditTerms:
        return CreditTerms(delta=-context.divergence.f(context.log_u))
