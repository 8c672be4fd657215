"""Loss and gradients of the output head in one pass over chunks of tokens: three matrix products, and no logits kept.

While a chunk's logits are there, the objective is evaluated on it, and the logits are overwritten by their gradient, from which
the gradients of hidden states and weight follow. So the objective must be a sum over tokens (`Objective.tokenwise`).

What an objective asks of the student depends on a token's logits l by few numbers: l at the ids of its support and at its own
id, and `rest`, the logsumexp of the logits outside the support. Autograd differentiates the objective by these; of the
vocabulary only d rest / d l = exp(l - rest) is left, in place. The normaliser is logaddexp(rest, logsumexp of the support): no
difference of close numbers is taken, however little lies outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tasks.losses.needs import StudentRequest
from tasks.losses.products import hidden_gradient, logits_of
from tasks.losses.stop_ids import merge_ids, merge_in_place, spread_in_place
from tasks.losses.support import excluded_mask, masked_logsumexp
from tasks.losses.types import StudentView, lowest, working

Share = Callable[[Tensor, StudentView, StudentView | None], Tensor]
"""(places of C of the tokens, the student there, the student for metrics) -> their part of the loss, a scalar"""
Observe = Callable[[Tensor, slice], StudentView]
"""(logits of C tokens, which of the M) -> what metrics need of them"""
TILE = 2**19
"""Logits that elementwise operations take at a time: they stay in a processor's cache between two of them."""


@dataclass(frozen=True)
class Lists:
    """Of the M tokens that count: their ids, and the support's ids, where there is one, with a listed id in place of padding."""

    token_ids_M: Tensor
    ids_MK: Tensor | None
    listed_MK: Tensor | None

    def at(self, rows: slice) -> Lists:
        """Those of some tokens."""
        return Lists(*(None if t is None else t[rows] for t in (self.token_ids_M, self.ids_MK, self.listed_MK)))  # type: ignore[arg-type]


def answers(request: StudentRequest) -> bool:
    """Whether the gradient of everything asked for has the form above."""
    return not (request.entropy or request.overlap)


def fused_loss(
    hidden_MD: Tensor,
    head: nn.Linear,
    places_M: Tensor,
    lists: Lists,
    request: StudentRequest,
    share: Share,
    observe: Observe | None,
    chunk: int,
) -> Tensor:
    """The sum of `share` over chunks of the M tokens, with gradient to hidden states and head.

    `places_M`: where the tokens are in the micro-batch. The gradients exist from here to backward, which can be called once;
    the memory beside them is that of the logits of `chunk` tokens. The weight's gradient is summed in the weight's dtype."""
    pass_ = _Pass(hidden_MD, head)
    loss = torch.zeros((), device=hidden_MD.device)
    for start in range(0, len(hidden_MD), chunk):
        rows = slice(start, min(start + chunk, len(hidden_MD)))
        loss = loss + _of_chunk(pass_, rows, places_M[rows], lists.at(rows), request, share, observe)
    formed: Tensor = _Formed.apply(loss, hidden_MD, head.weight, head.bias, pass_)  # type: ignore[no-untyped-call]
    return formed


def _of_chunk(
    pass_: _Pass,
    rows: slice,
    places_C: Tensor,
    lists: Lists,
    request: StudentRequest,
    share: Share,
    observe: Observe | None,
) -> Tensor:
    """Adds the gradients of one chunk to those of the pass; returns its part of the loss. Its logits end with this call, before
    those of the next chunk are made."""
    logits_CV = pass_.logits(rows)
    observed = None if observe is None else observe(logits_CV, rows)
    student = _Student(logits_CV, lists, request)
    with torch.enable_grad():
        part = share(places_C, student.view(), observed)
    student.differentiate(part)
    pass_.add(rows, logits_CV)
    return part.detach()


