"""A teacher behind `vllm serve`: token ids go in, the log-probabilities of the prompt come back (`POST /v1/completions` with
`prompt_logprobs`, one generated token). No torch; the server does the arithmetic.

Which model answers is proven by fixed sequences of token ids: their log-probabilities are computed from the checkpoint where its
weights are here, else they are those that the server first gave. They are kept in the store (`teachers/`), and compared whenever
a scorer opens the teacher and after every batch of answers. The temperature is 1 and nothing else acts on logits.

A request has several sequences. One that fails is halved, down to the sequence that fails alone, which ends the stage by its
name; nothing is made up in its place."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import httpx
import msgspec
import numpy as np

from storage.disk.files import publish_exclusively, seal, unseal
from storage.errors import ConfigError, CorruptArtifact, InputError, OpdError
from storage.identity import canonical_json, derive_seed
from tasks.engines.hf_folder import model_rows
from tasks.engines.listed import Listed, candidates, readable, unfold, values_of
from tasks.engines.teacher import Host, Passage, ServerTeacher, Vocabulary
from tasks.signals import Ask, Values
from tasks.signals.tables import LOGPROB_MAX
from tasks.workers.runtime import TeacherServerRuntime

if TYPE_CHECKING:
    from torch import Tensor

RECORDS = "teachers"
"""Folder of the store with what teachers behind a server answered to the probes."""
PROBES = 2
PROBE_TOKENS = 16
TOLERANCE = {"float32": 1e-3}
"""By the server's dtype: mean difference of the probes' log-probabilities, in nats, that rounding explains."""
TOLERANCE_LOW_PRECISION = 0.1
_FLOOR = -9999.0
"""What vLLM writes for -inf, which JSON does not have."""
_LONGEST_WAIT = 60.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP codes of problems that may pass."""
_LIMIT = re.compile(r"logprobs of (\d+), which is greater than max allowed: (\d+)")


class TeacherServerError(OpdError):
    """The teacher's server gave no usable answer at any try."""


class OtherTeacher(InputError):
    """The server answers as another model than the one that is recorded."""


