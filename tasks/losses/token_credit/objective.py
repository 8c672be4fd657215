"""Rewards and token credit: the loss of a micro-batch, from what its step's plan knows and the live student."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tasks.losses.metrics import difference, sampled_metrics, support_metrics
from tasks.losses.policy_gradient import surrogate
from tasks.losses.support import listed_mask
from tasks.losses.token_credit.config import CreditConfig
from tasks.losses.token_credit.divergence import compare, divergence_of
from tasks.losses.token_credit.returns import discounted
from tasks.losses.token_credit.stored import Listed, Tokens
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch, lowest, required, working


class CreditObjective:
    """per_token = a PPO(rho, m A + delta) + b c D(q', p), with a likelihood and a reference term where the config has them.

    a, b (with w and each term's own denominator in them), A and what the choices have planned are columns of `TokenBatch.planned`
    (`plan.py`). m and delta follow from log-probabilities of the live student or of the rollouts (`advantage_at`), c from rho."""

    def __init__(self, config: CreditConfig) -> None:
        self.config = config
        self.needs = config.needs()
        self.tokenwise = config.beside is None or config.beside.sequence_gradient is None

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """Needs the plan, the log-probabilities of the sampled token under all three models (of the teacher only where
        something reads it), and the lists of the divergence."""
        config, out = self.config, batch.loss_mask_N <= 0
        if batch.planned is None:
            raise ValueError(
                "the objective needs batch.planned, what the step's plan has computed (token_credit/plan.py)"
            )
        planned = {name: working(values).masked_fill(out, 0) for name, values in batch.planned.items()}
        live = working(required(student.token_logprobs_N, "student.token_logprobs_N")).masked_fill(out, 0)
        old = working(required(batch.student_logprobs_N, "batch.student_logprobs_N")).masked_fill(out, 0)
        of_teacher = batch.teacher_logprobs_N
        if of_teacher is None and not config.reads_teacher:  # it was not run: d = 0, which nothing reads
            of_teacher = batch.student_logprobs_N
        teacher = working(required(of_teacher, "batch.teacher_logprobs_N")).masked_fill(out, 0)
        log_rho = difference(live, old).detach().clamp(-config.log_rho_clip, config.log_rho_clip)
        metrics = {"log_ratio_mean": difference(live.detach(), old)}
        bound = config.log_ratio_clip
        if batch.teacher_logprobs_N is not None:
            metrics["reverse_kl"] = difference(live.detach(), teacher).clamp(-bound, bound)
        loss = 0 * live.clamp(min=lowest(live))
        if config.policy:
            advantage = self._advantage(batch, student, planned, live.detach(), old, teacher)
            a, clipped = planned["a"], torch.zeros_like(live)
            if config.ratio == "ppo":
                clip = config.clip
                term, clipped = surrogate(
                    advantage,
                    live,
                    old,
                    ppo_clip=None if clip is None else (clip.low, clip.high),
                    dual_clip=None if clip is None else clip.dual,
                    log_rho_clip=config.log_rho_clip,
                )
            else:
                term = -advantage * live.clamp(min=lowest(live))
            loss = loss + torch.where(a != 0, a * term, 0)
            if config.clip is not None:
                metrics["clip_fraction"] = clipped
        if config.beside is not None:
            loss = loss + self._beside(batch, student, planned, live, log_rho)
        if config.likelihood is not None:
            gate = (config.likelihood.slope * difference(teacher, live.detach())).sigmoid()
            loss = loss + planned["likelihood"] * gate * difference(teacher, live)
        if config.reference is not None:
            r = difference(teacher if config.reference.to == "teacher" else old, live)
            r = r.clamp(-config.log_ratio_clip, config.log_ratio_clip)
            loss = loss + planned["reference"] * (r.expm1() - r if config.reference.kind == "k3" else r**2 / 2)
        return ObjectiveOutput(loss.masked_fill(out, 0), self._metrics(batch, observed or student, metrics))

    @torch.no_grad()
    def _advantage(
        self,
        batch: TokenBatch,
        student: StudentView,
        planned: dict[str, Tensor],
        live: Tensor,
        old: Tensor,
        teacher: Tensor,
    ) -> Tensor:
        """m A + delta of each token; 0 added where the teacher's value is not known."""
        config = self.config
        p = live if config.advantage_at == "live" else old
        clip = config.log_ratio_clip
        scored = planned["scored"] > 0
        tokens = Tokens(
            log_p_N=p.clamp(min=lowest(p)),
            log_q_N=teacher.clamp(min=lowest(teacher)),
            d_N=difference(teacher, p).clamp(-clip, clip).masked_fill(~scored, 0),
            advantage_N=planned["advantage"],
            planned=planned,
        )
        if config.add.lists is not None or config.scale.lists is not None:
            tokens = replace(tokens, listed=self._listed(batch, student))
        advantage = tokens.advantage_N
        if (m := config.scale(tokens)) is not None:
            advantage = m * advantage
        if "delta" in planned:
            return advantage + planned["delta"]
        delta = config.add(tokens)
        return advantage if delta is None else advantage + delta.masked_fill(~scored, 0)

    def _listed(self, batch: TokenBatch, student: StudentView) -> Listed:
        ids = required(batch.support_ids_NK, "batch.support_ids_NK")
        listed = listed_mask(ids, required(batch.support_valid_N, "batch.support_valid_N"))
        listed &= (batch.loss_mask_N > 0).unsqueeze(-1)
        if self.config.advantage_at == "live":
            p = required(student.support_logprobs_NK, "student.support_logprobs_NK").detach()
        else:
            p = required(batch.student_support_logprobs_NK, "batch.student_support_logprobs_NK")
        q = required(batch.teacher_support_logprobs_NK, "batch.teacher_support_logprobs_NK")
        p, q = (working(values).masked_fill(~listed, 0).clamp(min=-80) for values in (p, q))
        holds = ((ids == batch.token_ids_N.unsqueeze(-1)) & listed).any(-1)
        return Listed(log_p_NK=p, log_q_NK=q, listed_NK=listed, holds_token_N=holds)

    def _beside(
        self, batch: TokenBatch, student: StudentView, planned: dict[str, Tensor], live: Tensor, log_rho: Tensor
    ) -> Tensor:
        """b w c D per token, and what `sequence_gradient` adds."""
        beside = self.config.beside
        assert beside is not None
        b = planned["b"]
        compared = compare(beside, batch, student, b != 0)
        divergence = divergence_of(beside.divergence, beside, compared, planned.get("target"))
        if beside.on_errors is not None:
            other = divergence_of(beside.on_errors, beside, compared, planned.get("target"))
            divergence = torch.where(planned["error"] > 0, other, divergence)
        term = b * divergence
        if beside.is_clip is not None:
            term = term * log_rho.exp().clamp(max=beside.is_clip)
        if beside.sequence_gradient is not None:
            later = _later((b * divergence).detach(), batch, beside.sequence_gradient.gamma)
            term = term + later * live.clamp(min=lowest(live))
        return term

    def _metrics(self, batch: TokenBatch, view: StudentView, own: dict[str, Tensor]) -> dict[str, Tensor]:
        out = batch.loss_mask_N <= 0
        metrics = {name: values.detach().masked_fill(out, 0) for name, values in own.items()}
        metrics |= sampled_metrics(batch, view)
        if batch.support_ids_NK is not None:
            beside = self.config.beside
            floors = (-40.0, -30.0) if beside is None else (beside.logprob_min, beside.tail_logmass_min)
            metrics |= support_metrics(batch, view, (), *floors)
        return metrics


@torch.no_grad()
def _later(values_N: Tensor, batch: TokenBatch, gamma: float) -> Tensor:
    """sum_{s>t} gamma^(s-t) of the values at later positions of the same sample; masked ones count 0."""
    samples, place_N = torch.unique(batch.sample_N, return_inverse=True)
    position_N = batch.position_N.long()
    length = int(position_N.max()) + 1 if len(position_N) else 0
    table = values_N.new_zeros(len(samples), length).index_put_((place_N, position_N), values_N)
    return (discounted(table, gamma) - table)[place_N, position_N]