class _Student:
    """The student at C tokens, of whose logits it takes possession: first they are exp(l - largest), then the loss's gradient."""

    def __init__(self, logits_CV: Tensor, lists: Lists, request: StudentRequest) -> None:
        self.request, self.logits_CV = request, logits_CV
        self.stops_CS = merge_in_place(logits_CV, request.stop_ids)
        self.tokens_C1 = merge_ids(lists.token_ids_M, request.stop_ids).unsqueeze(-1)
        self.lists = None if lists.ids_MK is None or lists.listed_MK is None else (lists.ids_MK, lists.listed_MK)
        self.leaves: dict[str, Tensor] = {}
        if request.token_logprobs:
            self.leaves["token"] = logits_CV.gather(-1, self.tokens_C1)
        if self.lists is not None:
            ids_CK, listed_CK = self.lists
            self.some_C1 = listed_CK.any(-1, keepdim=True)
            self.leaves["scores"] = logits_CV.gather(-1, ids_CK)
        if request.whole_vocabulary:
            self.leaves["rest"] = self._sum_rest()
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def _sum_rest(self) -> Tensor:
        logits_CV = self.logits_CV
        if self.lists is not None:
            taken = self.leaves["scores"].masked_fill(self.some_C1, lowest(logits_CV))
            logits_CV.scatter_(-1, self.lists[0], taken)
        self.sum_C1 = logits_CV.new_empty((len(logits_CV), 1))
        largest_C1 = torch.empty_like(self.sum_C1)
        for tile in tiles(logits_CV):
            largest_C1[tile] = logits_CV[tile].amax(-1, keepdim=True)
            self.sum_C1[tile] = logits_CV[tile].sub_(largest_C1[tile]).exp_().sum(-1, keepdim=True)
        return (largest_C1 + self.sum_C1.log()).squeeze(-1)

    def view(self) -> StudentView:
        """What the request asks for, as `from_logits` has it."""
        request, rest, scores = self.request, self.leaves.get("rest"), self.leaves.get("scores")
        token = normaliser = tail = None
        if rest is not None:
            normaliser = rest
            if scores is not None and self.lists is not None:
                normaliser = torch.logaddexp(rest, masked_logsumexp(scores, self.lists[1]))
            if request.token_logprobs:
                token = self.leaves["token"].squeeze(-1) - normaliser
        if scores is not None and self.lists is not None:
            ids_CK, listed_CK = self.lists
            if request.exclude_ids:
                excluded = excluded_mask(ids_CK, request.exclude_ids) & self.some_C1
                scores = scores.masked_fill(excluded, float("-inf"))
                if rest is not None:
                    normaliser = torch.logaddexp(rest, masked_logsumexp(scores, listed_CK & ~excluded))
            if request.tail and rest is not None and normaliser is not None:
                tail = torch.where(self.some_C1.squeeze(-1), rest, normaliser) - normaliser
            if request.log_normaliser and normaliser is not None:
                scores = scores - normaliser.unsqueeze(-1)
        return StudentView(
            token_logprobs_N=token,
            support_logprobs_NK=scores,
            log_normaliser_N=normaliser if request.log_normaliser else None,
            support_tail_logmass_N=tail,
        )

    def differentiate(self, loss: Tensor) -> None:
        """Overwrites the logits by the gradient of a loss that was computed from `view`."""
        found = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True, materialize_grads=True)
        gradients, logits_CV = dict(zip(self.leaves, found, strict=True)), self.logits_CV
        if "rest" in gradients:
            factor_C1 = gradients["rest"].unsqueeze(-1) / self.sum_C1
            for tile in tiles(logits_CV):
                logits_CV[tile].mul_(factor_C1[tile])
        else:
            logits_CV.zero_()
        if self.lists is not None:
            ids_CK, _ = self.lists
            logits_CV.scatter_(-1, ids_CK, logits_CV.gather(-1, ids_CK).masked_fill(self.some_C1, 0))
            logits_CV.scatter_add_(-1, ids_CK, gradients["scores"])
        if "token" in gradients:
            logits_CV.scatter_add_(-1, self.tokens_C1, gradients["token"])
        spread_in_place(logits_CV, self.request.stop_ids, self.stops_CS)


class _Pass:
    """The products of a pass, and the gradients that they add up to."""

    def __init__(self, hidden_MD: Tensor, head: nn.Linear) -> None:
        self.hidden, self.weight = hidden_MD.detach(), head.weight.detach()
        self.bias = None if head.bias is None else head.bias.detach()
        self.grad_hidden = torch.empty_like(self.hidden) if hidden_MD.requires_grad else None
        self.grad_weight: Tensor | None = None
        self.wants_weight = head.weight.requires_grad
        self.grad_bias = None
        if head.bias is not None and head.bias.requires_grad:
            self.grad_bias = working(torch.zeros_like(head.bias))

    def logits(self, rows: slice) -> Tensor:
        """Of a chunk of the M tokens, in float32 at least."""
        product = logits_of(self.hidden[rows], self.weight)
        if self.bias is not None:
            product += self.bias
        return working(product)

    def add(self, rows: slice, gradient_CV: Tensor) -> None:
        """Adds what the gradient of a chunk's logits gives."""
        hidden, product = self.hidden[rows], gradient_CV.to(self.weight.dtype)
        if self.grad_bias is not None:
            self.grad_bias += gradient_CV.sum(0)
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = hidden_gradient(product, self.weight)
        if self.wants_weight:
            if self.grad_weight is None:
                self.grad_weight = torch.mm(product.t(), hidden)
            else:
                torch.addmm(self.grad_weight, product.t(), hidden, out=self.grad_weight)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias."""
        if self.wants_weight and self.grad_weight is None:  # no token counts
            self.grad_weight = torch.zeros_like(self.weight)
        bias = None if self.grad_bias is None else self.grad_bias.to(self.weight.dtype)
        return self.grad_hidden, self.grad_weight, bias


class _Formed(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, formed: _Pass
    ) -> Tensor:
        ctx.formed = formed
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.formed is None:
            raise RuntimeError("the fused loss of the output head has been back-propagated already; compute it again")
        found = ctx.formed.gradients()
        ctx.formed = None
        if float(gradient) != 1:
            for each in found:
                if each is not None:
                    each.mul_(gradient)
        return None, *found, None


def tiles(values_CV: Tensor) -> Iterator[slice]:
    """Slices of few rows at a time; one of none where there are none."""
    step = max(1, TILE // values_CV.shape[-1])
    return (slice(start, start + step) for start in range(0, max(1, len(values_CV)), step))
