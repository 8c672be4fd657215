"""One worker from the supervisor's side: a subprocess that does jobs, or a launcher with ranks that do each job together.

A worker runs in its own session under a guard (`tasks/workers/guard.py`), which ends everything that the worker started. The
worker holds a socket; when it closes, the supervisor is gone. Its output goes to a log file."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import storage.errors
from storage.errors import OpdError
from tasks.workers import jobs
from tasks.workers.guarded import STOP_TIMEOUT, Guarded
from tasks.workers.logs import attempt_begins, last_lines
from tasks.workers.metrics import Progress

START_TIMEOUT = 600.0
"""Seconds until a worker must be ready: importing an engine on a cold, busy machine takes a minute or more."""


class WorkerFailed(OpdError):
    """A worker raised an unexpected exception; the message has the cause and the path of the log."""


class WorkerDied(WorkerFailed):
    """A worker ended, was killed or hung without an answer. A retry can help."""

    def __init__(self, what: str, tail: str = "") -> None:
        super().__init__(f"{what}\n{tail}" if tail else what)
        self.what, self.tail = what, tail


def no_items() -> None:
    """The items of a job that has none."""


def _ignore(result: Any) -> None: ...


@dataclass(frozen=True)
class Items:
    """Callbacks that give a job its items and take their results."""

    take: Callable[[], Any] = no_items
    """The next item; None when there are no more."""
    done: Callable[[Any], None] = _ignore
    """Called with an item's result once its shard is written."""


