"""The teacher that a server is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from storage.disk.files import publish_exclusively, seal
from storage.errors import ConfigError
from tasks.engines.hf_folder import model_rows
from tasks.engines.listed import Listed, candidates, readable, refuse_unreadable, unfold, values_of
from tasks.engines.server.answers import Malformed, read_answer
from tasks.engines.server.client import Client, Failed, Refused, TeacherServerError, body_of, key_hint
from tasks.engines.server.offers import offers
from tasks.engines.server.probes import (
    PROBE_TOKENS,
    PROBES,
    finite,
    of_checkpoint,
    probe_sequences,
    record_path,
    recorded,
    refuse_other,
)
from tasks.engines.teacher import Host, Passage, ServerTeacher, Vocabulary
from tasks.signals import Ask, Values
from tasks.workers.runtime import TeacherServerRuntime

if TYPE_CHECKING:
    from torch import Tensor


class ServerModel:
    """A `Teacher` behind a server. ConfigError for a server that cannot give what the config says, OtherTeacher for another
    model, TeacherServerError when it gives no answer."""

    def __init__(self, folder: Path, dtype: str, host: Host, backend: ServerTeacher) -> None:
        self.rows, self.backend, self._dtype = model_rows(folder), backend, dtype
        self._settings = TeacherServerRuntime.model_validate(host.settings.get("server") or {})
        self._offers = offers(backend, self._settings, self.rows)
        self._client = Client([offer.url for offer in self._offers], self._settings)
        self._names: dict[int, str] = {}
        if host.store is None:
            raise TypeError("a server's model is opened for a job, whose store keeps the record of its answers")
        self._record = record_path(host.store, host.weights, backend)
        self._expected = self._known(folder, dtype, host)
        for offer in self._offers:
            self._prove(offer.url)

    def _known(self, folder: Path, dtype: str, host: Host) -> list[float]:
        """The recorded answers to the probes; those of the checkpoint, or of the server itself, where there is no record."""
        assert host.store is not None
        known = recorded(host.store, host.weights, self.backend)
        if known is None:
            here = any(folder.glob("*.safetensors"))
            values = of_checkpoint(folder, dtype, host, self.rows) if here else self._answers_to_probes()
            self._record.parent.mkdir(exist_ok=True)
            known = {"model": self.backend.model, "of": "checkpoint" if here else "server", "logprobs": values}
            if not publish_exclusively(self._record, seal(known)):  # another worker was faster
                known = recorded(host.store, host.weights, self.backend)
                assert known is not None
        return list(known["logprobs"])

    def _answers_to_probes(self, url: str | None = None) -> list[float]:
        sequences = probe_sequences(self.rows)
        try:
            data = self._client.send("/v1/completions", body_of(self.backend.model, sequences, 0), only=url)
            listed = read_answer(data, sequences, [PROBE_TOKENS - 1] * PROBES, 0)
        except (Refused, Failed, Malformed) as error:
            self._give_up("the probes of the model", error)
        return finite(
            [float(value) for one in listed for value in one.logprobs_T], f"the server's {self.backend.model!r}"
        )

    def _prove(self, url: str | None = None) -> None:
        refuse_other(self._expected, self._answers_to_probes(url), self._dtype, self.backend, self._record)

    def check(self, passages: Sequence[Passage], names: Sequence[str]) -> None:
        """See `Teacher`: empty prompts, ids that the model lacks, and passages that leave no room for the one token that a server
        must generate."""
        limit = min((offer.length for offer in self._offers if offer.length), default=None)
        self._names = {}
        for passage, name in zip(passages, names, strict=True):
            self._names[id(passage)] = name
            refuse_unreadable(passage, name, self.rows, limit, f"the server's {self.backend.model!r} (--max-model-len)")

    def score(
        self,
        passages: Sequence[Passage],
        ask: Ask,
        vocabulary: Vocabulary,
        given: Mapping[int, Sequence[np.ndarray]],
    ) -> Values:
        """See `Teacher`. Several requests at once; afterwards the model is proven again, so that no answer of another one that
        took its place meanwhile is used."""
        k = candidates(ask, self.backend.entropy_k, self.rows)
        longest = min((offer.longest for offer in self._offers if offer.longest is not None), default=k)
        if k > longest:
            raise ConfigError(
                f"supervise.teacher: {k} candidates are needed (the objective's k; entropies: entropy_k"
                f" {self.backend.entropy_k}), but the server gives {longest}; start it with --max-logprobs {k} (or -1)"
            )
        size = self._settings.sequences
        groups = [passages[start : start + size] for start in range(0, len(passages), size)]
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            parts = list(pool.map(lambda group: self._answers(group, k), groups))
        finally:
            pool.shutdown(cancel_futures=True)
        for offer in self._offers:
            self._prove(offer.url if len(self._offers) > 1 else None)
        return values_of([one for part in parts for one in part], ask, vocabulary, self.backend.entropy_k)

    def _answers(self, group: Sequence[Passage], k: int) -> list[Listed]:
        """The answers to a request, or where it fails those to its halves."""
        sent = [readable(passage, self.rows) for passage in group]
        sequences, counts = [ids for ids, _ in sent], [count for _, count in sent]
        body = body_of(self.backend.model, sequences, k)
        try:
            data = self._client.send("/v1/completions", body, tries=1 if len(group) > 1 else None)
            listed = read_answer(data, sequences, counts, k)
        except (Refused, Failed, Malformed) as error:
            if len(group) == 1 or (isinstance(error, Failed) and error.gone):
                self._give_up(", ".join(self._names.get(id(passage), "a sample") for passage in group), error)
            middle = len(group) // 2
            return [*self._answers(group[:middle], k), *self._answers(group[middle:], k)]
        return [unfold(one, passage, self.rows) for one, passage in zip(listed, group, strict=True)]

    def _give_up(self, what: str, error: Exception) -> NoReturn:
        if isinstance(error, Refused):
            why = f"the server refuses it ({error}{key_hint(error, self._settings)})"
        elif isinstance(error, Malformed):
            why = f"the server's answer cannot be used: {error}"
        else:
            why = f"no answer at {self._settings.retries + 1} tries (the last: {error})"
        raise TeacherServerError(
            f"supervise.teacher: {what}: {why}. Finished shards are kept; when the server is well again: opd resume"
        ) from error

    def distributions(self, passages: Sequence[Passage], vocabulary: Vocabulary) -> Iterator[Tensor]:
        """Not to be had from a server (`Capabilities`)."""
        raise ConfigError("supervise.teacher: kind server cannot give its whole distribution")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
