"""The estimator of pairs: the teacher's completion of a prompt against the student's, by log-probabilities of both as a whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tasks.losses.config import PairsConfig
from tasks.losses.metrics import difference, sampled_metrics
from tasks.losses.types import ObjectiveOutput, StudentView, TokenBatch, required, working


class PairsObjective:
    """per_token = share L, L = -log sigmoid(beta (h(y+) - h(y-))) of the token's pair (PBSD, 2605.05040).

    `TokenBatch.planned` has for every token the number of its pair in the step, the sign of its completion (1: y+, -1: y-) and
    the share (`trainer/pairing.py`). The shares of a pair's tokens, times the trainer's weights, sum to one over the number of
    pairs; each token's value depends on all tokens of the pair. Sums over tokens are in float64, so that their order hardly
    matters."""

    tokenwise = False

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        self.needs = config.needs()

    def __call__(self, batch: TokenBatch, student: StudentView, observed: StudentView | None = None) -> ObjectiveOutput:
        """Needs the plan, and the log-probabilities of the sampled token under teacher and live student. ValueError where a pair
        that counts is not in the micro-batch as a whole."""
        out = batch.loss_mask_N <= 0
        if batch.planned is None:
            raise ValueError("the objective needs batch.planned, which completions are pairs (trainer/pairing.py)")
        pair, sign, share = (batch.planned[name].masked_fill(out, 0) for name in ("pair", "sign", "share"))
        live = working(required(student.token_logprobs_N, "student.token_logprobs_N")).masked_fill(out, 0)
        teacher = working(required(batch.teacher_logprobs_N, "batch.teacher_logprobs_N")).masked_fill(out, 0)
        pairs, place_N = torch.unique(pair.long(), return_inverse=True)
        _require_whole(len(pairs), place_N, sign, share)
        signed = sign.double() * difference(live, teacher.detach()).double()
        margin = signed.new_zeros(len(pairs)).index_add(0, place_N, signed)
        loss = softplus(-self.config.beta * margin)[place_N].to(live.dtype)
        return ObjectiveOutput((share * loss).masked_fill(out, 0), sampled_metrics(batch, observed or student))


def _require_whole(pairs: int, place_N: Tensor, sign_N: Tensor, share_N: Tensor) -> None:
    sides = [share_N.new_zeros(pairs).index_add(0, place_N, (sign_N * way > 0).to(share_N.dtype)) for way in (1, -1)]
    torn = (share_N > 0) & ((sides[0] == 0) | (sides[1] == 0))[place_N]
    if bool(torn.any()):
        raise ValueError("a micro-batch has one completion of a pair without the other; both must be in the same one")