class Worker:
    """One worker subprocess (or one launcher with `world` ranks) and the jobs it is asked to do."""

    def __init__(self, role: str, argv: list[str], env: dict[str, str], log: Path, world: int = 1) -> None:
        self.role, self.log, self.world = role, log, world
        self._ranks: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._buffers: dict[int, bytes] = {}
        self._jobs = 0
        self._at_work = threading.Lock()
        self._rested = True
        self._command = Guarded(role, argv, env, log, world)
        self._folder = self._command.folder
        try:
            self._handshake()
        except BaseException:
            self.kill()
            raise

    def _handshake(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        waiting: list[socket.socket] = []
        while len(waiting) < self.world:
            try:
                connection, _ = self._command.listener.accept()
                waiting.append(connection)
            except TimeoutError:
                if not self.alive:
                    raise self._died("before it was ready") from None
                if time.monotonic() > deadline:
                    raise self._stopped(f"not ready after {START_TIMEOUT:.0f} s") from None
        for slot, connection in enumerate(waiting):
            self._ranks[slot] = connection
            self._buffers[slot] = b""
        ready = 0
        while ready < self.world:
            for slot, message in self._receive():
                if isinstance(message, jobs.Failed):
                    raise self._error(message.error)
                if isinstance(message, jobs.Ready):
                    ready += 1
                    self._names[slot] = f" (rank {message.rank})" if self.world > 1 else ""
            if time.monotonic() > deadline:
                raise self._stopped(f"not ready after {START_TIMEOUT:.0f} s")

    def run(
        self,
        job: jobs.Schema,
        progress: Progress,
        timeout: float | None = None,
        log: Path | None = None,
        stall_timeout: float | None = None,
        items: Items | None = None,
    ) -> Any:
        """Do one job and return rank 0's result. From now on the worker writes to `log`, if one is given.

        Messages of other jobs are ignored. Raises the OpdError that the worker raised, WorkerFailed for anything else it
        raised, WorkerDied when it ended without an answer, did not finish within `timeout` seconds or sent nothing for
        `stall_timeout` seconds. The worker outlives only an OpdError that it raised itself: after any other error it may
        still be at its job."""
        with self._at_work:
            return self._run(job, progress, timeout, log, stall_timeout, items or Items())

    def _run(
        self,
        job: jobs.Schema,
        progress: Progress,
        timeout: float | None,
        log: Path | None,
        stall_timeout: float | None,
        items: Items,
    ) -> Any:
        self._jobs += 1
        self._rested = False
        self.log, started_in = log or self.log, self.log
        if self._jobs > 1 or self.log != started_in:  # what it wrote while it started belongs to its first job
            with suppress(OSError):  # on a full disk the worker reports it, or does its job without a log
                attempt_begins(self.log, f"{self.role}: next job, {type(job).__name__}")
        started = heard = time.monotonic()
        result: Any = None
        finished = 0
        refused = False
        try:
            self._send(jobs.Do(self._jobs, jobs.PROTOCOL, str(self.log), jobs.raw(job)))
            while finished < self.world:
                for _, message in (messages := self._receive()):
                    if isinstance(message, jobs.Failed):
                        raise self._error(message.error)
                    if getattr(message, "id", None) != self._jobs:
                        continue
                    if isinstance(message, jobs.Progress):
                        self._forward(message, progress)
                    elif isinstance(message, jobs.Want):
                        self._send(jobs.Give(self._jobs, jobs.raw(items.take())))
                    elif isinstance(message, jobs.Done):
                        items.done(jobs.decode(message.result))
                    elif isinstance(message, jobs.Error):
                        refused = True
                        raise self._error(message.error)
                    elif isinstance(message, jobs.Result):
                        finished += 1
                        if message.rank == 0:
                            result = jobs.decode(message.result)
                now = time.monotonic()
                heard = now if messages else heard
                if finished < self.world and timeout and now - started > timeout:
                    raise self._stopped(f"its part of the stage took longer than runtime.stage_timeout ({timeout:g} s)")
                if finished < self.world and stall_timeout and now - heard > stall_timeout:
                    raise self._stopped(f"no progress for runtime.stall_timeout ({stall_timeout:g} s)")
        except (BrokenPipeError, ConnectionResetError):
            error = self._died("while it was sent a message")
            self.kill()
            raise error from None
        except BaseException as error:
            # other ranks may wait forever for the failed one; after an error on this side no answer will be read
            if self.world > 1 or not refused or isinstance(error, WorkerFailed):
                self.kill()
            raise
        return result

    def rest(self) -> None:
        """Ask the worker to give back memory (`jobs.Rest`), once after a job. Nothing where it is at a job."""
        if not self._at_work.acquire(blocking=False):
            return
        try:
            if not self._rested:
                self._rested = True
                self._send(jobs.Rest())
        except OSError:  # it is gone, as its next job will find
            pass
        finally:
            self._at_work.release()

    @staticmethod
    def _forward(message: jobs.Progress, progress: Progress) -> None:
        told = {name: getattr(message, name) for name in ("metrics", "note") if getattr(message, name) is not None}
        progress(message.done, message.total, **told)

    def _send(self, message: jobs.ToWorker) -> None:
        for connection in self._ranks.values():
            connection.sendall(jobs.line(message))

    def _receive(self) -> list[tuple[int, jobs.FromWorker]]:
        """Messages received within half a second."""
        messages: list[tuple[int, jobs.FromWorker]] = []
        with selectors.DefaultSelector() as selector:
            for slot, connection in self._ranks.items():
                selector.register(connection, selectors.EVENT_READ, slot)
            ready = selector.select(0.5)
            if not ready and not self.alive:  # its guard was killed, and processes below it hold the sockets open
                raise self._died("without an answer")
            for key, _ in ready:
                slot = key.data
                data = self._ranks[slot].recv(1 << 20)
                if not data:
                    raise self._died("without an answer", self._names.get(slot, ""))
                *lines, self._buffers[slot] = (self._buffers[slot] + data).split(b"\n")
                messages += [(slot, jobs.from_worker(line)) for line in lines]
        return messages

    def _died(self, when: str, name: str = "") -> WorkerDied:
        code = self._command.code(1)
        how = "" if code is None else f" (exit {code})" if code >= 0 else f" (killed by signal {-code})"
        return WorkerDied(f"{self.role} worker{name} ended {when}{how}", last_lines(self.log))

    def _stopped(self, why: str) -> WorkerDied:
        return WorkerDied(f"{self.role} worker stopped: {why}", last_lines(self.log))

    def _error(self, error: jobs.ErrorText) -> OpdError:
        kind = getattr(storage.errors, error.kind, None) or getattr(jobs, error.kind, None)
        if error.ours and isinstance(kind, type) and issubclass(kind, OpdError):
            try:
                return kind(error.message)
            except TypeError:
                return OpdError(error.message)
        if error.ours:
            return OpdError(error.message)
        last = error.traceback.strip().splitlines()[-6:]
        return WorkerFailed(
            f"{self.role} worker: {error.kind}: {error.message}\n" + "\n".join(last) + f"\nlog: {self.log}"
        )

    def close(self) -> None:
        """Ask the worker to end, then kill whatever is left below it."""
        try:
            self._send(jobs.Stop())
            self._command.code(STOP_TIMEOUT)
        except OSError:
            pass
        self.kill()

    def kill(self) -> None:
        """Kill the worker and every process that it started."""
        self._command.kill()
        for connection in self._ranks.values():
            connection.close()

    @property
    def alive(self) -> bool:
        return self._command.alive
