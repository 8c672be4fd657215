"""Divergences between student p and teacher q, one registered class each: parameters, terms, f and advantage.

Every one is an f-divergence in the form `D = sum_v p_v f(u_v)`, `u = q / p`. The class is its own configuration
(torch is never imported here: the methods use those of the tensors they are given), so adding a divergence is adding
one class:

    @register
    class Mine(Divergence):
        kind: Literal["mine"] = "mine"
        ...

`terms` is what the direct estimator sums and back-propagates, over categories in log space. `f` and `w` serve the
policy gradient: minimising `E_{y~p} f(u)` has the unbiased advantage `w_f(u) = -f(u) + u f'(u)` (OPD+, arXiv
2606.01039), where the usual stop-gradient reward is `-f(u)`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from tasks.losses.registry import Kind, Registry

if TYPE_CHECKING:
    from torch import Tensor

ALPHA_BOUNDS = (-2.0, 3.0)
"""Outside of these u^alpha overflows float32 at the default clamp of log-probabilities."""
ALPHA_FROM_A_LIMIT = 1e-3
"""Closer to 0 or 1 the order cannot be distinguished from its limit, and 1 / alpha overflows float32."""


LARGEST_EXPONENT = 80.0
"""Largest x of an admitted e^x: float32 overflows at e^88.7, and sums and factors (x itself, 1 / alpha) need a margin."""


class Divergence(Kind):
    """A divergence; zero where p = q, non-negative between distributions over the same categories."""

    f_equation: ClassVar[str] = ""
    w_equation: ClassVar[str] = ""
    """the unbiased advantage of minimising E f(u)"""

    @property
    def growth(self) -> float:
        """c such that neither terms nor their gradients exceed e^(c x) by much, where log p and log q lie in [-x, 0]."""
        return 1.0

    @property
    def advantage_growth(self) -> float:
        """c such that neither |f| nor |w| exceeds e^(c x) by much, where |log u| <= x. Configs keep both in float32."""
        return 1.0

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """One term per category, of the shape of the inputs. Both inputs are finite; the caller sums the valid ones."""

    @abstractmethod
    def f(self, log_u: Tensor) -> Tensor:
        """f(u) elementwise, from log u (finite)."""

    @abstractmethod
    def w(self, log_u: Tensor) -> Tensor:
        """w_f(u) = -f(u) + u f'(u) elementwise, from log u (finite)."""

    @property
    def w_at_one(self) -> float:
        """w_f(1): the constant that centring subtracts.

        Its sign says what an unnormalised sum over a support (`drop`) does at p = q: the derivative of `p f(q/p)` with
        respect to p is -w_f, so a negative value pushes student mass off the support, without end."""
        return 0.0


def fields_of(divergence: Divergence) -> str:
    """A divergence and its fields, in words."""
    return ", ".join(f"{name} {value}" for name, value in divergence)


def tenths(limit: float) -> float:
    """A limit, rounded down to tenths."""
    return math.floor(limit * 10) / 10


def refuse_overflow(divergence: Divergence, **floors: float) -> None:
    """ValueError for a floor of log-probabilities, by its field's name, at which a term exceeds float32."""
    for name, floor in floors.items():
        if divergence.growth * -floor > LARGEST_EXPONENT:
            raise ValueError(
                f"{name}: at {floor:g} a term of {fields_of(divergence)} reaches"
                f" e^{divergence.growth * -floor:g}, which float32 cannot hold; use"
                f" {-tenths(LARGEST_EXPONENT / divergence.growth):g} or more"
            )


DIVERGENCES: Registry[Divergence] = Registry("divergence")
REGISTRY = DIVERGENCES.classes
register = DIVERGENCES.register


def _log_mixture(share: float, log_u: Tensor) -> Tensor:
    """log(share u + 1 - share), zero at u = 1; expanded on the side on which 1 + x >= 1/2, so finite for any share."""
    if share <= 0.5:
        return (share * log_u.expm1()).log1p()
    return log_u + ((1 - share) * (-log_u).expm1()).log1p()


