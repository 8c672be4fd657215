"""What the servers of a teacher can give: vocabulary, lengths of sequences and of lists."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from storage.errors import ConfigError
from tasks.engines.server.answers import Completion, Models, decoded, value_of
from tasks.engines.server.client import Client, Failed, Refused, TeacherServerError, body_of, key_hint
from tasks.engines.teacher import ServerTeacher
from tasks.signals.tables import LOGPROB_MAX
from tasks.workers.runtime import TeacherServerRuntime

_LIMIT = re.compile(r"logprobs of (\d+), which is greater than max allowed: (\d+)")


@dataclass(frozen=True)
class Offer:
    """What one server can give."""

    url: str
    model: str
    length: int | None
    """tokens of its longest sequence, the generated one included"""
    rows: int | None
    """ids of its vocabulary"""
    longest: int | None
    """candidates of its longest list"""

    def __str__(self) -> str:
        def shown(number: int | None) -> str:
            return "an unknown number of" if number is None else f"{number:,}"

        return (
            f"{self.url} serves {self.model!r}: sequences of up to {shown(self.length)} tokens, {shown(self.rows)} ids, the"
            f" {shown(self.longest)} likeliest tokens with log-probabilities at temperature 1; not: log-probabilities of given"
            " ids, exact entropies, the whole distribution"
        )


def offers(backend: ServerTeacher, settings: TeacherServerRuntime, rows: int, brief: bool = False) -> list[Offer]:
    """What each server of `settings.urls` that has the model can give. `brief`: with one try and a short timeout.

    ConfigError without an address, for a model that none of them has, and for a vocabulary other than `rows`; TeacherServerError
    when none answers."""
    if not settings.urls:
        raise ConfigError(
            "runtime.scorer.server.urls: empty, but supervise.teacher is kind: server; give the address of the vLLM server,"
            " for example [http://127.0.0.1:8000]"
        )
    if brief:
        settings = settings.model_copy(update={"timeout": min(settings.timeout, 10.0), "retries": 0})
    client = Client(settings.urls, settings)
    try:
        found: list[Offer] = []
        problems: list[str] = []
        for url in settings.urls:
            try:
                found += _offers_of(client, url, backend)
            except Failed as error:
                problems.append(str(error))
            except Refused as error:
                problems.append(f"{url}: {error}{key_hint(error, settings)}")
    finally:
        client.close()
    if problems and not any(offer.model == backend.model for offer in found):
        raise TeacherServerError(
            f"supervise.teacher: no answer from the teacher's server ({'; '.join(problems)}); start it, or correct"
            " runtime.scorer.server.urls"
        )
    fitting = [offer for offer in found if offer.model == backend.model]
    if not fitting:
        names = ", ".join(repr(offer.model) for offer in found) or "nothing"
        raise ConfigError(
            f"supervise.teacher.model: {', '.join(settings.urls)} serve {names}, not {backend.model!r}; correct the name, or"
            f" start the server with --served-model-name {backend.model}"
        )
    for offer in fitting:
        if offer.rows is not None and offer.rows != rows:
            raise ConfigError(
                f"supervise.teacher: {offer.url} serves {backend.model!r} with {offer.rows:,} ids, but the model of `teacher:`"
                f" has {rows:,}; serve that model"
            )
    return fitting


def _offers_of(client: Client, url: str, backend: ServerTeacher) -> Iterator[Offer]:
    models = decoded(client.send("/v1/models", only=url), Models, f"{url}/v1/models")
    for model in models.data:
        if model.id != backend.model:
            yield Offer(url, model.id, model.max_model_len, None, None)
            continue
        rows, longest = None, None
        try:
            # asks for the whole vocabulary: the refusal has its size and the limit
            data = client.send("/v1/completions", body_of(model.id, [[0, 0]], -1), only=url)
        except Refused as error:
            if (limit := _LIMIT.search(error.message)) is None:
                raise
            rows, longest = int(limit[1]), int(limit[2])
        else:
            place = (decoded(data, Completion, url).choices[0].prompt_logprobs or [None])[-1] or {}
            rows = longest = len(place)
            if place and abs(sum(math.exp(value_of(entry)) for entry in place.values()) - 1) > LOGPROB_MAX * 10:
                raise ConfigError(
                    f"supervise.teacher: what {url} gives does not sum to 1 over its vocabulary, so these are no"
                    " log-probabilities at temperature 1; start the server with --logprobs-mode raw_logprobs"
                )
        yield Offer(url, model.id, model.max_model_len, rows, longest)
