"""A plugin that brings two divergences: one that is right, and one whose advantage forgets that the student moves u."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from opdflow.plugin import Divergence, register


@register
class Triangular(Divergence):
    """sum (p-q)^2 / (p+q); f(u) = (u-1)^2 / (u+1), w(u) = (u-1) (3u+1) / (u+1)^2."""

    kind: Literal["triangular"] = "triangular"
    equation = "sum (p-q)^2 / (p+q)"
    paper = "none"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()) * ((log_p - log_q) / 2).tanh()

    def f(self, log_u: Tensor) -> Tensor:
        return log_u.expm1() * (log_u / 2).tanh()

    def w(self, log_u: Tensor) -> Tensor:
        return (log_u / 2).tanh() * (1 + 2 * log_u.sigmoid())


@register
class Crooked(Triangular):
    """The same with the stop-gradient advantage."""

    kind: Literal["crooked"] = "crooked"

    def w(self, log_u: Tensor) -> Tensor:
        return -self.f(log_u)