@register
class ReverseKL(Divergence):
    """Reverse KL, KL(p||q): mode-seeking, the usual choice on-policy. f(u) = -ln u, w(u) = ln u - 1 (2306.13649)."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    equation = "sum p log(p/q)"
    f_equation = "-ln u"
    w_equation = "ln u - 1"
    paper = "2306.13649"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.exp() * (log_p - log_q)

    def f(self, log_u: Tensor) -> Tensor:
        return -log_u

    def w(self, log_u: Tensor) -> Tensor:
        return log_u - 1

    @property
    def w_at_one(self) -> float:
        return -1.0


@register
class ForwardKL(Divergence):
    """Forward KL, KL(q||p): mass-covering. f(u) = u ln u, w(u) = u (2306.13649)."""

    kind: Literal["forward_kl"] = "forward_kl"
    equation = "sum q log(q/p)"
    f_equation = "u ln u"
    w_equation = "u"
    paper = "2306.13649"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * (log_q - log_p)

    def f(self, log_u: Tensor) -> Tensor:
        return log_u.exp() * log_u

    def w(self, log_u: Tensor) -> Tensor:
        return log_u.exp()

    @property
    def w_at_one(self) -> float:
        return 1.0


@register
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence of GKD, between forward and reverse KL (2306.13649).

    beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p. beta = 0 is defined as forward KL and beta = 1 as
    reverse KL (the divergence itself vanishes there), as TRL's `beta`. f(u) = beta u ln(u/m) - (1-beta) ln m and
    w(u) = (1-beta) ln m with m = beta u + 1 - beta; at beta = 1/2 these are OPD+'s (2606.01039)."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, ge=0, le=1, description="weight of the teacher in the mixture; 0 forward KL, 1 reverse KL")
    equation = "beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p"
    f_equation = "beta u ln(u/m) - (1-beta) ln m, m = beta u + 1 - beta"
    w_equation = "(1-beta) ln(beta u + 1 - beta)"
    paper = "2306.13649"

    def _end(self) -> Divergence | None:
        return ForwardKL() if self.beta == 0 else ReverseKL() if self.beta == 1 else None

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        end = self._end()
        if end is not None:
            return end.terms(log_p, log_q)
        log_m = (log_q + math.log(self.beta)).logaddexp(log_p + math.log1p(-self.beta))
        of_q = log_q.exp() * (log_q - log_m)
        of_p = log_p.exp() * (log_p - log_m)
        return self.beta * of_q + (1 - self.beta) * of_p

    def f(self, log_u: Tensor) -> Tensor:
        end = self._end()
        if end is not None:
            return end.f(log_u)
        log_m = self._log_m(log_u)
        return self.beta * log_u.exp() * (log_u - log_m) - (1 - self.beta) * log_m

    def w(self, log_u: Tensor) -> Tensor:
        end = self._end()
        return end.w(log_u) if end is not None else (1 - self.beta) * self._log_m(log_u)

    def _log_m(self, log_u: Tensor) -> Tensor:
        return _log_mixture(self.beta, log_u)

    @property
    def w_at_one(self) -> float:
        end = self._end()
        return end.w_at_one if end is not None else 0.0


@register
class SkewedForwardKL(Divergence):
    """Skewed forward KL of DistiLLM: forward KL to a mixture that holds a little of the teacher (2402.03898).

    KL(q || m), m = alpha q + (1-alpha) p. f(u) = u ln(u/m), w(u) = (1-alpha) u / m, with m = alpha u + 1 - alpha
    (derived by us)."""

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    alpha: float = Field(0.1, gt=0, lt=1, description="share of the teacher in the mixture")
    equation = "sum q log(q/m), m = alpha q + (1-alpha) p"
    f_equation = "u ln(u/m), m = alpha u + 1 - alpha"
    w_equation = "(1-alpha) u / m"
    paper = "2402.03898"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = (log_q + math.log(self.alpha)).logaddexp(log_p + math.log1p(-self.alpha))
        return log_q.exp() * (log_q - log_m)

    def f(self, log_u: Tensor) -> Tensor:
        return log_u.exp() * (log_u - self._log_m(log_u))

    def w(self, log_u: Tensor) -> Tensor:
        return (1 - self.alpha) * (log_u - self._log_m(log_u)).exp()

    def _log_m(self, log_u: Tensor) -> Tensor:
        return _log_mixture(self.alpha, log_u)

    @property
    def w_at_one(self) -> float:
        return 1 - self.alpha


@register
class SkewedReverseKL(Divergence):
    """Skewed reverse KL of DistiLLM: reverse KL to a mixture that holds a little of the student (2402.03898).

    KL(p || m), m = (1-alpha) q + alpha p. f(u) = -ln m, w(u) = ln m - (1-alpha) u / m, with m = (1-alpha) u + alpha
    (derived by us)."""

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: float = Field(0.1, gt=0, lt=1, description="share of the student in the mixture")
    equation = "sum p log(p/m), m = (1-alpha) q + alpha p"
    f_equation = "-ln m, m = (1-alpha) u + alpha"
    w_equation = "ln m - (1-alpha) u / m"
    paper = "2402.03898"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = (log_q + math.log1p(-self.alpha)).logaddexp(log_p + math.log(self.alpha))
        return log_p.exp() * (log_p - log_m)

    def f(self, log_u: Tensor) -> Tensor:
        return -self._log_m(log_u)

    def w(self, log_u: Tensor) -> Tensor:
        log_m = self._log_m(log_u)
        return log_m - (1 - self.alpha) * (log_u - log_m).exp()

    def _log_m(self, log_u: Tensor) -> Tensor:
        return _log_mixture(1 - self.alpha, log_u)

    @property
    def w_at_one(self) -> float:
        return self.alpha - 1


@register
class Alpha(Divergence):
    """Alpha divergence, the family between and beyond the two KLs. w(u) = (u^a - 1) / a (2606.01039).

    Forward KL as a -> 1, reverse KL as a -> 0."""

    kind: Literal["alpha"] = "alpha"
    alpha: float = Field(
        0.5, ge=ALPHA_BOUNDS[0], le=ALPHA_BOUNDS[1], description="order; at least 0.001 from 0 and from 1"
    )
    equation = "sum p (u^alpha - alpha u - (1-alpha)) / (alpha (alpha-1)), u = q/p"
    f_equation = "(u^alpha - alpha u - (1-alpha)) / (alpha (alpha-1))"
    w_equation = "(u^alpha - 1) / alpha"
    paper = "2606.01039"

    @field_validator("alpha")
    @classmethod
    def _not_a_limit(cls, value: float) -> float:
        if min(abs(value), abs(value - 1)) < ALPHA_FROM_A_LIMIT * (1 - 1e-9):  # 1.001 - 1 is a little less
            raise ValueError(
                f"{value:g} is nearer than {ALPHA_FROM_A_LIMIT:g} to 0 or 1, where the formula divides by alpha (alpha-1);"
                " use kind: reverse_kl for 0, forward_kl for 1"
            )
        return value

    @property
    def growth(self) -> float:
        return max(self.alpha - 1, -self.alpha, 0.0)

    @property
    def advantage_growth(self) -> float:
        return max(abs(self.alpha), 1.0)

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.alpha < 0.5:
            return log_p.exp() * _alpha_f(self.alpha, log_q - log_p)
        return log_q.exp() * _alpha_f(1 - self.alpha, log_p - log_q)  # p f_a(q/p) = q f_(1-a)(p/q)

    def f(self, log_u: Tensor) -> Tensor:
        if self.alpha < 0.5:
            return _alpha_f(self.alpha, log_u)
        return log_u.exp() * _alpha_f(1 - self.alpha, -log_u)

    def w(self, log_u: Tensor) -> Tensor:
        return (self.alpha * log_u).expm1() / self.alpha


def _alpha_f(a: float, log_u: Tensor) -> Tensor:
    """(u^a - a u - (1-a)) / (a (a-1)) for a < 1/2, without avoidable cancellation: the usual form loses every digit in
    float32 near a = 0."""
    return ((a * log_u).expm1() / a - log_u.expm1()) / (a - 1)


@register
class PearsonChi2(Divergence):
    """Pearson's chi squared, sum p (u-1)^2: penalises missing student mass. w(u) = u^2 - 1 (2606.01039)."""

    kind: Literal["pearson_chi2"] = "pearson_chi2"
    equation = "sum p (q/p - 1)^2"
    f_equation = "(u-1)^2"
    w_equation = "u^2 - 1"
    paper = "2606.01039"

    @property
    def growth(self) -> float:
        return 1.5  # on the way to the gradient, which itself grows as e^x

    @property
    def advantage_growth(self) -> float:
        return 2.0

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ((log_p / 2).exp() * (log_q - log_p).expm1()) ** 2

    def f(self, log_u: Tensor) -> Tensor:
        return log_u.expm1() ** 2

    def w(self, log_u: Tensor) -> Tensor:
        return (2 * log_u).expm1()


