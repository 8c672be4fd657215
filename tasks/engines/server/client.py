"""HTTP requests to a teacher's servers: addresses in turn, waits, keys, and what is sent."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from storage.errors import OpdError
from tasks.workers.runtime import TeacherServerRuntime

_LONGEST_WAIT = 60.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP codes of problems that may pass."""


class TeacherServerError(OpdError):
    """The teacher's server gave no usable answer at any try."""


class Refused(Exception):
    """A request that the server understood and will not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status, self.message = status, message


class Failed(Exception):
    """A request without an answer at any try. `gone`: there was no server to give one."""

    def __init__(self, problem: str, gone: bool) -> None:
        super().__init__(problem)
        self.gone = gone


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
        address to ask. Raises Refused, Failed."""
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
                    raise Refused(response.status_code, _message(response))
                problem, gone = f"{url}: HTTP {response.status_code}: {_message(response)}", False
            answered += 1
            if answered >= tries:
                break
        raise Failed(problem, gone)

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


def body_of(model: str, sequences: Sequence[Sequence[int]], k: int) -> dict[str, Any]:
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


def key_hint(error: Refused, settings: TeacherServerRuntime) -> str:
    if error.status not in (401, 403):
        return ""
    there = "is set" if os.environ.get(settings.key_variable) else "is not set"
    return f" (the key is read from the environment variable {settings.key_variable}, which {there})"
