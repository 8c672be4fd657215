"""Stop ids that differ between two models, merged into one category.

A base student and an instruct teacher end their completions with different ids, so all stop mass of each lies on a token that
the other never writes. Merged, the ids are one category of both distributions: its score is the logsumexp of theirs
(2609.20511; TRB, 2605.31159, merges before it solves for its policy). By data processing a divergence of merged distributions is
never above that of the full ones. Nothing depends on how a model divides its stop mass over the ids, so that is not trained.

`stop_ids` lists the category: first the id that stands for it (the student's own), then the others. Empty: nothing is merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_scores(scores_NV: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Logits or log-probabilities over V ids, with the logsumexp of the stop ids' at the first and -inf at the others.

    A new tensor, differentiable; the same one where nothing is merged. Ids from V on, which this model does not have, have no
    mass. ValueError when it does not have the first."""
    if len(stop_ids) < 2:
        return scores_NV
    own, *others = there(stop_ids, scores_NV.shape[-1])
    if not others:
        return scores_NV
    index_S = torch.tensor([own, *others], device=scores_NV.device)
    merged_NS = scores_NV.new_full((*scores_NV.shape[:-1], len(index_S)), float("-inf"))
    merged_NS[..., 0] = merged_score(scores_NV.index_select(-1, index_S))
    return scores_NV.index_copy(-1, index_S, merged_NS)


def merge_in_place(scores_NV: Tensor, stop_ids: Sequence[int]) -> Tensor | None:
    """`merge_scores` in the same memory. Returns the stop ids' scores (N, S) from before; null where nothing is merged."""
    if len(stop_ids) < 2:
        return None
    index_S = torch.tensor(there(stop_ids, scores_NV.shape[-1]), device=scores_NV.device)
    scores_NS = scores_NV.index_select(-1, index_S)
    scores_NV.index_fill_(-1, index_S, float("-inf"))
    scores_NV[..., stop_ids[0]] = merged_score(scores_NS)
    return scores_NS


def spread_in_place(gradient_NV: Tensor, stop_ids: Sequence[int], scores_NS: Tensor | None) -> None:
    """The gradient by merged scores becomes that by the scores before `merge_in_place`, which returned `scores_NS`."""
    if scores_NS is None:
        return
    index_S = torch.tensor(there(stop_ids, gradient_NV.shape[-1]), device=gradient_NV.device)
    shares_NS = (scores_NS - merged_score(scores_NS).unsqueeze(-1)).exp().nan_to_num(0)
    gradient_NV.index_copy_(-1, index_S, gradient_NV[..., stop_ids[:1]] * shares_NS)


def merge_rows(ids_NK: Tensor, stop_ids: Sequence[int], rows: int) -> Tensor:
    """ids (N, K + S): the lists, then the stop ids of the `rows` that a model has. `merge_listed` takes their scores."""
    if len(stop_ids) < 2:
        return ids_NK
    stops_S = torch.tensor(there(stop_ids, rows), device=ids_NK.device, dtype=ids_NK.dtype)
    return torch.cat((ids_NK, stops_S.expand(*ids_NK.shape[:-1], len(stops_S))), -1)


def merge_listed(scores_NKS: Tensor, ids_NK: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Scores (N, K) of the lists `ids_NK`, the category's in place of that of the id that stands for it. `scores_NKS`: those of
    `merge_rows`."""
    if len(stop_ids) < 2:
        return scores_NKS
    k = ids_NK.shape[-1]
    merged_N1 = merged_score(scores_NKS[..., k:]).unsqueeze(-1)
    return torch.where(ids_NK == stop_ids[0], merged_N1, scores_NKS[..., :k])


def merged_score(scores_NS: Tensor) -> Tensor:
    """The category's score: logsumexp over the last axis; -inf, without a NaN in the gradient, where all of them are -inf."""
    gone_N = (scores_NS == float("-inf")).all(-1)
    return scores_NS.masked_fill(gone_N.unsqueeze(-1), 0).logsumexp(-1).masked_fill(gone_N, float("-inf"))


def merge_ids(ids: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Token ids with the first stop id in place of each of them."""
    if len(stop_ids) < 2:
        return ids
    return torch.where(torch.isin(ids, torch.tensor(list(stop_ids), device=ids.device)), stop_ids[0], ids)


def there(stop_ids: Sequence[int], rows: int) -> list[int]:
    """Those that a model of `rows` ids has. ValueError when it does not have the first."""
    if stop_ids[0] >= rows:
        raise ValueError(f"stop_ids: {stop_ids[0]}, which stands for {list(stop_ids)}, is not among the {rows} ids")
    return [index for index in stop_ids if index < rows]
