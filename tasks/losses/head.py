"""Head providers: compute what an objective needs of the live student from hidden states and the output head.

The head is called as a module (`head(hidden)`), so that hooks on it run (ZeRO-3 gathers the weight there, LoRA adds its
part). `ChunkedHead` has two ways with one result:

- It makes the logits of a chunk of unmasked tokens at a time, and again in backward, so that N x V logits never exist.
- Where only scores on the support are wanted (`renormalize`), it multiplies with these K rows of the head's weight alone.

A loss that is a sum over tokens needs no second time: `loss` forms its gradients with each chunk (`fused.py`).

K rows and `loss` need the weight itself: a head that is not exactly `nn.Linear`, has hooks, or whose weight ZeRO-3 has
partitioned, gets full logits in chunks instead.

Logits are taken to float32 (float64 stays) before anything is summed.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tasks.losses import fused
from tasks.losses.needs import StudentRequest
from tasks.losses.stop_ids import merge_ids, merge_listed, merge_rows, merge_scores
from tasks.losses.support import listed_mask
from tasks.losses.types import StudentView, TokenBatch, lowest, required, working

Parts = tuple[Tensor | None, ...]
_SMALL_CHUNK = 128
"""Tokens of a chunk below which matrix products become slow."""
FIELDS = (
    "token_logprobs_N",
    "support_logprobs_NK",
    "log_normaliser_N",
    "support_tail_logmass_N",
    "entropy_N",
    "support_overlap_N",
)


class HeadProvider(Protocol):
    """Answers a request about the live student, with gradient to hidden states and head."""

    def __call__(self, hidden_ND: Tensor, head: nn.Module, batch: TokenBatch, request: StudentRequest) -> StudentView:
        """hidden_ND: the last hidden state at the position that predicts each token. Fields that `request` does not ask for
        are null."""


class ChunkedHead:
    """Logits of `chunk_tokens` tokens at a time, recomputed in backward; masked tokens are skipped (their values are
    0).

    The memory for logits is chunk_tokens x V, whatever N. Scores on a support alone come from K rows of the head where
    the vocabulary has at least `rows_from` times K entries (below that a full product is faster)."""

    def __init__(self, chunk_tokens: int, rows_from: int = 16) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: {chunk_tokens}; at least one token per chunk")
        self.chunk_tokens = chunk_tokens
        self.rows_from = rows_from

    def __call__(self, hidden_ND: Tensor, head: nn.Module, batch: TokenBatch, request: StudentRequest) -> StudentView:
        kept_M = batch.loss_mask_N.nonzero().squeeze(-1)
        hidden_MD = hidden_ND.index_select(0, kept_M)
        lists = [None if t is None else t.index_select(0, kept_M) for t in support_of(batch, request)]
        ids_MK = lists[0]
        n = hidden_ND.shape[0]
        if ids_MK is not None and not request.whole_vocabulary and self._rows_apply(head, ids_MK.shape[-1]):
            assert isinstance(head, nn.Linear)
            wanted = merge_rows(ids_MK, request.stop_ids, head.out_features)
            scores_MK = _row_scores(hidden_MD, head, wanted, self.chunk_tokens)
            scores_MK = merge_listed(scores_MK, ids_MK, request.stop_ids)
            return StudentView(support_logprobs_NK=_spread(scores_MK, kept_M, n))
        tokens_M = batch.token_ids_N.index_select(0, kept_M)

        def part(*chunk: Tensor | None) -> Parts:
            hidden, tokens, ids, listed, teachers = chunk
            assert hidden is not None and tokens is not None
            if not torch.is_grad_enabled():
                return _in_tiles(head(hidden), tokens, [ids, listed, teachers], request)
            return from_logits(head(hidden), tokens, ids, listed, teachers, request)

        count = _chunk_count(kept_M.shape[0], self.chunk_tokens, head)
        inputs = [[None] * count if t is None else t.tensor_split(count) for t in (hidden_MD, tokens_M, *lists)]
        chunks: list[Parts] = [
            checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*inputs, strict=True)
        ]
        whole = (_joined(list(column)) for column in zip(*chunks, strict=True))
        return view_of(tuple(None if value is None else _spread(value, kept_M, n) for value in whole))

    def fuses(self, head: nn.Module, batch: TokenBatch, request: StudentRequest) -> bool:
        """Whether `loss` answers: not for K rows, which are faster, nor for a head whose weight is not at hand."""
        if not torch.is_grad_enabled() or obstacle(head) or not fused.answers(request):
            return False
        ids_NK = None if request.support is None else batch.support_ids_NK
        return ids_NK is None or request.whole_vocabulary or not self._rows_apply(head, ids_NK.shape[-1])

    def loss(
        self,
        hidden_ND: Tensor,
        head: nn.Module,
        batch: TokenBatch,
        request: StudentRequest,
        observe: StudentRequest | None,
        share: fused.Share,
        seen_N: Tensor | None = None,
    ) -> Tensor:
        """The sum of `share` over chunks of the unmasked tokens; back-propagates once. `observe`: what metrics need, of the
        tokens `seen_N` (bool; null: all) and zero at others.

        A chunk has at most `chunk_tokens`, and at most an eighth of the tokens where these are many: its logits take an eighth of
        the memory of all, and the weight's gradient, which every chunk reads and writes, does not take most of the time."""
        assert isinstance(head, nn.Linear)
        kept_M = batch.loss_mask_N.nonzero().squeeze(-1)
        tokens_M = batch.token_ids_N.index_select(0, kept_M)

        def kept(wanted: StudentRequest) -> list[Tensor | None]:
            return [None if t is None else t.index_select(0, kept_M) for t in support_of(batch, wanted)]

        seen_by_metrics: fused.Observe | None = None
        if observe is not None:
            lists = kept(observe)

            def look(logits_CV: Tensor, rows: slice) -> StudentView:
                tokens_C, lists_C = tokens_M[rows], [None if t is None else t[rows] for t in lists]
                if seen_N is None:
                    return view_of(_in_tiles(logits_CV, tokens_C, lists_C, observe))
                seen = seen_N[kept_M[rows]].nonzero().squeeze(-1)
                some = [None if t is None else t.index_select(0, seen) for t in lists_C]
                parts = _in_tiles(logits_CV.index_select(0, seen), tokens_C.index_select(0, seen), some, observe)
                return view_of(tuple(None if t is None else _spread(t, seen, len(logits_CV)) for t in parts))

            seen_by_metrics = look
        ids_MK, listed_MK, _ = kept(request)
        return fused.fused_loss(
            hidden_ND.index_select(0, kept_M),
            head,
            kept_M,
            fused.Lists(tokens_M, ids_MK, listed_MK),
            request,
            share,
            seen_by_metrics,
            min(self.chunk_tokens, max(_SMALL_CHUNK, len(kept_M) // 8)),
        )

    def _rows_apply(self, head: nn.Module, k: int) -> bool:
        return not obstacle(head) and isinstance(head, nn.Linear) and head.out_features >= self.rows_from * k


def from_logits(
    logits_NV: Tensor,
    token_ids_N: Tensor,
    ids_NK: Tensor | None,
    listed_NK: Tensor | None,
    teacher_NK: Tensor | None,
    request: StudentRequest,
) -> Parts:
    """The values that `request` asks for, in the order of FIELDS; null for the others.

    listed_NK: which ids of the support count; teacher_NK: which of them are the teacher's own list. The tail is a
    logsumexp over the complement of the support: it neither cancels as 1 - sum does nor makes NaN where nothing lies
    outside. Entropy is -sum p log p, with 0 log 0 = 0. Stop ids are merged before anything else."""
    raw = merge_scores(working(logits_NV), request.stop_ids)
    token_ids_N = merge_ids(token_ids_N, request.stop_ids)
    token = entropy = normaliser = scores = tail = overlap = None
    if request.token_logprobs or request.entropy:
        raw_normaliser = raw.logsumexp(-1)
        if request.token_logprobs:
            token = raw.gather(-1, token_ids_N.unsqueeze(-1)).squeeze(-1) - raw_normaliser
        if request.entropy:
            floored = raw.clamp(min=lowest(raw))
            entropy = raw_normaliser - ((raw - raw_normaliser.unsqueeze(-1)).exp() * floored).sum(-1)
    if request.exclude_ids and ids_NK is not None and listed_NK is not None:
        raw = _without(raw, ids_NK, listed_NK, request.exclude_ids)
    if request.log_normaliser or request.tail:
        normaliser = raw.logsumexp(-1)
    if ids_NK is not None and listed_NK is not None:
        scores = raw.gather(-1, ids_NK)
        if request.tail:
            assert normaliser is not None
            outside = raw.scatter(-1, ids_NK, lowest(raw)).logsumexp(-1)
            tail = torch.where(listed_NK.any(-1), outside, normaliser) - normaliser
        if request.overlap and teacher_NK is not None:
            overlap = _overlap(raw, scores, teacher_NK & (scores > float("-inf")))
        if request.log_normaliser:
            assert normaliser is not None
            scores = scores - normaliser.unsqueeze(-1)
    return token, scores, normaliser if request.log_normaliser else None, tail, entropy, overlap


@torch.no_grad()
def _in_tiles(logits_NV: Tensor, token_ids_N: Tensor, lists: list[Tensor | None], request: StudentRequest) -> Parts:
    """`from_logits` of few tokens at a time: what it makes of them stays in a processor's cache."""
    found = []
    for tile in fused.tiles(logits_NV):
        ids, listed, teacher = (None if t is None else t[tile] for t in lists)
        found.append(from_logits(logits_NV[tile], token_ids_N[tile], ids, listed, teacher, request))
    return tuple(_joined(list(column)) for column in zip(*found, strict=True))


def _without(raw_NV: Tensor, ids_NK: Tensor, listed_NK: Tensor, exclude_ids: tuple[int, ...]) -> Tensor:
    """-inf at the ids to exclude, in the rows whose support lists them. In other rows the teacher's value is not known, and
    the ids stay outside the support in both models."""
    gone_E = torch.tensor(sorted(set(exclude_ids)), device=raw_NV.device)
    there_NE = ((ids_NK.unsqueeze(-1) == gone_E) & listed_NK.unsqueeze(-1)).any(1)
    return raw_NV.index_copy(-1, gone_E, raw_NV.index_select(-1, gone_E).masked_fill(there_NE, float("-inf")))


@torch.no_grad()
def _overlap(logits_NV: Tensor, scores_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Share of the teacher's list among as many top entries of the student. A union may be wider than the vocabulary;
    what is listed never is."""
    count = teacher_NK.sum(-1)
    top = logits_NV.topk(min(scores_NK.shape[-1], logits_NV.shape[-1]), dim=-1).values
    threshold = top.gather(-1, (count - 1).clamp(min=0).unsqueeze(-1))
    return ((scores_NK >= threshold) & teacher_NK).sum(-1) / count.clamp(min=1)


def support_of(batch: TokenBatch, request: StudentRequest) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Support ids with a real id of the row in place of padding (so that a scatter over them is safe), which are listed,
    and which of these are the teacher's own list (null where that is not known)."""
    if request.support is None:
        return None, None, None
    ids = required(batch.support_ids_NK, "batch.support_ids_NK").long()
    listed = listed_mask(ids, required(batch.support_valid_N, "batch.support_valid_N"))
    teacher = listed if request.support in ("teacher_topk", "full") else None
    if request.support == "union" and batch.support_teacher_valid_N is not None:
        teacher = listed_mask(ids, batch.support_teacher_valid_N)
    return torch.where(listed, ids, ids[:, :1]), listed, teacher


class _RowScores(torch.autograd.Function):
    """scores[n, k] = weight[ids[n, k]] . hidden[n] + bias[ids[n, k]], a chunk of tokens at a time, both ways.

    Saves only its inputs. The gradient of the weight is summed in float32 at least, over the rows in use."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_MK: Tensor, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, ids_MK)
        ctx.chunk = chunk
        scores = [
            torch.bmm(working(weight_VD[ids]), working(h).unsqueeze(-1)).squeeze(-1)
            for h, ids in zip(torch.split(hidden_MD, chunk), torch.split(ids_MK, chunk), strict=True)
        ]
        whole = torch.cat(scores)
        return whole if bias_V is None else whole + working(bias_V)[ids_MK]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MK: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        used, inverse = torch.unique(ids, return_inverse=True)
        grad_rows = grad_MK.new_zeros((used.shape[0], weight.shape[1])) if wants_weight else None
        grads_hidden = []
        for grad, h, chunk_ids, rows in zip(
            *(torch.split(t, ctx.chunk) for t in (grad_MK, hidden, ids, inverse)), strict=True
        ):
            if wants_hidden:
                grads_hidden.append(torch.bmm(grad.unsqueeze(1), working(weight[chunk_ids])).squeeze(1))
            if grad_rows is not None:
                outer = grad.unsqueeze(-1) * working(h).unsqueeze(1)
                grad_rows.index_add_(0, rows.reshape(-1), outer.reshape(-1, h.shape[-1]))
        grad_weight = grad_bias = None
        if grad_rows is not None:
            grad_weight = torch.zeros_like(weight)
            grad_weight[used] = grad_rows.to(weight.dtype)
        if wants_bias:
            sums = grad_MK.new_zeros(used.shape[0]).index_add_(0, inverse.reshape(-1), grad_MK.reshape(-1))
            grad_bias = torch.zeros_like(bias)
            grad_bias[used] = sums.to(bias.dtype)
        grad_hidden = torch.cat(grads_hidden).to(hidden.dtype) if wants_hidden else None
        return grad_hidden, grad_weight, grad_bias, None, None


def _row_scores(hidden_MD: Tensor, head: nn.Module, ids_MK: Tensor, chunk_tokens: int) -> Tensor:
    """K-row scores in chunks that take no more memory than `chunk_tokens` rows of logits would."""
    assert isinstance(head, nn.Linear)
    per_token = ids_MK.shape[-1] * head.in_features
    chunk = max(1, min(chunk_tokens, chunk_tokens * head.out_features // per_token))
    with torch.autocast(hidden_MD.device.type, enabled=False):
        scores: Tensor = _RowScores.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            hidden_MD, head.weight, head.bias, ids_MK, chunk
        )
    return scores


def obstacle(head: nn.Module) -> str | None:
    """Why the layer's weight and bias cannot be used in its place; null where they can."""
    if type(head) is not nn.Linear:
        return f"the output head is a {type(head).__name__}, not a plain nn.Linear"
    if _partitioned(head):
        return "ZeRO-3 holds the output head in pieces"
    if head._forward_hooks or head._forward_pre_hooks:
        return "the output head has hooks"
    return None


def _partitioned(head: nn.Module) -> bool:
    """Whether ZeRO-3 holds the weight in pieces (DeepSpeed marks such parameters with `ds_id`)."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _chunk_count(tokens: int, chunk_tokens: int, head: nn.Module) -> int:
    """At least one chunk (an empty one keeps the graph). Under ZeRO-3 the same on every rank: each call is
    collective."""
    count = max(1, -(-tokens // chunk_tokens))
    if _partitioned(head) and torch.distributed.is_initialized():
        shared = torch.tensor([count], device=next(head.parameters()).device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        count = int(shared.item())
    return count


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _spread(values_M: Tensor, kept_M: Tensor, n: int) -> Tensor:
    """Values of the unmasked tokens at their places, zero at the masked ones."""
    return values_M.new_zeros((n, *values_M.shape[1:])).index_copy(0, kept_M, values_M)


def view_of(parts: Parts) -> StudentView:
    return StudentView(**dict(zip(FIELDS, parts, strict=True)))
