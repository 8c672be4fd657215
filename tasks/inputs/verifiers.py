"""Verifiers decide whether a completion is correct: exact match, mathematics, or a function of the user's."""

from __future__ import annotations

import atexit
import hashlib
import importlib
import inspect
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field, field_validator

from storage.errors import ConfigError, InputError, OpdError, did_you_mean
from storage.identity import Identity

_START_SECONDS = 120.0
"""Time limit for the start of the math-verify process."""


class ExactMatch(Identity):
    """Correct if the completion, or what a pattern extracts from it, equals the answer."""

    kind: Literal["exact_match"] = "exact_match"
    extract: str | None = Field(None, description="regular expression; the first group of its last match is compared")
    strip: bool = Field(True, description="ignore surrounding white space of both")

    @field_validator("extract")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"extract: {value!r} is not a regular expression ({error})") from error
        return value


class MathVerify(Identity):
    """Correct if the completion's last expression equals the answer mathematically (math-verify): 1/2 equals 0.5."""

    kind: Literal["math_verify"] = "math_verify"
    timeout: float = Field(10, gt=0, le=600, description="seconds per completion; slower ones count as wrong")

    @field_validator("timeout")
    @classmethod
    def _one_spelling(cls, value: float) -> float:
        """10 and 10.0 give one key: a stored config is read back as 10.0, the default was hashed as 10."""
        return int(value) if value.is_integer() else value


class FunctionVerifier(Identity):
    """A function of yours, `def right(completion: str, answer: str | None) -> bool`: from the completion's text and the prompt's
    answer it returns True or False (or 1 or 0). Its module is looked for beside the config and on the import path.

    Its source file enters the keys of evaluations; what it imports does not."""

    kind: Literal["function"] = "function"
    target: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:function")


VerifierConfig = Annotated[ExactMatch | MathVerify | FunctionVerifier, Field(discriminator="kind")]


def verify(config: ExactMatch | MathVerify | FunctionVerifier, completion_text: str, answer: str | None) -> bool:
    """Whether the completion is correct. Callable from any thread.

    Raises InputError for a missing answer (a user's function may accept None), ConfigError for a function that is not
    found, OpdError for a function that fails or does not return a bool."""
    if isinstance(config, FunctionVerifier):
        return _call(config, completion_text, answer)
    if answer is None:
        raise InputError(
            f"verifier {config.kind}: a prompt has no answer; add an answer column or use another verifier"
        )
    if isinstance(config, MathVerify):
        return _judge().ask(completion_text, answer, config.timeout)
    return exact(config, completion_text, answer)


def verifier_digest(config: ExactMatch | MathVerify | FunctionVerifier) -> str | None:
    """sha256 of the source file of a user's function, which enters keys; None for other verifiers."""
    if not isinstance(config, FunctionVerifier):
        return None
    return hashlib.sha256(function_place(config)[1].read_bytes()).hexdigest()


def hard_limit(timeout: float) -> float:
    """Seconds after which mathematics is stopped from outside, where its own `timeout` has no effect."""
    return 2 * timeout + 5


def exact(config: ExactMatch, completion_text: str, answer: str) -> bool:
    """Whether the completion, or what the config's pattern extracts from it, equals the answer."""
    found = completion_text
    if config.extract is not None:
        matches = list(re.finditer(config.extract, completion_text))
        if not matches:
            return False
        last = matches[-1]
        found = (last.group(1) if last.re.groups else last.group(0)) or ""
    return found.strip() == answer.strip() if config.strip else found == answer


def function_place(config: FunctionVerifier) -> tuple[Callable[[str, str | None], object], Path]:
    """The user's function and its source file. ConfigError where one of them is not found, or its module fails on import."""
    function = function_of(config.target)
    path = inspect.getsourcefile(sys.modules[config.target.partition(":")[0]])
    if path is None:
        raise ConfigError(f"verifier: {config.target!r} has no source file, so it has no identity")
    return function, Path(path)


