"""The worker process: `python -m tasks.workers.main ROLE` serves a stream of jobs over a Unix socket.

The supervisor (`tasks/workers/pool.py`) passes the socket's path and the settings in the environment. Messages are those of
`tasks/workers/jobs.py`. When the socket closes, the supervisor is gone, and the worker kills its whole process group."""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from storage.disk.files import explain_full_disk
from storage.disk.redact import redact, redact_output
from storage.errors import OpdError
from tasks.plugins import load_plugins, refuse_changed, search_in
from tasks.workers import jobs
from tasks.workers.guard import end_with_parent
from tasks.workers.memory import give_back
from tasks.workers.metrics import Metrics

PROGRESS_INTERVAL = 0.2
"""Shortest time in seconds between two progress messages."""


class Handler(Protocol):
    """Serves a role's jobs. `settings` describe the machine and do not change while the worker lives. A method `rest()`, where
    there is one, frees what the next job will not use: see `jobs.Rest`."""

    def handle(self, job: Any, link: Link) -> jobs.Schema:
        """Do one job (a schema of `jobs`) and return its result."""

    def close(self) -> None: ...


class Channel:
    """Messages over the supervisor's socket; kills the process group when the supervisor is gone."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self.incoming: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True, name="supervisor-watch").start()

    def send(self, message: jobs.FromWorker) -> None:
        with self._lock:
            self._socket.sendall(jobs.line(message))

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for data in lines:
                    self.incoming.put(data)
        except OSError:
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)


class Link:
    """A handler's connection to the supervisor during one job."""

    def __init__(self, channel: Channel, job: int, rank: int) -> None:
        self._channel, self._job, self._rank = channel, job, rank
        self._sent = 0.0

    def progress(self, done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
        """Report progress (total 0: not known), at most every `PROGRESS_INTERVAL`; the last report and notes are always sent."""
        now = time.monotonic()
        if self._rank == 0 and (now - self._sent >= PROGRESS_INTERVAL or 0 < total <= done or note):
            self._sent = now
            text = redact(note) if note else None
            found = dict(metrics) if metrics else None
            self._channel.send(jobs.Progress(self._job, int(done), int(total), found, text))

    def next(self) -> Any:
        """The next item of the job; None when there are no more."""
        self._channel.send(jobs.Want(self._job))
        answer = jobs.to_worker(self._channel.incoming.get())
        if not isinstance(answer, jobs.Give) or answer.id != self._job:
            raise jobs.JobMismatch(f"the worker asked for an item and got {type(answer).__name__}")
        return jobs.decode(answer.item)

    def done(self, result: jobs.Schema) -> None:
        """Report that an item is finished and its shard is written."""
        self._channel.send(jobs.Done(self._job, jobs.raw(result)))


def main(role: str) -> None:
    """Serve jobs until told to stop. Every rank of a multi-process worker runs this and gets every job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides; a terminal's Ctrl-C reaches it alone
    end_with_parent()  # its guard or its launcher, should one of these be killed
    redact_output("stdout", "stderr")  # both go to the log, which is kept
    rank = int(os.environ.get("RANK", "0"))
    settings = json.loads(os.environ["OPD_WORKER_SETTINGS"])
    channel = Channel(os.environ["OPD_WORKER_SOCKET"])
    try:
        for folder in settings.get("modules", ()):
            search_in(Path(folder))
        load_plugins(settings.get("plugins", ()), settings.get("plugin_path"))
        refuse_changed(settings.get("plugin_sources", {}), "what this run has begun")
        module, _, name = jobs.ROLES[role].partition(":")
        handler: Handler = getattr(importlib.import_module(module), name)(settings)
    except BaseException as error:
        channel.send(jobs.Failed(rank, _describe(error)))
        raise
    channel.send(jobs.Ready(rank, os.getpid()))
    while True:
        try:
            message = jobs.to_worker(channel.incoming.get())
        except jobs.JobMismatch as error:
            channel.send(jobs.Failed(rank, _describe(error)))
            continue
        if isinstance(message, jobs.Do):
            _serve(handler, channel, message, rank)
        elif isinstance(message, jobs.Rest):
            _rest(handler)
        elif isinstance(message, jobs.Stop):
            handler.close()
            channel.send(jobs.Stopped(rank))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # engines may abort in interpreter exit; everything that matters is committed


def _serve(handler: Handler, channel: Channel, message: jobs.Do, rank: int) -> None:
    try:
        job = jobs.decode(message.job, message.protocol)
        with explain_full_disk(Path(getattr(job, "store", message.log))):
            _write_to(message.log)
            result = jobs.raw(handler.handle(job, Link(channel, message.id, rank)))
    except Exception as error:
        with suppress(OSError):  # on a full disk the log is lost; the answer must still be sent
            traceback.print_exc()
            sys.stderr.flush()
        channel.send(jobs.Error(message.id, rank, _describe(error)))
        return
    channel.send(jobs.Result(message.id, rank, result if rank == 0 else jobs.raw(None)))


def _rest(handler: Handler) -> None:
    """Nothing depends on it: an error is logged, and the next job decides."""
    try:
        try:
            if hasattr(handler, "rest"):
                handler.rest()
        finally:
            give_back(maps=True)
    except Exception:
        with suppress(OSError):
            traceback.print_exc()


def _write_to(log: str) -> None:
    """Redirect this process's output to `log`: a warm worker serves several runs, and each has its own logs."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _describe(error: BaseException) -> jobs.ErrorText:
    return jobs.ErrorText(
        kind=type(error).__name__,
        message=redact(str(error)),
        ours=isinstance(error, OpdError),
        traceback=redact("".join(traceback.format_exception(error)[-12:])),
    )


if __name__ == "__main__":
    main(sys.argv[1])
