"""The policy-gradient estimator: advantage times importance ratio, of the sampled token or of a list of candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.losses.axes import StudentCandidates
from tasks.losses.config import DirectConfig, PolicyGradientConfig
from tasks.losses.direct import DirectObjective
from tasks.losses.divergences import Divergence
from tasks.losses.metrics import difference, sampled_metrics, support_metrics
from tasks.losses.support import listed_mask
from tasks.losses.trust_regions import Evidence, TermWeights
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch, lowest, required, working
from tasks.losses.weighting import weighted


@torch.no_grad()
def advantage(divergence: Divergence, log_u_N: Tensor, *, unbiased: bool, center: bool) -> Tensor:
    """A(y) from log u = log q(y) - log p(y); OPD+, arXiv 2606.01039.

    unbiased: w_f(u) = -f(u) + u f'(u), the advantage of minimising E f(u) where the student moves u as well; else
    -f(u). center subtracts its value at u = 1, which changes no expected gradient of exactly sampled tokens without a
    ratio clip or a trust region."""
    if unbiased:
        return divergence.w(log_u_N) - (divergence.w_at_one if center else 0.0)
    return -divergence.f(log_u_N)  # f(1) = 0 for every divergence: centred as it is


def surrogate(
    advantage_N: Tensor,
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    *,
    ppo_clip: float | None,
    dual_clip: float | None,
    log_rho_clip: float,
) -> tuple[Tensor, Tensor]:
    """(-sg(A) rho, 1 where a clip holds), rho = exp(log p - sg(log p_old)).

    With ppo_clip e (1707.06347): -min(rho A, clip(rho, 1-e, 1+e) A). With dual_clip c (1912.09729): where A < 0 not
    above c |A|. A clipped token has no gradient."""
    a = advantage_N.detach()
    p, p_old = working(logprobs_N), working(old_logprobs_N).detach()
    log_rho = (p.clamp(min=lowest(p)) - p_old.clamp(min=lowest(p_old))).clamp(-log_rho_clip, log_rho_clip)
    rho = log_rho.exp()
    loss = -a * rho
    clipped = torch.zeros_like(loss, dtype=torch.bool)
    if ppo_clip is not None:
        bounded = -a * rho.clamp(1 - ppo_clip, 1 + ppo_clip)
        clipped = bounded > loss
        loss = torch.where(clipped, bounded, loss)
    if dual_clip is not None:
        most = -a * dual_clip
        over = (a < 0) & (loss > most)
        loss, clipped = torch.where(over, most, loss), clipped | over
    return loss, clipped.to(loss.dtype).detach()


class PolicyGradientObjective:
    """per_token = -sg(A) rho; A = w_f(u), centred (OPD+, 2606.01039), by default A = log u: sampled-token OPD.

    log u is clipped, and taken from the live student or from the rollout's (`advantage_at`). A trust region may reshape
    log u, bound A, and weigh the policy gradient against terms of its own (`trust_regions.py`)."""

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config
        self.needs = config.needs()
        self._side = None if config.side is None else DirectObjective(config.side)

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """Needs the log-probabilities of the sampled token, or of the candidates, under teacher, rollout-time student
        and live student."""
        listed = self.config.support.kind == "student_topk"
        loss, divergence, metrics = (self._of_candidates if listed else self._of_sampled)(batch, student)
        view, out = observed or student, batch.loss_mask_N <= 0
        metrics |= sampled_metrics(batch, view)
        if batch.support_ids_NK is not None:
            floors = self.config.side or DirectConfig.model_validate({})
            metrics |= support_metrics(batch, view, (), floors.logprob_min, floors.tail_logmass_min)
        loss = weighted(loss, self.config.token_weight, batch, divergence)
        return ObjectiveOutput(
            loss.masked_fill(out, 0), {name: value.masked_fill(out, 0) for name, value in metrics.items()}
        )

    def _of_sampled(self, batch: TokenBatch, student: StudentView) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss, how far apart the models are, metrics), per token."""
        region, out = self.config.trust_region, batch.loss_mask_N <= 0
        live = required(student.token_logprobs_N, "student.token_logprobs_N").masked_fill(out, 0)
        old = required(batch.student_logprobs_N, "batch.student_logprobs_N").masked_fill(out, 0)
        teacher = required(batch.teacher_logprobs_N, "batch.teacher_logprobs_N").masked_fill(out, 0)
        at_live, at_rollout = difference(teacher, live.detach()), difference(teacher, old)
        weights = region.weigh(
            Evidence(
                log_u_rollout_N=at_rollout,
                log_u_live_N=at_live,
                teacher_entropy_N=_harmless(batch.teacher_entropy_N, out),
                uniform_N=_harmless(batch.uniform_N, out),
                teacher_prefix_N=_harmless(batch.teacher_prefix_N, out),
            )
        )
        log_u = at_live if self.config.advantage_at == "live" else at_rollout
        a, replaced = self._advantage(log_u, weights)
        loss, clipped = self._surrogate(a, live, old)
        bounded = at_live.clamp(-self.config.log_ratio_clip, self.config.log_ratio_clip)
        divergence = bounded.expm1() - bounded
        metrics = {"log_ratio_mean": difference(live.detach(), old), "reverse_kl": -bounded}
        if self.config.ppo_clip is not None:
            metrics["clip_fraction"] = clipped
        if replaced is not None:
            metrics["outlier_fraction"] = replaced
        if weights is None:
            return loss, divergence, metrics
        metrics["outlier_fraction"] = weights.outside_N
        loss = weights.trusted_N * loss
        if weights.outlier_N is not None and self._side is not None:
            loss = loss + weights.outlier_N * self._side(batch, student).per_token_N
        if weights.likelihood_N is not None:
            loss = loss - weights.likelihood_N * live.clamp(min=lowest(live))
        return loss, divergence, metrics

    def _of_candidates(self, batch: TokenBatch, student: StudentView) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same of sum_v sg(w_v) (-sg(A_v)) rho_v over the rollout-time student's K likeliest ids v."""
        ids = required(batch.support_ids_NK, "batch.support_ids_NK")
        listed = listed_mask(ids, required(batch.support_valid_N, "batch.support_valid_N"))
        listed &= (batch.loss_mask_N > 0).unsqueeze(-1)
        live, old, teacher = (
            required(values, what).masked_fill(~listed, 0)
            for values, what in (
                (student.support_logprobs_NK, "student.support_logprobs_NK"),
                (batch.student_support_logprobs_NK, "batch.student_support_logprobs_NK"),
                (batch.teacher_support_logprobs_NK, "batch.teacher_support_logprobs_NK"),
            )
        )
        required(student.log_normaliser_N, "student.log_normaliser_N (scores normalised over the vocabulary)")
        log_u = difference(teacher, live.detach() if self.config.advantage_at == "live" else old)
        support = self.config.support
        assert isinstance(support, StudentCandidates)
        weigher = live.detach() if support.weights_at == "live" else old
        weights = _over(weigher, listed).exp().masked_fill(~listed, 0)

        def mean(values_NK: Tensor) -> Tensor:
            return (weights * values_NK).sum(-1)

        a, replaced = self._advantage(log_u, None)
        if support.baseline == "list":
            a = a - mean(a).unsqueeze(-1)
        loss, clipped = self._surrogate(a, live, old)
        metrics: dict[str, Tensor] = {}
        if self.config.ppo_clip is not None:
            metrics["clip_fraction"] = mean(clipped)
        if replaced is not None:
            metrics["outlier_fraction"] = mean(replaced)
        return mean(loss), mean(_over(weigher, listed) - _over(teacher, listed)), metrics

    def _advantage(self, log_u: Tensor, weights: TermWeights | None) -> tuple[Tensor, Tensor | None]:
        """(A, 1 where the trust region replaced it or null where it replaces nothing), elementwise."""
        config, region = self.config, self.config.trust_region
        log_u = region.reshape(log_u).clamp(-config.log_ratio_clip, config.log_ratio_clip)
        whole = advantage(config.divergence, log_u, unbiased=config.advantage == "opd_plus", center=config.center)
        a = region.bound(whole, weights)
        return a, None if a is whole or weights is not None else (a != whole).to(a.dtype)

    def _surrogate(self, a: Tensor, live: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return surrogate(
            a, live, old, ppo_clip=config.ppo_clip, dual_clip=config.dual_clip, log_rho_clip=config.log_rho_clip
        )


def _over(logprobs_NK: Tensor, listed_NK: Tensor) -> Tensor:
    """Log-probabilities renormalised over each list; a very low finite number outside of it."""
    values = working(logprobs_NK)
    floor = lowest(values)
    return values.clamp(min=floor).masked_fill(~listed_NK, floor).log_softmax(-1).clamp(min=floor)


def _harmless(values_N: Tensor | None, out_N: Tensor) -> Tensor | None:
    return None if values_N is None else values_N.detach().masked_fill(out_N, 0)
