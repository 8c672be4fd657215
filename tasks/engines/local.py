"""The local backend: a transformers model in this process answers about completions, a chunk of tokens at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.engines import distributions, onepass
from tasks.engines.forward import LoadedModel
from tasks.engines.teacher import Host, Passage, Vocabulary
from tasks.losses.stop_ids import merge_ids
from tasks.signals import Ask, Values


class LocalModel:
    """A `Teacher` over a checkpoint. InputError for a checkpoint that does not load (see `LoadedModel`)."""

    def __init__(self, folder: Path, dtype: str, host: Host, quantization: str = "none") -> None:
        self._device, self._chunk_tokens = torch.device(host.device), host.chunk_tokens
        self._model: LoadedModel | None = LoadedModel(folder, dtype, self._device, host.devices, quantization)
        self._ahead: dict[tuple[int, ...], Tensor] | None = None

    @property
    def model(self) -> LoadedModel:
        assert self._model is not None, "closed"
        return self._model

    def check(self, passages: Sequence[Passage], names: Sequence[str]) -> None:
        """See `Teacher`, and `LoadedModel.check` for what is refused."""
        self.model.check([self._readable(passage) for passage in passages], names)

    def score(
        self,
        passages: Sequence[Passage],
        ask: Ask,
        vocabulary: Vocabulary,
        given: Mapping[int, Sequence[np.ndarray]],
    ) -> Values:
        """See `Teacher`. One forward of the passages; logits of `chunk_tokens` tokens exist at a time."""
        return answers(self._logits(passages), passages, ask, vocabulary, given, self._device)

    @torch.inference_mode()
    def distributions(self, passages: Sequence[Passage], vocabulary: Vocabulary) -> Iterator[Tensor]:
        """See `Teacher`."""
        for logits_NV, unread_N in self._logits(passages):
            logprobs_NV = distributions.log_probabilities(logits_NV, vocabulary.rows, vocabulary.stop_ids)
            yield logprobs_NV.masked_fill_(unread_N[:, None], float("nan"))

    @torch.inference_mode()
    def _logits(self, passages: Sequence[Passage]) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits_NV, unread_N) of a chunk of tokens at a time."""
        hidden_ND = self._hidden(passages)
        unread_N = self._unread(passages)
        for start in range(0, len(hidden_ND), self._chunk_tokens):
            chunk = slice(start, start + self._chunk_tokens)
            yield self.model.logits(hidden_ND[chunk]).to(self._device), unread_N[chunk]

    def read_ahead(self, batches: Sequence[Sequence[Passage]]) -> None:
        """Compute the hidden states of these batches, keep them on the host, and free the model but for its output head: what is
        asked about them later takes the memory of a head. Then it answers about these batches alone."""
        self._ahead = {_name(batch): self.model.hidden([self._readable(p) for p in batch]).cpu() for batch in batches}
        self.model.keep_head()
        self._collect()

    def _hidden(self, passages: Sequence[Passage]) -> Tensor:
        if self._ahead is None:
            return self.model.hidden([self._readable(passage) for passage in passages])
        return self._ahead[_name(passages)].to(self._device)

    def close(self) -> None:
        """Free the model."""
        self._model, self._ahead = None, None
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _readable(self, passage: Passage) -> Passage:
        """An id that the model lacks cannot be read; it stands as 0, and nothing after it counts (see `_unread`)."""
        rows = self.model.rows
        completion = np.asarray(passage.completion, np.int64)
        return Passage(passage.prompt, np.where(completion < rows, completion, 0))

    def _unread(self, passages: Sequence[Passage]) -> Tensor:
        """bool, per token: the model could not read a token before it."""
        found = []
        for passage in passages:
            foreign = np.asarray(passage.completion, np.int64) >= self.model.rows
            found.append(np.cumsum(foreign) - foreign > 0)
        return torch.from_numpy(np.concatenate(found)).to(self._device)


