"""What is asked of a chunk of logits, in few passes over a large vocabulary: one for the maxima of blocks, one each for
differences, exponentials and their sums, and none that sorts it.

- The k largest of a row lie in the k blocks with the largest maxima: an element of any other block comes after one of each of
  these. Order and choice are by (value, largest first; id, smallest first), so ties have one answer whatever the block's width.
- A nucleus is a prefix of that order. `SAMPLED` of it hold the mass of most distributions; where they do not, more are taken, in
  the end all (`_sampled`).
- Values are relative to the row's maximum m: entropy is log S - sum(e (x - m)) / S with e = exp(x - m), S = sum(e), two terms
  that are never negative, and a tail is the log of the sum of what is left of e: nothing cancels.

Shapes as in `distributions`, R rows of a block of tokens. A few rows are worked on at a time on a CPU, so that they stay in its
cache. The normaliser has the bits of `Tensor.logsumexp`; no result depends on the other rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tasks.engines import distributions
from tasks.engines.distributions import usable
from tasks.engines.teacher import Vocabulary
from tasks.losses.stop_ids import merged_score, there
from tasks.signals import Ask

LARGE = 8192
"""Rows from which a vocabulary is large. A smaller one is answered by `distributions`, as it always was."""
WIDTH = 64
"""Elements of a block."""
SAMPLED = 64
"""Likeliest ids in which a nucleus is sought first, and `SAMPLED_MORE` in which it is sought next."""
SAMPLED_MORE = 2048
_BLOCK_BYTES = 2**21
"""Of a block of tokens on a CPU; three such are worked on."""
_SORTED_ROWS = 16
"""Rows of which copies are partitioned or sorted at a time on a CPU."""
_SMALLEST = 1e-30
"""Sums of exponentials below this have lost digits, or all; their rows are computed from log-probabilities."""
_INF = float("inf")


def answer(
    scores_NV: Tensor,
    unread_N: Tensor | None,
    ids_N: Tensor,
    merged_N: Tensor,
    ask: Ask,
    vocabulary: Vocabulary,
    given_NK: Mapping[int, Tensor],
    normalised: bool = False,
) -> dict[str, Tensor]:
    """What is asked of one chunk, under the names of `Teacher.score`. May change `scores_NV`: logits over all rows of a model, or
    with `normalised` log-probabilities of the vocabulary's rows, stop ids merged. `unread_N`: tokens whose values are NaN.
    `ids_N`: the tokens as sampled, `merged_N` as they count."""
    scores_NV = scores_NV.float()
    merging = len(vocabulary.stop_ids) > 1 and not normalised
    stops = there(vocabulary.stop_ids, scores_NV.shape[-1]) if merging else []
    found: dict[str, Tensor] = {}
    if ask.sampling and len(stops) > 1:  # never merged: passes of its own
        single = _Chunk(scores_NV[:, : vocabulary.rows], unread_N, normalised)
        found |= _asked(single, ids_N, ids_N, Ask(sampling=ask.sampling), vocabulary.shared, {})
        ask = replace(ask, sampling=None)
    if len(stops) > 1:
        scores_NV[:, stops[0]] = merged_score(scores_NV[:, stops])
        scores_NV[:, stops[1:]] = -_INF
    gone = [index for index in stops[1:] if index < vocabulary.rows]
    chunk = _Chunk(scores_NV[:, : vocabulary.rows], unread_N, normalised, gone)
    return found | _asked(chunk, ids_N, merged_N, ask, vocabulary.shared, given_NK)


def largest(scores_NV: Tensor, k: int, maxima_NB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(ids, values), (N, k) each: the k largest of every row, the largest first, equal ones by id. `maxima_NB`: those of
    `block_maxima`. A row with NaN has any ids."""
    rows = scores_NV.shape[-1]
    if k * WIDTH >= rows:
        ids_NK = _ordered(scores_NV).topk(k).indices
        return ids_NK, scores_NV.gather(-1, ids_NK)
    maxima_NB = block_maxima(scores_NV) if maxima_NB is None else maxima_NB
    least_NK, blocks_NK = maxima_NB.topk(k)
    tied_N = (maxima_NB >= least_NK[:, -1:]).sum(-1) > k
    ids_NC, values_NC = _of_blocks(scores_NV, blocks_NK)
    values_NK, places_NK = values_NC.topk(k)
    tied_N |= (values_NK[:, 1:] == values_NK[:, :-1]).any(-1) | ((values_NC >= values_NK[:, -1:]).sum(-1) > k)
    ids_NK = ids_NC.gather(-1, places_NK)
    if tied_N.any():  # topk leaves open which of equal ones it takes, and in which order
        blocks_SK = _ordered(maxima_NB[tied_N]).topk(k).indices.sort().values
        ids_SC, values_SC = _of_blocks(scores_NV[tied_N], blocks_SK)
        ids_NK[tied_N] = ids_SC.gather(-1, _ordered(values_SC).topk(k).indices)
    return ids_NK, values_NK


