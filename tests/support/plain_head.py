"""The reference for head providers: all logits at once."""

from __future__ import annotations

from torch import Tensor, nn

from tasks.losses.head import from_logits, support_of, view_of
from tasks.losses.needs import StudentRequest
from tasks.losses.types import StudentView, TokenBatch


class PlainHead:
    """A head provider for small cases."""

    def __call__(self, hidden_ND: Tensor, head: nn.Module, batch: TokenBatch, request: StudentRequest) -> StudentView:
        return view_of(from_logits(head(hidden_ND), batch.token_ids_N, *support_of(batch, request), request))