@register
class NeymanChi2(Divergence):
    """Neyman's chi squared, sum q (p/q-1)^2: penalises student mass where the teacher has little. w(u) = 2 - 2/u (2606.01039)."""

    kind: Literal["neyman_chi2"] = "neyman_chi2"
    equation = "sum q (p/q - 1)^2"
    f_equation = "(1-u)^2 / u"
    w_equation = "2 - 2/u"
    paper = "2606.01039"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ((log_q / 2).exp() * (log_p - log_q).expm1()) ** 2

    def f(self, log_u: Tensor) -> Tensor:
        return log_u.exp() * (-log_u).expm1() ** 2

    def w(self, log_u: Tensor) -> Tensor:
        return -2 * (-log_u).expm1()


@register
class SquaredHellinger(Divergence):
    """Squared Hellinger distance, sum p (sqrt(u)-1)^2: symmetric and bounded. w(u) = sqrt(u) - 1 (2606.01039)."""

    kind: Literal["squared_hellinger"] = "squared_hellinger"
    equation = "sum (sqrt(q) - sqrt(p))^2"
    f_equation = "(sqrt(u) - 1)^2"
    w_equation = "sqrt(u) - 1"
    paper = "2606.01039"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ((log_q / 2).exp() - (log_p / 2).exp()) ** 2

    def f(self, log_u: Tensor) -> Tensor:
        return (log_u / 2).expm1() ** 2

    def w(self, log_u: Tensor) -> Tensor:
        return (log_u / 2).expm1()


@register
class TotalVariation(Divergence):
    """Total variation, 1/2 sum |p - q|: bounded, insensitive to small probabilities. w(u) = 1/2 sign(u-1) (2606.01039).

    Its gradient at p = q is taken as zero."""

    kind: Literal["total_variation"] = "total_variation"
    equation = "1/2 sum |p - q|"
    f_equation = "1/2 |u-1|"
    w_equation = "1/2 sign(u-1)"
    paper = "2606.01039"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2

    def f(self, log_u: Tensor) -> Tensor:
        return log_u.expm1().abs() / 2

    def w(self, log_u: Tensor) -> Tensor:
        return log_u.sign() / 2