def block_maxima(scores_NV: Tensor) -> Tensor:
    """(N, B): the largest of every `WIDTH` elements, of whole blocks. NaN where a block has it."""
    whole = scores_NV.shape[-1] // WIDTH
    return scores_NV[:, : whole * WIDTH].unflatten(-1, (whole, WIDTH)).amax(-1)


def _of_blocks(scores_NV: Tensor, blocks_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, values) of the elements of these blocks in turn, and of those behind the last whole one."""
    whole = scores_NV.shape[-1] // WIDTH
    here_N1 = torch.arange(len(scores_NV), device=scores_NV.device)[:, None]
    values_NC = scores_NV[:, : whole * WIDTH].unflatten(-1, (whole, WIDTH))[here_N1, blocks_NK].flatten(-2)
    ids_NC = (blocks_NK.unsqueeze(-1) * WIDTH + torch.arange(WIDTH, device=scores_NV.device)).flatten(-2)
    if whole * WIDTH == scores_NV.shape[-1]:
        return ids_NC, values_NC
    rest = torch.arange(whole * WIDTH, scores_NV.shape[-1], device=scores_NV.device)
    return torch.cat((ids_NC, rest.expand(len(ids_NC), -1)), -1), torch.cat((values_NC, scores_NV[:, rest]), -1)


class _Chunk:
    """The scores of a chunk, with what several answers share. `gone`: ids of probability 0 by merging."""

    def __init__(self, scores_NV: Tensor, unread_N: Tensor | None, normalised: bool, gone: Sequence[int] = ()) -> None:
        self.scores_NV, self.normalised, self.gone = scores_NV, normalised, list(gone)
        self.maxima_NB = block_maxima(scores_NV)
        self.top_N = self.maxima_NB.amax(-1)
        if rest := scores_NV.shape[-1] % WIDTH:
            self.top_N = torch.maximum(self.top_N, scores_NV[:, -rest:].amax(-1))
        lost_N = ~self.top_N.isfinite()
        self.lost_N = lost_N if unread_N is None else lost_N | unread_N

    def sums(self, lists: Mapping[str, Tensor], temperature: float | None, entropy: bool) -> dict[str, Tensor]:
        """Sums over each row of e = exp(x - m), m its maximum: `all`; under a list's name, without its ids (N, K); `inside`, of
        e (x - m), where the entropy is wanted; `heated`, of exp((x - m) / temperature), where it is given and not 1."""
        found = {name: torch.empty_like(self.top_N) for name in ("all", *lists)}
        found |= {"inside": torch.empty_like(self.top_N)} if entropy else {}
        found |= {"heated": torch.empty_like(self.top_N)} if temperature not in (None, 1) else {}
        blocks = _blocks(self.scores_NV)
        most = max(block.stop - block.start for block in blocks)
        differences, parts = (self.scores_NV.new_empty(most, self.scores_NV.shape[-1]) for _ in range(2))
        for block in blocks:
            count = block.stop - block.start
            differences_RV, parts_RV = differences[:count], parts[:count]
            torch.sub(self.scores_NV[block], self.top_N[block, None], out=differences_RV)
            if "heated" in found:
                assert temperature is not None
                found["heated"][block] = torch.div(differences_RV, temperature, out=parts_RV).exp_().sum(-1)
            torch.exp(differences_RV, out=parts_RV)
            found["all"][block] = parts_RV.sum(-1)
            if entropy:
                differences_RV[:, self.gone] = 0
                found["inside"][block] = differences_RV.mul_(parts_RV).sum(-1)
            for name, ids_NK in lists.items():
                listed_RK = parts_RV.gather(-1, ids_NK[block]) if len(lists) > 1 else None
                found[name][block] = parts_RV.scatter_(-1, ids_NK[block], 0).sum(-1)
                if listed_RK is not None:
                    parts_RV.scatter_(-1, ids_NK[block], listed_RK)
        self.normaliser_N = torch.zeros_like(self.top_N) if self.normalised else found["all"].log() + self.top_N
        self.normaliser_N.masked_fill_(self.lost_N, float("nan"))
        return found

    def logprobs(self, values_NK: Tensor) -> Tensor:
        """Log-probabilities of scores."""
        return values_NK - self.normaliser_N[:, None]

    def of(self, ids_NK: Tensor) -> Tensor:
        """As `distributions.of_tokens`."""
        here_NK = ids_NK < self.scores_NV.shape[-1]
        values_NK = self.logprobs(self.scores_NV.gather(-1, ids_NK.where(here_NK, torch.zeros_like(ids_NK))))
        return usable(values_NK.masked_fill(~here_NK & ~self.lost_N[:, None], -_INF))

    def entropy(self, all_N: Tensor, inside_N: Tensor) -> Tensor:
        """As `distributions.entropy`. Neither term is negative."""
        above_N = self.normaliser_N - self.top_N
        found_N = (above_N * all_N - inside_N) * (-above_N).exp()
        again_N = found_N.isnan() & ~self.lost_N  # a score of -inf
        if again_N.any():
            found_N[again_N] = distributions.entropy(self._again(again_N))
        return found_N

    def tail(self, ids_NK: Tensor, left_N: Tensor) -> Tensor:
        """As `distributions.tail_logmass`."""
        found_N = left_N.log() + (self.top_N - self.normaliser_N)
        again_N = (left_N < _SMALLEST) & ~self.lost_N
        if again_N.any():
            found_N[again_N] = distributions.tail_logmass(self._again(again_N), ids_NK[again_N])
        return usable(found_N)

    def _again(self, rows_N: Tensor) -> Tensor:
        return self.scores_NV[rows_N] - self.normaliser_N[rows_N, None]


def _asked(
    chunk: _Chunk, ids_N: Tensor, merged_N: Tensor, ask: Ask, shared: int, given_NK: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    lists: dict[str, Tensor] = {}
    values_NK = ids_N[:, None]
    if ask.top:
        whole = shared >= chunk.scores_NV.shape[-1]
        top_NK, values_NK = largest(chunk.scores_NV[:, :shared], max(ask.top), chunk.maxima_NB if whole else None)
        lists = {f"top{k}": top_NK[:, :k] for k in sorted(ask.top)}
    lists |= {f"on{k}": chosen_NK for k, chosen_NK in given_NK.items()}
    sums = chunk.sums(lists, ask.sampling["temperature"] or 1 if ask.sampling else None, ask.entropy)
    found: dict[str, Tensor] = {}
    if ask.logprobs:
        found["logprobs"] = chunk.of(merged_N[:, None])[:, 0]
    if ask.entropy:
        found["entropy"] = chunk.entropy(sums["all"], sums["inside"])
    for name, ids_NK in lists.items():
        found[f"{name}_tail"] = chunk.tail(ids_NK, sums[name])
        if name.startswith("on"):
            found[f"{name}_logprobs"] = chunk.of(ids_NK)
            continue
        logprobs_NK = usable(chunk.logprobs(values_NK[:, : ids_NK.shape[-1]]))
        found |= {f"{name}_ids": ids_NK, f"{name}_logprobs": logprobs_NK}
        found[f"{name}_valid"] = logprobs_NK.isfinite().sum(-1)
    if ask.sampling:
        heated_N = sums.get("heated", sums["all"]).double()
        found["behaviour_logprobs"], found["outside"] = _sampled(chunk, ids_N, heated_N, **ask.sampling)
    return found


def _sampled(
    chunk: _Chunk, ids_N: Tensor, heated_N: Tensor, temperature: float, top_p: float, top_k: int, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `distributions.sampling_logprobs`, with masses in float64. `heated_N`: see `_Chunk.sums`."""
    rows = chunk.scores_NV.shape[-1]
    outside_N = torch.zeros_like(chunk.lost_N)
    limited = min_p > 0 or 0 < top_k < rows
    if temperature == 0 or (temperature == 1 and top_p == 1 and not limited):
        return chunk.of(ids_N[:, None])[:, 0], outside_N
    chosen_N = (chunk.logprobs(chunk.scores_NV.gather(-1, ids_N[:, None]))[:, 0] / temperature).double()
    if top_p == 1 and not limited:
        first_N = ((chunk.top_N - chunk.normaliser_N) / temperature).double()
        return usable((chosen_N - first_N - heated_N.log()).float()), outside_N
    least_N, mass_N = (torch.full_like(chosen_N, float("nan")) for _ in range(2))
    open_S = (~chunk.lost_N).nonzero()[:, 0]
    for count in (max(SAMPLED, top_k + 1), max(SAMPLED_MORE, top_k + 1), rows):
        if not len(open_S):
            break
        later = []
        sorts = count * WIDTH >= rows and open_S.device.type == "cpu"
        for part_S in open_S.split(_SORTED_ROWS if sorts else len(open_S)):
            values_SM = _descending(chunk, part_S, min(count, rows))
            scaled_SM = (values_SM - chunk.normaliser_N[part_S, None]) / temperature
            least_S, mass_S, known_S = _kept(scaled_SM, heated_N[part_S], top_p, top_k, min_p, rows)
            known = part_S[known_S]
            least_N[known], mass_N[known] = least_S[known_S], mass_S[known_S]
            later.append(part_S[~known_S])
        open_S = torch.cat(later)
    outside_N = chosen_N < least_N
    mass_N = torch.where(outside_N, torch.logaddexp(mass_N, chosen_N), mass_N)
    return usable((chosen_N - mass_N).float()), outside_N