class _Refused(Exception):
    """A request that the server understood and will not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status, self.message = status, message


class _Failed(Exception):
    """A request without an answer at any try. `gone`: there was no server to give one."""

    def __init__(self, problem: str, gone: bool) -> None:
        super().__init__(problem)
        self.gone = gone


class _Logprob(msgspec.Struct):
    logprob: float
    rank: int | None = None


class _Choice(msgspec.Struct):
    index: int
    prompt_logprobs: list[dict[int, _Logprob] | None] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


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


# --- requests --------------------------------------------------------------------------------------------------------


class Client:
    """HTTP to the servers of one model. Requests go to the addresses in turn; one that fails goes to the next after a wait."""

    def __init__(self, urls: Sequence[str], settings: TeacherServerRuntime) -> None:
        self.urls, self._settings = list(urls), settings
        key = os.environ.get(settings.key_variable)
        limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(settings.timeout, connect=min(10.0, settings.timeout), pool=None),
            limits=limits,
            trust_env=not all(_loopback(url) for url in urls),  # a proxy is no way to this machine
        )
        self._turn = 0

    def send(self, path: str, body: Any = None, tries: int | None = None, only: str | None = None) -> bytes:
        """The body of the answer. `tries`: of problems that the server answers with (default: the settings'); `only`: the one
        address to ask. Raises _Refused, _Failed."""
        allowed = self._settings.retries + 1
        tries = min(tries or allowed, allowed)
        urls = [only] if only is not None else self.urls
        first, self._turn = self._turn, self._turn + 1
        answered = 0
        problem, gone = "", False
        for attempt in range(allowed):
            if attempt:
                time.sleep(min(self._settings.backoff * 2 ** (attempt - 1), _LONGEST_WAIT))
            url = urls[(first + attempt) % len(urls)]
            try:
                response = self._http.request("GET" if body is None else "POST", url + path, json=body)
            except httpx.TimeoutException:
                problem, gone = f"{url}: no answer within {self._settings.timeout:g} s", False
            except httpx.TransportError as error:
                problem, gone = f"{url}: {type(error).__name__}: {error}", True
                continue
            else:
                if response.status_code == 200:
                    return response.content
                if response.status_code not in _PASSING:
                    raise _Refused(response.status_code, _message(response))
                problem, gone = f"{url}: HTTP {response.status_code}: {_message(response)}", False
            answered += 1
            if answered >= tries:
                break
        raise _Failed(problem, gone)

    def close(self) -> None:
        self._http.close()


def _loopback(url: str) -> bool:
    return (urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")


def _message(response: httpx.Response) -> str:
    try:
        found = response.json()
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(text.split())[:300] or response.reason_phrase


def _body(model: str, sequences: Sequence[Sequence[int]], k: int) -> dict[str, Any]:
    """Everything that could act on logits is stated, because a server may have defaults of its own."""
    return {
        "model": model,
        "prompt": [list(ids) for ids in sequences],
        "max_tokens": 1,
        "prompt_logprobs": k,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "add_special_tokens": False,
        "stream": False,
    }


# --- answers ---------------------------------------------------------------------------------------------------------


class _Malformed(Exception):
    """An answer that does not hold what was asked."""


def read_answer(data: bytes, sequences: Sequence[Sequence[int]], counts: Sequence[int], k: int) -> list[Listed]:
    """The last `counts[i]` tokens of every sequence with their k candidates. _Malformed for less than was asked."""
    try:
        answer = msgspec.json.decode(data, type=_Completion)
    except msgspec.DecodeError as error:
        raise _Malformed(f"it is not what /v1/completions of vLLM answers ({error})") from error
    choices = {choice.index: choice for choice in answer.choices}
    if sorted(choices) != list(range(len(sequences))):
        raise _Malformed(f"it has {len(answer.choices)} sequences, asked for {len(sequences)}")
    found = []
    for index, (ids, count) in enumerate(zip(sequences, counts, strict=True)):
        places = choices[index].prompt_logprobs
        if places is None or len(places) != len(ids):
            raise _Malformed(f"it has {len(places or ())} tokens with log-probabilities, asked for {len(ids)}")
        if not count:
            found.append(Listed.empty(k))
            continue
        rows = [_read_place(places[at], ids[at], at, k) for at in range(len(ids) - count, len(ids))]
        found.append(
            Listed(
                np.array([row[0] for row in rows], np.float32),
                np.array([row[1] for row in rows], np.int64).reshape(count, k),
                np.array([row[2] for row in rows], np.float32).reshape(count, k),
            )
        )
    return found


def _read_place(
    place: Mapping[int, _Logprob] | None, token: int, at: int, k: int
) -> tuple[float, list[int], list[float]]:
    if place is None or token not in place:
        raise _Malformed(f"token {at} of a sequence has no log-probability of the token {token} itself")
    own, rank = _value(place[token]), place[token].rank
    # the token itself comes on top of the candidates, unless it is one of them
    among = rank <= k if rank is not None else len(place) == k
    kept = {other: entry for other, entry in place.items() if among or other != token}
    if len(kept) != k:
        raise _Malformed(f"token {at} of a sequence has {len(kept)} candidates, asked for {k}")
    order = sorted(kept.items(), key=lambda pair: (-_value(pair[1]), pair[1].rank or 0))
    values = [_value(entry) for _, entry in order]
    if values and (values[0] > LOGPROB_MAX or sum(map(math.exp, values)) > 1 + LOGPROB_MAX):
        raise _Malformed(
            f"the candidates of token {at} have a mass above 1: these are no log-probabilities; start the server with"
            " --logprobs-mode raw_logprobs"
        )
    return own, [other for other, _ in order], values


def _value(entry: _Logprob) -> float:
    return -math.inf if entry.logprob <= _FLOOR else entry.logprob


# --- what a server can give ------------------------------------------------------------------------------------------


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
            except _Failed as error:
                problems.append(str(error))
            except _Refused as error:
                problems.append(f"{url}: {error}{_key_hint(error, settings)}")
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
    models = _decoded(client.send("/v1/models", only=url), _Models, f"{url}/v1/models")
    for model in models.data:
        if model.id != backend.model:
            yield Offer(url, model.id, model.max_model_len, None, None)
            continue
        rows, longest = None, None
        try:
            # asks for the whole vocabulary: the refusal has its size and the limit
            data = client.send("/v1/completions", _body(model.id, [[0, 0]], -1), only=url)
        except _Refused as error:
            if (limit := _LIMIT.search(error.message)) is None:
                raise
            rows, longest = int(limit[1]), int(limit[2])
        else:
            place = (_decoded(data, _Completion, url).choices[0].prompt_logprobs or [None])[-1] or {}
            rows = longest = len(place)
            if place and abs(sum(math.exp(_value(entry)) for entry in place.values()) - 1) > LOGPROB_MAX * 10:
                raise ConfigError(
                    f"supervise.teacher: what {url} gives does not sum to 1 over its vocabulary, so these are no"
                    " log-probabilities at temperature 1; start the server with --logprobs-mode raw_logprobs"
                )
        yield Offer(url, model.id, model.max_model_len, rows, longest)


def _key_hint(error: _Refused, settings: TeacherServerRuntime) -> str:
    if error.status not in (401, 403):
        return ""
    there = "is set" if os.environ.get(settings.key_variable) else "is not set"
    return f" (the key is read from the environment variable {settings.key_variable}, which {there})"


def _decoded(data: bytes, kind: Any, where: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise TeacherServerError(f"supervise.teacher: {where} does not answer as vLLM does ({error})") from error


# --- which model answers ---------------------------------------------------------------------------------------------


def probe_sequences(rows: int) -> list[list[int]]:
    """Token ids that are the same in every run; a function of the vocabulary's size alone."""
    return [[derive_seed("served", i, j) % rows for j in range(PROBE_TOKENS)] for i in range(PROBES)]


def record_path(store: Path, weights: str, backend: ServerTeacher) -> Path:
    name = hashlib.sha256(canonical_json([weights, backend.model]).encode()).hexdigest()[:16]
    return store / RECORDS / f"{name}.json"


def recorded(store: Path, weights: str, backend: ServerTeacher) -> dict[str, Any] | None:
    """What the server of this teacher answered, or must answer, to the probes; None before it was asked. CorruptArtifact, with
    what to do, for a damaged record."""
    path = record_path(store, weights, backend)
    try:
        return unseal(path)
    except FileNotFoundError:
        return None
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}; remove it, then the next start records the server's answers again") from error


