"""Secrets: refused in configs, and removed from every line that is shown or stored.

A secret here is: user and password in a URL, a query parameter with a name like `token`, a token in a known format
(Hugging Face, OpenAI, GitHub, AWS, Prefect), the value after a name like `api_key:`, and the value of an environment
variable with such a name (HF_TOKEN, PREFECT_API_KEY, ..._SECRET). This prevents accidents only: a password without such
context is not recognised."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

HIDDEN = "***"
_SHORTEST = 8
"""Shorter values of environment variables are not treated as secrets (true, 1, debug)."""
_ENVIRONMENT = re.compile(
    r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH_STRING|PAT)($|_)", re.IGNORECASE
)
_NAMES = (
    r"(?:[\w-]*(?:api[_-]?key|access[_-]?key|secret|passw(?:or)?d|passphrase)[\w-]*"
    r"|(?:hf|hub|auth|access|refresh|bearer|id|api)[_-]token)"
)
_PATTERNS = {
    # A URL treated as a path has one slash. A password may contain an @: the last one before the host counts.
    "user and password in a URL": re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]*:/{1,2})[^\s/?#'\"<>]+(?=@[^\s/@]+)", re.I),
    "a token in a URL": re.compile(
        r"(?P<keep>[?&;][\w.-]*(?:token|key|secret|passw(?:or)?d|signature|credential|auth|sig)[\w.-]*=)[^\s&#;'\"<>]+",
        re.I,
    ),
    "a token": re.compile(
        r"(?P<keep>)(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
        r"|github_pat_\w{20,}|pn[ub]_[A-Za-z0-9]{16,}|A(?:KIA|SIA)[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{10,}"
        r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
    ),
    "a password or key": re.compile(
        rf"(?P<keep>(?<![\w-]){_NAMES}['\"]?\s*[:=]\s*['\"]?|\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+)"
        r"(?!None\b|null\b)[^\s,;'\"}]+",
        re.I,
    ),
}
"""Kind of secret -> the text to hide, except what the group `keep` matches."""


def redact(text: str) -> str:
    """The text with its secrets replaced by ***."""
    for value in _from_environment(tuple(sorted(_secret_values()))):
        text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS.values():
        text = pattern.sub(lambda found: found["keep"] + HIDDEN, text)
    return text


def secret_in(text: str) -> str | None:
    """The kind of secret in the text, without repeating it; None if there is none."""
    for name, value in sorted(os.environ.items()):
        if _is_secret(name, value) and value in text:
            return f"the value of the environment variable {name}"
    return next((what for what, pattern in _PATTERNS.items() if pattern.search(text)), None)


def secrets_in(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(field, kind of secret) of every string with a secret in nested mappings and lists, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            if (what := secret_in(str(key))) is not None:
                yield where or "(whole config)", f"{what} in the name of a field"
            else:
                yield from secrets_in(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from secrets_in(item, f"{where}.{index}")
    elif isinstance(value, str) and (what := secret_in(value)) is not None:
        yield where, what


class RedactedStream:
    """A text stream that redacts what is written to it; everything else is passed to the stream below."""

    def __init__(self, below: TextIO) -> None:
        self._below = below

    def write(self, text: str) -> int:
        self._below.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


class RedactedFormatter(logging.Formatter):
    """Log lines without secrets, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_output(*names: str) -> None:
    """Redacts what this process's Python code writes to these streams ("stdout", "stderr") from now on."""
    for name in names:
        stream = getattr(sys, name)
        if not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))


def _secret_values() -> set[str]:
    return {value for name, value in os.environ.items() if _is_secret(name, value)}


def names_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret (HF_TOKEN, OPD_TEACHER_API_KEY)."""
    return _ENVIRONMENT.search(variable) is not None


def _is_secret(name: str, value: str) -> bool:
    """Paths are not secrets, although they may lead to some (SSH_KEY_PATH)."""
    return len(value) >= _SHORTEST and not value.startswith("/") and names_secret(name)


@functools.lru_cache(maxsize=4)
def _from_environment(values: tuple[str, ...]) -> tuple[str, ...]:
    """The values, and their spellings in JSON and Python, longest first: one may be part of another."""
    spelled = {form for value in values for form in (value, value.encode("unicode_escape").decode(), repr(value)[1:-1])}
    return tuple(sorted(spelled, key=lambda value: (-len(value), value)))
