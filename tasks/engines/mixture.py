"""Several local models that answer as one: the weighted average of their distributions over the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.engines import distributions
from tasks.engines.local import LocalModel, answers
from tasks.engines.teacher import Host, Passage, Vocabulary
from tasks.signals import Ask, Values
from tasks.workers.jobs import MemberRef


class MixtureModel:
    """A `Teacher` over members that read the same tokens. They are opened when first asked; after `read_ahead` only their output
    heads are in memory."""

    def __init__(
        self, members: Sequence[MemberRef], average: str, dtype: str, host: Host, quantization: str = "none"
    ) -> None:
        self._members, self._average, self._dtype, self._host = list(members), average, dtype, host
        self._quantization = quantization
        self._device = torch.device(host.device)
        self._models: list[LocalModel] = []
        self._unchecked: tuple[Sequence[Passage], Sequence[str]] = ((), ())

    def _opened(self) -> list[LocalModel]:
        if not self._models:
            self._models = [self._open(member) for member in self._members]
        return self._models

    def _open(self, member: MemberRef) -> LocalModel:
        model = LocalModel(Path(member.path), self._dtype, self._host, self._quantization)
        model.check(*self._unchecked)
        return model

    def check(self, passages: Sequence[Passage], names: Sequence[str]) -> None:
        """See `Teacher`: each member must be able to read them. A member that is not open yet is asked when it is opened."""
        self._unchecked = (passages, names)
        for model in self._models:
            model.check(passages, names)

    def score(
        self,
        passages: Sequence[Passage],
        ask: Ask,
        vocabulary: Vocabulary,
        given: Mapping[int, Sequence[np.ndarray]],
    ) -> Values:
        """See `Teacher`."""
        chunks = ((logprobs_NV, None) for logprobs_NV in self.distributions(passages, vocabulary))
        return answers(chunks, passages, ask, vocabulary, given, self._device, normalised=True)

    @torch.inference_mode()
    def distributions(self, passages: Sequence[Passage], vocabulary: Vocabulary) -> Iterator[Tensor]:
        """See `Teacher`. Members are normalised over the rows asked for, which are those that all have; a token that any member
        could not read is NaN."""
        chunks = [model.distributions(passages, vocabulary) for model in self._opened()]
        weights = [member.weight for member in self._members]
        for parts in zip(*chunks, strict=True):
            yield mixed(list(parts), weights, self._average)

    def read_ahead(self, batches: Sequence[Sequence[Passage]]) -> None:
        """See `LocalModel.read_ahead`; members are loaded one after the other."""
        for model in self._models:
            model.close()
        self._models = []
        for member in self._members:
            model = self._open(member)
            model.read_ahead(batches)
            self._models.append(model)

    def close(self) -> None:
        """Free the members."""
        for model in self._models:
            model.close()
        self._models = []


def mixed(logprobs_NV: Sequence[Tensor], weights: Sequence[float], average: str) -> Tensor:
    """Log-probabilities (N, V) of the average of distributions given by theirs: of probabilities (`probs`), or of
    log-probabilities, normalised (`logprobs`). An id that one member excludes has the others' share in the first, none in the
    second. Positions with NaN stay NaN."""
    if average == "probs":
        shares = [part + math.log(weight) for part, weight in zip(logprobs_NV, weights, strict=True)]
        return torch.stack(shares).logsumexp(0)
    total = sum(part * weight for part, weight in zip(logprobs_NV, weights, strict=True))
    assert isinstance(total, Tensor)
    return distributions.log_probabilities(total)
