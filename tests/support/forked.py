"""Processes that start in milliseconds: forked from one that has imported the flow, each in a session of its own. They die
with the test process, however it ends, so that a stopped `make faults` leaves nothing behind."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOAD = [
    "scripted_run",
    "small_store",
    "flows.cli.run",
    "flows.run.runner",
    "flows.distill",
    "storage.query.catalog",
    "transformers.models.auto.tokenization_auto",
]
_PDEATHSIG = 1


class Forked:
    """A started process. multiprocessing reads an exit code once, from a pipe, whoever asks, also while another process is
    started: from two threads, one of them would get it and the other 255. Here one asks at a time."""

    _asking = threading.Lock()

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], output: Path | None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._process = context.Process(target=_run, args=(target, arguments, output), daemon=True)
        with self._asking:
            self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    @property
    def exitcode(self) -> int | None:
        """None while it is alive, negative for a signal."""
        with self._asking:
            return self._process.exitcode

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, patience: float) -> None:
        """Waits for its end, at most `patience` seconds."""
        multiprocessing.connection.wait([self._process.sentinel], patience)


def start(target: Callable[..., None], *arguments: Any, output: Path | None = None) -> Forked:
    """A process that calls `target(*arguments)`; what it prints is appended to `output`."""
    return Forked(target, arguments, output)


def _run(target: Callable[..., None], arguments: tuple[Any, ...], output: Path | None) -> None:
    ctypes.CDLL(None).prctl(
        _PDEATHSIG, signal.SIGKILL
    )  # the parent is the fork server, which ends with the test process
    os.setsid()
    if output is not None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    target(*arguments)


def exit_code(process: Forked, patience: float = 120.0) -> int:
    """Of a process that has ended, or does within `patience` seconds; negative for a signal."""
    process.join(patience)
    code = process.exitcode
    assert code is not None, f"process {process.pid} is still busy after {patience} s"
    return code
