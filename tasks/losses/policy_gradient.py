"""The policy-gradient estimator: an advantage of the sampled token times its importance ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.losses.config import PolicyGradientConfig
from tasks.losses.divergences import Divergence
from tasks.losses.metrics import difference, sampled_metrics
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch, lowest, required, working


@torch.no_grad()
def advantage(divergence: Divergence, log_u_N: Tensor, *, unbiased: bool, center: bool) -> Tensor:
    """A(y) from log u = log q(y) - log p(y); OPD+, arXiv 2606.01039.

    unbiased: w_f(u) = -f(u) + u f'(u), the advantage of minimising E f(u) where the student moves u as well; else
    -f(u). center subtracts its value at u = 1, which changes no expected gradient under exact sampling."""
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
    """per_token = -sg(A(y)) rho; A = w_f(u), centred (OPD+, 2606.01039), by default A = log u: sampled-token OPD.

    log u is clipped, and taken from the live student or from the rollout's (`advantage_at`)."""

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config
        self.needs = config.needs()

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """Needs the sampled token's log-probability under teacher, rollout-time student and live student."""
        config = self.config
        out = batch.loss_mask_N <= 0
        live = required(student.token_logprobs_N, "student.token_logprobs_N").masked_fill(out, 0)
        old = required(batch.student_logprobs_N, "batch.student_logprobs_N").masked_fill(out, 0)
        teacher = required(batch.teacher_logprobs_N, "batch.teacher_logprobs_N").masked_fill(out, 0)
        raw_log_u = difference(teacher, live.detach() if config.advantage_at == "live" else old)
        log_u = raw_log_u.clamp(-config.log_ratio_clip, config.log_ratio_clip)
        a = advantage(config.divergence, log_u, unbiased=config.advantage == "opd_plus", center=config.center)
        loss, clipped = surrogate(
            a,
            live,
            old,
            ppo_clip=config.ppo_clip,
            dual_clip=config.dual_clip,
            log_rho_clip=config.log_rho_clip,
        )
        metrics = sampled_metrics(batch, observed or student)
        metrics.setdefault("log_ratio_mean", difference(live.detach(), old))
        metrics["reverse_kl"] = difference(live.detach(), teacher).clamp(-config.log_ratio_clip, config.log_ratio_clip)
        if config.ppo_clip is not None:
            metrics["clip_fraction"] = clipped
        return ObjectiveOutput(
            loss.masked_fill(out, 0), {name: value.masked_fill(out, 0) for name, value in metrics.items()}
        )