def _kept(
    scaled_SM: Tensor, sum_S: Tensor, top_p: float, top_k: int, min_p: float, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(least, mass, known) of the set sampled from, by the M largest log-probabilities over temperature, the largest first: its
    least element, the log of its mass, and whether M were enough to tell. `sum_S`: over all rows, relative to the largest."""
    whole = scaled_SM.shape[-1] == rows
    parts_SM = (scaled_SM - scaled_SM[:, :1]).exp()
    inside_SM = torch.ones_like(parts_SM, dtype=torch.bool)
    known_S = torch.full_like(sum_S, whole, dtype=torch.bool)
    if whole:
        sum_S = parts_SM.sum(-1, dtype=torch.float64)
    if min_p > 0 or 0 < top_k < rows:
        least_S = torch.full_like(scaled_SM[:, 0], -_INF)
        if min_p > 0:
            least_S = scaled_SM[:, 0] + math.log(min_p)
        if 0 < top_k < rows:
            least_S = torch.maximum(least_S, scaled_SM[:, top_k - 1])
        inside_SM = scaled_SM >= least_S[:, None]
        known_S = known_S | ~inside_SM[:, -1]  # what follows is smaller than the last, and so outside too
        parts_SM = parts_SM * inside_SM
        sum_S = torch.where(known_S, parts_SM.sum(-1, dtype=torch.float64), sum_S)
        if top_p == 1:
            return _summary(scaled_SM, parts_SM, inside_SM, known_S)
    through_SM = parts_SM.cumsum(-1, dtype=torch.float64)
    enough_S = through_SM[:, -1] >= top_p * sum_S
    inside_SM = inside_SM & (through_SM - parts_SM < top_p * sum_S[:, None])
    inside_SM[:, 0] = True
    limited = min_p > 0 or 0 < top_k < rows
    known_S = known_S if limited else known_S | enough_S
    return _summary(scaled_SM, parts_SM * inside_SM, inside_SM, known_S)


def _summary(scaled_SM: Tensor, parts_SM: Tensor, inside_SM: Tensor, known_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    least_S = scaled_SM.gather(-1, inside_SM.sum(-1, keepdim=True) - 1)[:, 0]
    return least_S.double(), parts_SM.sum(-1, dtype=torch.float64).log() + scaled_SM[:, 0], known_S


def _descending(chunk: _Chunk, rows_S: Tensor, count: int) -> Tensor:
    """(S, count): the largest scores of these rows, the largest first."""
    every = len(rows_S) == len(chunk.scores_NV)
    scores_SV = chunk.scores_NV if every else chunk.scores_NV[rows_S]
    if count * WIDTH < scores_SV.shape[-1]:
        return largest(scores_SV, count, chunk.maxima_NB if every else chunk.maxima_NB[rows_S])[1]
    if scores_SV.device.type != "cpu":
        return scores_SV.topk(count).values if count < scores_SV.shape[-1] else scores_SV.sort(descending=True).values
    found = scores_SV.numpy()  # numpy sorts, and finds the largest, several times faster than torch does on a CPU
    if count < found.shape[-1]:
        found = np.partition(found, found.shape[-1] - count)[:, -count:]
    return torch.from_numpy(np.sort(found)[:, ::-1].copy())


def _ordered(values: Tensor) -> Tensor:
    """int64 keys (last axis: places): larger for larger values, and of equal values for the smaller place."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (bits << 32) - torch.arange(values.shape[-1], device=values.device)


def _blocks(scores_NV: Tensor) -> list[slice]:
    """Slices of the tokens: all at once on a GPU; on a CPU a few, never one of several (a sum of a single row is cut
    differently)."""
    count = len(scores_NV)
    fit = count if scores_NV.device.type != "cpu" else max(3, _BLOCK_BYTES // (4 * scores_NV.shape[-1]))
    edges = np.linspace(0, count, max(1, -(-count // max(1, fit))) + 1).astype(int).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(edges)]
