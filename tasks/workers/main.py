"""The child's side of a worker: `python -m tasks.workers.main ROLE` serves a stream of jobs over a Unix socket.

The supervisor (`tasks/workers/pool.py`) gives the socket's path and the settings in the environment. Every message is one line
of JSON. When the socket closes the supervisor is gone, and the worker ends its whole process group at once."""

from __future__ import annotations

import ctypes
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
from tasks.plugins import ROLES, load_plugins, refuse_changed
from tasks.workers.metrics import Metrics

PROGRESS_INTERVAL = 0.2
"""Seconds between two progress messages at least."""
_PR_SET_PDEATHSIG = 1


class Handler(Protocol):
    """What serves a role's jobs. `settings` are facts about the machine that hold for the worker's life."""

    def handle(self, job: dict[str, Any], progress: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Channel:
    """Line-wise JSON over the supervisor's socket; ends the process group when the supervisor is gone."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self.incoming: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True, name="supervisor-watch").start()

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._socket.sendall(data)

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    self.incoming.put(json.loads(line))
        except OSError:
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)


def main(role: str) -> None:
    """Serve jobs until told to stop. Every rank of a multi-process worker runs this and gets every job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides; a terminal's Ctrl-C reaches it alone
    if sys.platform == "linux":  # ends with its guard or its launcher, should one of these be killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    redact_output("stdout", "stderr")  # they are the log, which is kept
    rank = int(os.environ.get("RANK", "0"))
    settings = json.loads(os.environ["OPD_WORKER_SETTINGS"])
    channel = Channel(os.environ["OPD_WORKER_SOCKET"])
    try:
        load_plugins(settings.get("plugins", ()), settings.get("plugin_path"))
        refuse_changed(settings.get("plugin_sources", {}), "what this run has begun")
        module, _, name = ROLES[role].partition(":")
        handler: Handler = getattr(importlib.import_module(module), name)(settings)
    except BaseException as error:
        channel.send({"kind": "failed", "rank": rank, **_describe(error)})
        raise
    channel.send({"kind": "ready", "rank": rank, "pid": os.getpid()})
    while True:
        message = channel.incoming.get()
        if message["kind"] == "stop":
            handler.close()
            channel.send({"kind": "stopped", "rank": rank})
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # engines may abort in interpreter exit; everything that matters is committed
        _serve(handler, channel, message, rank)


def _serve(handler: Handler, channel: Channel, message: dict[str, Any], rank: int) -> None:
    sent = 0.0

    def progress(done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
        nonlocal sent
        now = time.monotonic()
        if rank == 0 and (now - sent >= PROGRESS_INTERVAL or done >= total or note):
            sent = now
            told: dict[str, Any] = {"metrics": dict(metrics)} if metrics else {}
            told |= {"note": redact(note)} if note else {}
            channel.send({"kind": "progress", "id": message["id"], "done": int(done), "total": int(total), **told})

    try:
        with explain_full_disk(Path(message["job"].get("store", message["log"]))):
            _write_to(message["log"])
            result = handler.handle(message["job"], progress)
    except Exception as error:
        with suppress(OSError):  # a full disk takes the log, not the answer
            traceback.print_exc()
            sys.stderr.flush()
        channel.send({"kind": "error", "id": message["id"], "rank": rank, **_describe(error)})
        return
    channel.send({"kind": "result", "id": message["id"], "rank": rank, "result": result if rank == 0 else {}})


def _write_to(log: str) -> None:
    """Sends this process's output to `log`: a warm worker serves several runs, and each has its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _describe(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": redact(str(error)),
        "ours": isinstance(error, OpdError),
        "traceback": redact("".join(traceback.format_exception(error)[-12:])),
    }


if __name__ == "__main__":
    main(sys.argv[1])