def answers(
    chunks: Iterator[tuple[Tensor, Tensor | None]],
    passages: Sequence[Passage],
    ask: Ask,
    vocabulary: Vocabulary,
    given: Mapping[int, Sequence[np.ndarray]],
    device: torch.device,
    normalised: bool = False,
) -> Values:
    """What `Teacher.score` returns, from the scores of the passages' tokens, a chunk at a time: logits over all rows of a model,
    and which tokens' are unusable; or, `normalised`, log-probabilities (N, rows). The distribution sampled from is that of single
    ids, as the sampler records it: it is never merged."""
    ids_N = _tensor([passage.completion for passage in passages], device)
    merged_N = merge_ids(ids_N, vocabulary.stop_ids)
    given_NK = {k: _tensor(given[k], device) for k in ask.on}
    answer = onepass.answer if vocabulary.rows >= onepass.LARGE else _plain_answer
    parts: dict[str, list[np.ndarray]] = {}
    start = 0
    with torch.inference_mode():
        for scores_NV, unread_N in chunks:
            chunk = slice(start, start := start + len(scores_NV))
            some = {k: ids_NK[chunk] for k, ids_NK in given_NK.items()}
            found = answer(
                scores_NV, unread_N, ids_N[chunk], merged_N[chunk], ask, vocabulary, some, normalised=normalised
            )
            for name, value in found.items():
                parts.setdefault(name, []).append(value.cpu().numpy())
            del scores_NV  # before the next chunk's are made
    edges = np.cumsum([len(passage.completion) for passage in passages])[:-1]
    return {name: np.split(np.concatenate(arrays), edges) for name, arrays in parts.items()}


def _name(passages: Sequence[Passage]) -> tuple[int, ...]:
    """A batch, by its passages: the same objects are asked about again."""
    return tuple(map(id, passages))


def _tensor(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(array, np.int64) for array in arrays])).to(device)


def _plain_answer(
    scores_NV: Tensor,
    unread_N: Tensor | None,
    ids_N: Tensor,
    merged_N: Tensor,
    ask: Ask,
    vocabulary: Vocabulary,
    given_NK: Mapping[int, Tensor],
    normalised: bool,
) -> dict[str, Tensor]:
    """As `onepass.answer`, by a pass over the vocabulary for every step: for small ones."""
    logprobs_NV = single_NV = scores_NV
    if not normalised:
        copy_NV = scores_NV.clone() if ask.sampling and vocabulary.stop_ids else None
        logprobs_NV = single_NV = distributions.log_probabilities(scores_NV, vocabulary.rows, vocabulary.stop_ids)
        if copy_NV is not None:
            single_NV = distributions.log_probabilities(copy_NV, vocabulary.rows)
    if unread_N is not None:
        logprobs_NV.masked_fill_(unread_N[:, None], float("nan"))
        single_NV.masked_fill_(unread_N[:, None], float("nan"))
    found: dict[str, Tensor] = {}
    if ask.logprobs:
        found["logprobs"] = distributions.of_tokens(logprobs_NV, merged_N[:, None])[:, 0]
    if ask.entropy:
        found["entropy"] = distributions.entropy(logprobs_NV)
    for k in sorted(ask.top):
        ids_NK, top_NK, valid_N = distributions.top(logprobs_NV, k, vocabulary.shared)
        found |= {f"top{k}_ids": ids_NK, f"top{k}_logprobs": top_NK, f"top{k}_valid": valid_N}
        found[f"top{k}_tail"] = distributions.tail_logmass(logprobs_NV, ids_NK)
    for k, ids_NK in given_NK.items():
        found[f"on{k}_logprobs"] = distributions.of_tokens(logprobs_NV, ids_NK)
        found[f"on{k}_tail"] = distributions.tail_logmass(logprobs_NV, ids_NK)
    if ask.sampling:
        found["behaviour_logprobs"], found["outside"] = distributions.sampling_logprobs(
            single_NV, ids_N, **ask.sampling
        )
    return found