def refuse_other(
    expected: Sequence[float], found: Sequence[float], dtype: str, backend: ServerTeacher, record: Path
) -> None:
    """OtherTeacher for answers to the probes that differ by more than rounding."""
    gap = float(np.abs(np.array(expected) - np.array(found)).mean()) if len(expected) == len(found) else math.inf
    limit = TOLERANCE.get(dtype, TOLERANCE_LOW_PRECISION)
    if not gap <= limit:
        raise OtherTeacher(
            f"supervise.teacher: the server's {backend.model!r} is not the model that was asked before: its log-probabilities of"
            f" the probes differ by {gap:.3g} nats on average (at most {limit:g} in {dtype}; {record}). Serve the old model and"
            " `opd resume`; for another teacher, name it in `teacher:`, or under another supervise.teacher.model"
        )


# --- the teacher -----------------------------------------------------------------------------------------------------


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
            values = _of_checkpoint(folder, dtype, host, self.rows) if here else self._answers_to_probes()
            self._record.parent.mkdir(exist_ok=True)
            known = {"model": self.backend.model, "of": "checkpoint" if here else "server", "logprobs": values}
            if not publish_exclusively(self._record, seal(known)):  # another worker was faster
                known = recorded(host.store, host.weights, self.backend)
                assert known is not None
        return list(known["logprobs"])

    def _answers_to_probes(self, url: str | None = None) -> list[float]:
        sequences = probe_sequences(self.rows)
        try:
            data = self._client.send("/v1/completions", _body(self.backend.model, sequences, 0), only=url)
            listed = read_answer(data, sequences, [PROBE_TOKENS - 1] * PROBES, 0)
        except (_Refused, _Failed, _Malformed) as error:
            self._give_up("the probes of the model", error)
        return _finite(
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
        body = _body(self.backend.model, sequences, k)
        try:
            data = self._client.send("/v1/completions", body, tries=1 if len(group) > 1 else None)
            listed = read_answer(data, sequences, counts, k)
        except (_Refused, _Failed, _Malformed) as error:
            if len(group) == 1 or (isinstance(error, _Failed) and error.gone):
                self._give_up(", ".join(self._names.get(id(passage), "a sample") for passage in group), error)
            middle = len(group) // 2
            return [*self._answers(group[:middle], k), *self._answers(group[middle:], k)]
        return [unfold(one, passage, self.rows) for one, passage in zip(listed, group, strict=True)]

    def _give_up(self, what: str, error: Exception) -> NoReturn:
        if isinstance(error, _Refused):
            why = f"the server refuses it ({error}{_key_hint(error, self._settings)})"
        elif isinstance(error, _Malformed):
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


def refuse_unreadable(passage: Passage, name: str, rows: int, limit: int | None, what: str) -> None:
    """InputError for a passage without a prompt, with an id of the prompt that the model lacks, or too long for `limit` tokens
    with the one that an engine must generate."""
    if not len(passage.prompt):
        raise InputError(f"{name}: a prompt without tokens; nothing predicts its completion's first token")
    if np.max(passage.prompt) >= rows or np.min(passage.prompt) < 0:
        raise InputError(f"{name}: token id {np.max(passage.prompt)}, but the teacher has {rows} rows")
    length = len(passage.prompt) + len(passage.completion) + 1
    if limit is not None and length > limit:
        raise InputError(
            f"{name}: {length - 1} tokens of prompt and completion and one that is generated, but {what} reads {limit}; lower"
            " rollout.max_completion_length or prompts.max_prompt_length, or let it read more"
        )


def _of_checkpoint(folder: Path, dtype: str, host: Host, rows: int) -> list[float]:
    """Log-probabilities of the probes by transformers: once per store and teacher."""
    from tasks.engines.local import LocalModel

    passages = [Passage(np.array(ids[:1]), np.array(ids[1:])) for ids in probe_sequences(rows)]
    model = LocalModel(folder, dtype, host)
    try:
        found = model.score(passages, Ask(logprobs=True), Vocabulary(rows, rows), {})
    finally:
        model.close()
    return _finite([float(value) for array in found["logprobs"] for value in array], str(folder))


def _finite(values: list[float], what: str) -> list[float]:
    """The log-probabilities of the probes; InputError for a model that gives none to ids of its own vocabulary."""
    if not all(map(math.isfinite, values)):
        raise InputError(
            f"supervise.teacher: {what} gives log-probabilities that are not finite to ids of its vocabulary"
        )
    return values
