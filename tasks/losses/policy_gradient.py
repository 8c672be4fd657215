"""The policy-gradient estimator: advantage times importance ratio, of the sampled token or of a list of candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tasks.losses.axes import StudentCandidates
from tasks.losses.config import DirectConfig, PolicyGradientConfig
from tasks.losses.credit import CreditContext, CreditTerms
from tasks.losses.direct import DirectObjective
from tasks.losses.metrics import difference, sampled_metrics, support_metrics
from tasks.losses.support import listed_mask
from tasks.losses.trust_regions import Evidence, TermWeights
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch, lowest, required, working
from tasks.losses.weighting import weighted


def surrogate(
    advantage_N: Tensor,
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    *,
    ppo_clip: float | tuple[float, float] | None,
    dual_clip: float | None,
    log_rho_clip: float,
) -> tuple[Tensor, Tensor]:
    """(-sg(A) rho, 1 where a clip holds), rho = exp(log p - sg(log p_old)).

    With ppo_clip e (1707.06347): -min(rho A, clip(rho, 1-e, 1+e) A); a pair (2503.14476) is e below and e above. With
    dual_clip c (1912.09729): where A < 0 not above c |A|. A clipped token has no gradient."""
    a = advantage_N.detach()
    p, p_old = working(logprobs_N), working(old_logprobs_N).detach()
    log_rho = (p.clamp(min=lowest(p)) - p_old.clamp(min=lowest(p_old))).clamp(-log_rho_clip, log_rho_clip)
    rho = log_rho.exp()
    loss = -a * rho
    clipped = torch.zeros_like(loss, dtype=torch.bool)
    if ppo_clip is not None:
        low, high = ppo_clip if isinstance(ppo_clip, tuple) else (ppo_clip, ppo_clip)
        bounded = -a * rho.clamp(1 - low, 1 + high)
        clipped = bounded > loss
        loss = torch.where(clipped, bounded, loss)
    if dual_clip is not None:
        most = -a * dual_clip
        over = (a < 0) & (loss > most)
        loss, clipped = torch.where(over, most, loss), clipped | over
    return loss, clipped.to(loss.dtype).detach()


@dataclass(frozen=True)
class _Credited:
    """The credit of tokens (or candidates), with the advantage that the trust region leaves."""

    advantage: Tensor
    """A = m A_r + delta, centred, bounded by the trust region"""
    terms: CreditTerms
    replaced: Tensor | None
    """1 where the trust region replaced the advantage; null where it replaces nothing"""


class PolicyGradientObjective:
    """per_token = a PPO(rho, m A_r + delta) + b w D, with the factors of the credit (`credit/`); by default -sg(log u) rho.

    log u is clipped, and taken from the live student or from the rollout's (`advantage_at`). A trust region may reshape
    log u, bound the advantage, and weigh the policy gradient against terms of its own (`trust_regions.py`)."""

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config
        self.needs = config.needs()
        self.tokenwise = config.advantage.tokenwise
        self._side = None if config.side is None else DirectObjective(config.side)

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """Needs the log-probabilities of the sampled token, or of the candidates, under teacher, rollout-time student
        and live student, and what the credit needs."""
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
        """(loss, estimate of the divergence, metrics), per token."""
        region, out = self.config.trust_region, batch.loss_mask_N <= 0
        live = required(student.token_logprobs_N, "student.token_logprobs_N").masked_fill(out, 0)
        old = required(batch.student_logprobs_N, "batch.student_logprobs_N").masked_fill(out, 0)
        teacher = required(batch.teacher_logprobs_N, "batch.teacher_logprobs_N").masked_fill(out, 0)
        at_live = difference(teacher, live.detach())
        weights = region.weigh(
            Evidence(
                log_u_rollout_N=difference(teacher, old),
                log_u_live_N=at_live,
                teacher_entropy_N=_harmless(batch.teacher_entropy_N, out),
                uniform_N=_harmless(batch.uniform_N, out),
                teacher_prefix_N=_harmless(batch.teacher_prefix_N, out),
            )
        )
        credited = self._credited(batch, live, old, teacher, weights)
        loss, clipped = self._policy_gradient(credited, live, old)
        bounded = at_live.clamp(-self.config.log_ratio_clip, self.config.log_ratio_clip)
        divergence = bounded.expm1() - bounded
        metrics = {"log_ratio_mean": difference(live.detach(), old), "reverse_kl": -bounded}
        if self.config.ppo_clip is not None:
            metrics["clip_fraction"] = clipped
        if credited.replaced is not None:
            metrics["outlier_fraction"] = credited.replaced
        if weights is not None:
            metrics["outlier_fraction"] = weights.outside_N
            loss = weights.trusted_N * loss
            if weights.outlier_N is not None and self._side is not None:
                loss = loss + weights.outlier_N * self._side(batch, student).per_token_N
            if weights.likelihood_N is not None:
                loss = loss - weights.likelihood_N * live.clamp(min=lowest(live))
        b, w = credited.terms.b, credited.terms.w
        if b is not None and self._side is not None:
            loss = loss + (b if w is None else b * w) * self._side(batch, student).per_token_N
        return loss, divergence, metrics

    def _of_candidates(self, batch: TokenBatch, student: StudentView) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same for sum_v sg(w_v) (-sg(A_v)) rho_v over the rollout-time student's K likeliest ids v."""
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
        support = self.config.support
        assert isinstance(support, StudentCandidates)
        weigher = live.detach() if support.weights_at == "live" else old
        weights = _over(weigher, listed).exp().masked_fill(~listed, 0)

        def mean(values_NK: Tensor) -> Tensor:
            return (weights * values_NK).sum(-1)

        credited = self._credited(batch, live, old, teacher, None)
        if support.baseline == "list":
            credited = replace(credited, advantage=credited.advantage - mean(credited.advantage).unsqueeze(-1))
        loss, clipped = self._policy_gradient(credited, live, old)
        metrics: dict[str, Tensor] = {}
        if self.config.ppo_clip is not None:
            metrics["clip_fraction"] = mean(clipped)
        if credited.replaced is not None:
            metrics["outlier_fraction"] = mean(credited.replaced)
        return mean(loss), mean(_over(weigher, listed) - _over(teacher, listed)), metrics

    @torch.no_grad()
    def _credited(
        self, batch: TokenBatch, live: Tensor, old: Tensor, teacher: Tensor, weights: TermWeights | None
    ) -> _Credited:
        """The credit of the tokens [N] or candidates [N, K] that these log-probabilities are of."""
        config, region, credit = self.config, self.config.trust_region, self.config.advantage
        needs, out = self.needs.credit, batch.loss_mask_N <= 0

        def value(name: str, wanted: bool) -> Tensor | None:
            return _harmless(required(getattr(batch, name), f"batch.{name}"), out) if wanted else None

        log_p_live, log_p_rollout, log_q = (_finite(values) for values in (live, old, teacher))
        log_u = log_q - (log_p_live if config.advantage_at == "live" else log_p_rollout)
        context = CreditContext(
            divergence=config.divergence,
            log_u=region.reshape(log_u).clamp(-config.log_ratio_clip, config.log_ratio_clip),
            log_p_live=log_p_live,
            log_p_rollout=log_p_rollout,
            log_q=log_q,
            mask_N=batch.loss_mask_N,
            sample_N=batch.sample_N,
            position_N=batch.position_N,
            segment_N=value("segment_N", bool(needs.segment_ends)),
            teacher_entropy_N=value("teacher_entropy_N", needs.teacher_entropy),
            student_entropy_N=value("student_entropy_N", needs.student_entropy),
            reward_N=value("reward_N", needs.reward),
            group_N=value("group_N", needs.groups),
            group_rewards_NG=value("group_rewards_NG", needs.reward and needs.groups),
            signals={name: values.detach().masked_fill(out, 0) for name, values in (batch.signals or {}).items()},
        )
        terms = credit(context)
        _check_terms(credit.kind, terms, log_u)
        whole = terms.advantage(credit.delta_at_one(config.divergence) if config.center else 0.0)
        if terms.b is not None and credit.side is None:
            raise ValueError(f"advantage {credit.kind}: it gives b, but names no divergence; override `side`")
        bounded = region.bound(whole, weights)
        same = bounded is whole or weights is not None
        return _Credited(bounded, terms, None if same else (bounded != whole).to(bounded.dtype))

    def _policy_gradient(self, credited: _Credited, live: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """(a PPO(rho, A), 1 where a clip holds)."""
        config = self.config
        loss, clipped = surrogate(
            credited.advantage,
            live,
            old,
            ppo_clip=config.ppo_clip,
            dual_clip=config.dual_clip,
            log_rho_clip=config.log_rho_clip,
        )
        return loss if credited.terms.a is None else credited.terms.a * loss, clipped


def _check_terms(kind: str, terms: CreditTerms, log_u: Tensor) -> None:
    """ValueError for a factor of another shape, which would be broadcast, or with numbers that are not finite although those of
    `log_u` are: those of masked tokens would reach the gradient too. (Where the student's own are not, the loss names
    the sample.)"""
    finite = bool(log_u.isfinite().all())
    for name in ("delta", "A_r", "m", "a", "b", "w"):
        values: Tensor | None = getattr(terms, name)
        if values is None:
            continue
        shape = log_u.shape[:1] if name in ("b", "w") else log_u.shape
        if values.shape != shape:
            raise ValueError(
                f"advantage {kind}: it gives {name} of shape {list(values.shape)} for log u of shape"
                f" {list(log_u.shape)}; it must be {list(shape)}"
            )
        if finite and not bool(values.isfinite().all()):
            wrong = int((~values.isfinite()).sum())
            raise ValueError(f"advantage {kind}: {wrong} of the {values.numel()} numbers of its {name} are not finite")


def _over(logprobs_NK: Tensor, listed_NK: Tensor) -> Tensor:
    """Log-probabilities renormalised over each list; a very low finite number outside of it."""
    values = working(logprobs_NK)
    floor = lowest(values)
    return values.clamp(min=floor).masked_fill(~listed_NK, floor).log_softmax(-1).clamp(min=floor)


def _finite(logprobs: Tensor) -> Tensor:
    values = working(logprobs.detach())
    return values.clamp(min=lowest(values))


def _harmless(values: Tensor | None, out_N: Tensor) -> Tensor | None:
    if values is None:
        return None
    return values.detach().masked_fill(out_N if values.dim() == 1 else out_N.unsqueeze(-1), 0)
