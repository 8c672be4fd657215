"""The process in which verifiers judge completions, one at a time, and what starts, asks and ends it.

A verifier may be a user's function, which may hang in a C call, end its process or print what it should not. It therefore runs
in a child process: one that does not answer in time is killed with its process group, and started again for the next question.
Questions and answers are lines of JSON over a socket. What the child writes to stdout and stderr comes through a pipe and goes,
line by line and without secrets, to this process's output (a worker's log)."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from storage.disk.redact import redact
from storage.errors import ConfigError, InputError, OpdError
from tasks.inputs.judging import (
    TOOK_LONGER,
    AnyVerifier,
    JudgeConfig,
    JudgeFunction,
    JudgeMathVerify,
    Outcome,
    Unusable,
    given_to,
    name_of,
    outcome_of,
)
from tasks.inputs.verifiers import (
    equal_mathematics,
    exact,
    function_of,
    hard_limit,
    import_mathematics,
    verifier_digest,
)
from tasks.plugins import search_in

START_SECONDS = 120.0
"""Limit for the start of the process: it imports the users' modules and math-verify."""
ENDING_SECONDS = 30.0
"""Wait for the end of a process that is ending, so that the reason, which is stored, does not depend on how busy the machine is.
One that has closed its connection and goes on is not waited for."""
DISCONNECTED = 86
"""Exit code of a process whose verifier has closed the connection and returned."""
REASON_LENGTH = 300
"""Characters of a reason that are kept."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PR_SET_PDEATHSIG = 1
_PF_EXITING = 0x4
"""Linux's flag of a process that is ending; it is set before the kernel closes its descriptors."""
_LINE = 65536
"""Bytes that are read at once, and of the longest line of output that is passed on."""
CUT = "(a line that is too long or has no end is left out)"


class NoVerdict(Exception):
    """A completion has no verdict; the message says why. `ended`: the process hung or ended."""

    def __init__(self, reason: str, ended: bool = False) -> None:
        super().__init__(reason)
        self.ended = ended


def reason_of(text: str) -> str:
    """A reason as it is stored: one line, without secrets, not longer than `REASON_LENGTH`, valid Unicode. Addresses in memory,
    which an object's text has, are left out: they differ between processes, and the table is to come out equal."""
    line = " ".join(_ADDRESS.sub("", redact(text)).encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 3] + "..."


class VerifierProcess:
    """The child of one config. `sources`: digests of its functions' files, None for other verifiers. It is started at the first
    question, and finds the modules that this process finds."""

    def __init__(self, config: JudgeConfig, sources: Sequence[str | None]) -> None:
        self.config, self.sources = config, list(sources)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._output: threading.Thread | None = None
        self._given: list[list[str]] = []
        self._closed = False
        """Whether the last exchange ended because the connection was closed at the other end."""
        self._ending = False
        """Whether the process announced its end instead of a reply."""
        self.late: str | None = None
        """The verifier and the limit of the last question, where it was not answered in time."""

    def given(self) -> list[list[str]]:
        """Per verifier which of `judging.GIVEN` it is asked with. Starts the process; raises as `ask`, but NoVerdict."""
        self._started()
        return self._given

    def ask(self, place: int, question: Mapping[str, Any]) -> Outcome:
        """What the verifier at `place` says about a completion (the arguments of `answered`). Raises NoVerdict where it fails,
        takes too long or ends its process; OpdError where the process does not start."""
        self._started()
        verifier = self.config.verifiers[place]
        mathematics = isinstance(verifier, JudgeMathVerify)
        limit = hard_limit(verifier.timeout) if isinstance(verifier, JudgeMathVerify) else self.config.timeout
        reply = self._exchange(json.dumps([place, question]).encode() + b"\n", limit)
        named, self.late = f"{name_of(verifier)!r}", None
        if reply is None:
            how = self._ended()
            if how is not None:
                raise NoVerdict(f"{named} ended its process ({how})", ended=True)
            if mathematics:  # as in evaluations
                self.late = f"{named} ({limit:g} s, from its timeout)"
                return Outcome(0.0)
            self.late = f"{named} ({limit:g} s, judge.timeout)"
            raise NoVerdict(f"{named} {TOOK_LONGER} ({limit:g} s)", ended=True)
        if "failed" in reply:
            raise NoVerdict(f"{named}: {reply['failed']}")
        spans = reply["spans"]
        return Outcome(
            float(reply["reward"]),
            reply["feedback"],
            None if reply["segments"] is None else tuple(reply["segments"]),
            None if spans is None else tuple((start, end, kind) for start, end, kind in spans),
        )

    def close(self) -> None:
        """End the process and all that it has started in its process group."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._output is not None:
            self._output.join(1.0)  # a process that left the group may hold the pipe open
            self._output = None

    def _ended(self) -> str | None:
        """How the process ended by itself; None where it was still running. It is gone afterwards."""
        assert self._process is not None
        if self._ending or (self._closed and _is_ending(self._process.pid)):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_SECONDS)
        code = self._process.poll()
        self.close()
        if code == DISCONNECTED or (code is None and self._closed):
            return "it closed its connection"
        if code is None:
            return "it did not come to its end" if self._ending else None
        return f"exit {code}" if code >= 0 else f"killed by signal {-code}"

    def _started(self) -> None:
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        checkout = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(filter(None, (checkout, os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tasks.engines.verifier_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=dict(os.environ) | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._socket = ours
        self._output = threading.Thread(target=_pass_on, args=(self._process,), daemon=True, name="verifier-output")
        self._output.start()
        first = {"config": self.config.model_dump(mode="json"), "path": sys.path, "sources": self.sources}
        reply = self._exchange(json.dumps(first).encode() + b"\n", START_SECONDS)
        if reply is None:
            how = self._ended() or f"not ready after {START_SECONDS:g} s"
            raise OpdError(f"judge: the process of the verifiers did not start ({how}); its output is in the log")
        if "refused" in reply:
            self.close()
            raise {"ConfigError": ConfigError, "InputError": InputError}.get(reply["kind"], OpdError)(reply["refused"])
        self._given = reply["given"]

    def _exchange(self, question: bytes, seconds: float) -> dict[str, Any] | None:
        """The reply (one line) to a question; None if the process ended or took too long."""
        assert self._socket is not None
        deadline, line, self._closed, self._ending = time.monotonic() + seconds, b"", False, False
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(question)
            while not line.endswith(b"\n"):
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                block = self._socket.recv(_LINE)
                if not block:
                    self._closed = True
                    return None
                line += block
                if time.monotonic() > deadline:
                    return None
        except TimeoutError:
            return None
        except (BrokenPipeError, ConnectionResetError):
            self._closed = True
            return None
        found: dict[str, Any] = json.loads(line)
        self._ending = "ends" in found
        return None if self._ending else found


def _is_ending(pid: int) -> bool:
    """Whether a process is on its way to its end, or there; true where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return bool(int(text.rpartition(")")[2].split()[6]) & _PF_EXITING)