def function_of(target: str) -> Callable[[str, str | None], object]:
    """The function `module:function`. ConfigError where it is not found, or its module fails on import."""
    module, name = target.split(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise ConfigError(f"verifier: module {module!r} imports {error.name!r}, which is not installed") from error
        raise ConfigError(f"verifier: no module {module!r} beside the config or on the import path") from error
    except Exception as error:
        raise ConfigError(f"verifier: module {module!r} fails on import ({type(error).__name__}: {error})") from error
    function = getattr(found, name, None)
    if function is None:
        hint = did_you_mean(name, [known for known, item in vars(found).items() if callable(item)])
        raise ConfigError(f"verifier: module {module!r} has no function {name!r}{'; ' * bool(hint)}{hint}")
    if not callable(function):
        raise ConfigError(f"verifier: {target!r} is not callable, but {type(function).__name__}")
    return cast(Callable[[str, str | None], object], function)


def _call(config: FunctionVerifier, completion_text: str, answer: str | None) -> bool:
    function = function_of(config.target)
    try:
        verdict = function(completion_text, answer)
    except Exception as error:
        shown = completion_text if len(completion_text) <= 200 else completion_text[:200] + "..."
        raise OpdError(
            f"verifier {config.target!r} failed on {shown!r}, answer {answer!r}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(verdict, (bool, int, np.bool_, np.integer)) or verdict not in (0, 1):
        none = "; does it lack a return?" if verdict is None else ""
        raise OpdError(
            f"verifier {config.target!r} must return True or False, found {verdict!r} ({type(verdict).__name__}){none}"
        )
    return bool(verdict)


# --- mathematics, in a process of its own ----------------------------------------------------------------------------
# math-verify limits its time by SIGALRM, which works in the main thread only and cannot interrupt a long C call. It
# therefore runs in the main thread of a child process, which is killed if the alarm has no effect.


class _Judge:
    """The child process, started at the first question and again after a kill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, completion_text: str, answer: str, timeout: float) -> bool:
        with self._lock:
            process = self._started()
            question = {"completion": completion_text, "answer": answer, "timeout": timeout}
            reply = self._exchange(process, json.dumps(question).encode() + b"\n", hard_limit(timeout))
            if reply is None:
                self._stop()
                return False
            return bool(reply["correct"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        checkout = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(filter(None, (checkout, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.inputs.verifiers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        ready = self._exchange(self._process, b"", _START_SECONDS)
        if ready is None:
            self._stop()
            raise OpdError("verifier math_verify: its process did not start; is math-verify installed?")
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], question: bytes, seconds: float) -> dict[str, Any] | None:
        """The reply (one JSON line) to a question; None if the child died or took too long."""
        assert process.stdin is not None and process.stdout is not None
        deadline, line = time.monotonic() + seconds, b""
        try:
            process.stdin.write(question)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            block = os.read(process.stdout.fileno(), 65536) if readable else b""
            if not block:
                return None
            line += block
        return dict(json.loads(line))

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None


_judges: dict[int, _Judge] = {}


def _judge() -> _Judge:
    """The judge of this process (a fork must not share its parent's pipes)."""
    if os.getpid() not in _judges:
        _judges[os.getpid()] = judge = _Judge()
        atexit.register(judge.close)
    return _judges[os.getpid()]


def _serve() -> None:
    """The child: answers questions until its input closes, also when the parent dies."""
    import_mathematics()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # library output must not mix with the replies
    replies.write(b"{}\n")
    replies.flush()
    for line in sys.stdin.buffer:
        question = json.loads(line)
        correct = equal_mathematics(question["completion"], question["answer"], question["timeout"])
        replies.write(json.dumps({"correct": correct}).encode() + b"\n")
        replies.flush()


def import_mathematics() -> None:
    """Import math-verify (seconds), without its log messages."""
    import logging

    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)


def equal_mathematics(completion: str, answer: str, timeout: float) -> bool:
    """Whether the completion's last expression equals the answer. In the main thread of a process only: math-verify limits its
    time, a third of `timeout` per step, by SIGALRM."""
    from math_verify import parse
    from math_verify import verify as equal

    seconds = max(1, round(timeout / 3))
    try:
        gold = _parse_gold(parse, answer, seconds)
        found = parse(completion, parsing_timeout=seconds)
        return bool(gold and found) and bool(equal(gold, found, timeout_seconds=seconds))
    except Exception:  # sympy raises various errors; an incomparable answer counts as wrong
        return False


def _parse_gold(parse: Callable[..., list[Any]], answer: str, seconds: int) -> list[Any]:
    """The parsed answer: as LaTeX if it has no delimiters, else unchanged."""
    bare = not any(mark in answer for mark in ("$", r"\(", r"\[", r"\boxed"))
    return (parse(f"${answer}$", parsing_timeout=seconds) if bare else []) or parse(answer, parsing_timeout=seconds)


if __name__ == "__main__":
    _serve()
