"""Processes that start in milliseconds: forked from one that has imported the flow, each in a session of its own. They die
with the test process, however it ends, so that a stopped `make faults` leaves nothing behind."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOAD = ["scripted_run", "small_store", "flows.cli.run", "flows.runner", "flows.distill", "storage.catalog"]
_PDEATHSIG = 1


def start(target: Callable[..., None], *arguments: Any, output: Path | None = None) -> Any:
    """A started `multiprocessing` process that calls `target(*arguments)`; what it prints is appended to `output`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=_run, args=(target, arguments, output), daemon=True)
    process.start()
    return process


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


def exit_code(process: Any, patience: float = 120.0) -> int:
    """Of a process that has ended, or does within `patience` seconds; negative for a signal."""
    process.join(patience)
    assert process.exitcode is not None, f"process {process.pid} is still busy after {patience} s"
    return int(process.exitcode)