def _pass_on(process: subprocess.Popen[bytes]) -> None:
    """Everything that the process writes goes to this process's output, line by line. A line of more than `_LINE` bytes is left
    out, and an end without a line end: half a secret would not be recognised."""
    assert process.stdout is not None
    with process.stdout as stream:
        cut = False
        while line := stream.readline(_LINE):
            if whole := line.endswith(b"\n"):
                _print(CUT if cut else redact(line.decode(errors="replace").rstrip("\n")))
            cut = not whole
        if cut:
            _print(CUT)


def _print(line: str) -> None:
    with suppress(OSError):  # on a full disk the log is lost
        print(line, flush=True)


# --- the child -------------------------------------------------------------------------------------------------------


def answered(verifier: AnyVerifier, question: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one question: an Outcome's fields, or why there is none (`failed`).

    `question`: completion (text), answer (text or None), length (tokens), and of `judging.GIVEN` what the function takes."""
    completion, answer = question["completion"], question["answer"]
    try:
        if isinstance(verifier, JudgeFunction):
            more = {name: question[name] for name in question if name not in ("completion", "answer", "length")}
            function: Callable[..., object] = function_of(verifier.target)
            return asdict(outcome_of(function(completion, answer, **more), question["length"]))
        if answer is None:
            return {"failed": "the prompt has no answer"}
        if isinstance(verifier, JudgeMathVerify):
            return asdict(Outcome(float(equal_mathematics(completion, answer, verifier.timeout))))
        return asdict(Outcome(float(exact(verifier, completion, answer))))
    except Unusable as error:
        return {"failed": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def main(descriptor: int) -> None:
    """Answer questions until the socket closes, also when the parent dies."""
    if sys.platform == "linux":  # also where a verifier hangs when the parent is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as stream:
        connection.set_inheritable(False)  # programs that a verifier starts must not hold it open
        itself = os.fstat(descriptor).st_ino

        def reply(found: Mapping[str, Any]) -> None:
            if not _is_open(descriptor, itself):
                os._exit(DISCONNECTED)
            connection.sendall(json.dumps(found).encode() + b"\n")

        first = json.loads(stream.readline())
        config = JudgeConfig.model_validate(first["config"])
        try:
            given = prepared(config, first["sources"], first["path"])
        except OpdError as error:
            reply({"refused": str(error), "kind": type(error).__name__})
            return
        reply({"given": given})
        for line in stream:
            place, question = json.loads(line)
            try:
                found = answered(config.verifiers[place], question)
            except BaseException:  # sys.exit of a verifier: what it registered for the end may take its time
                reply({"ends": True})
                raise
            reply(found)


def _is_open(descriptor: int, number: int) -> bool:
    """Whether the descriptor is still the file of that number: a verifier may have closed it, and opened another in its place."""
    try:
        return os.fstat(descriptor).st_ino == number
    except OSError:
        return False


def prepared(config: JudgeConfig, sources: Sequence[str | None], path: Sequence[str]) -> list[list[str]]:
    """Import what the verifiers need, also from `path`; per verifier what it is asked with. ConfigError for a function that is
    not found, InputError for one whose file has changed."""
    for folder in filter(None, path):
        search_in(Path(folder))
    given: list[list[str]] = []
    for verifier, source in zip(config.verifiers, sources, strict=True):
        if isinstance(verifier, JudgeMathVerify):
            import_mathematics()
        if verifier_digest(verifier) != source:
            raise InputError(
                f"judge: the file of {name_of(verifier)!r} has changed since this stage was planned; run again, and the rewards"
                " have the key of the new file"
            )
        given.append(list(given_to(verifier)) if isinstance(verifier, JudgeFunction) else [])
    return given


if __name__ == "__main__":
    main(int(sys.argv[1]))
