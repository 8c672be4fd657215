"""What runs on a host of a hostfile: `python -m tasks.workers.on_host rank ORDER|look`.

`rank` is started by DeepSpeed's launcher, once per rank. It connects to the run's relay (`hosts.py`), starts the worker that one
machine would start (`main.py` under `guard.py`), and passes bytes between the two. When the connection ends, it ends the worker.
Nothing else would: a program that ssh has started outlives its client. It is no part of the worker, which may hang in a library's
call and see nothing. `look` answers the checks before a run."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tasks.workers.actor import free_port, interface_of, look
from tasks.workers.devices import gpu_count
from tasks.workers.guard import end_with_parent
from tasks.workers.guarded import Guarded, machine_environment
from tasks.workers.wire import (
    GATHER_TIMEOUT,
    GREETING_TIMEOUT,
    SILENCE_THERE,
    Hello,
    Order,
    Start,
    Stranger,
    new_secret,
    proof,
    proves,
    read_line,
    send,
    watch,
)

_END_TIMEOUT = 12.0
"""Seconds between the end of a worker's messages and the end of its guard."""


def main(command: str, *arguments: str) -> None:
    if command == "look":
        _look(json.load(sys.stdin))
    else:
        end_with_parent()
        try:
            _rank(Path(arguments[0]))
        except (OSError, Stranger, msgspec.MsgspecError) as error:
            _exit(f"{platform.node()}: the rank cannot start: {error}")


def _exit(why: str) -> None:
    with suppress(OSError):  # the other end of ssh may be gone
        print(why, file=sys.stderr, flush=True)
    os._exit(1)


def _look(question: dict[str, Any]) -> None:
    """Prints what `actor.look` finds, the user, the GPUs, and why the run's machine cannot be reached."""
    host, port = question.pop("address")
    found = look(**question) | {"user": os.getuid(), "gpus": gpu_count()}
    try:
        socket.create_connection((host, port), 15).close()
    except OSError as error:
        found["unreached"] = error.strerror or str(error)
    print(json.dumps(found), flush=True)


def _rank(path: Path) -> None:
    order = msgspec.json.decode(path.read_bytes(), type=Order)
    rank = int(os.environ["RANK"])
    connection = socket.create_connection(order.address, 60)
    watch(connection, SILENCE_THERE)
    own = str(connection.getsockname()[0])
    title = f"trainer rank {rank} on host {platform.node()} ({own})"
    env = _greet(connection, order, rank, own)
    # what the launcher has set (the rank, its GPUs) is in this process's environment
    known = machine_environment(order.modules) | order.env | env
    worker = Guarded(title, [sys.executable, *order.argv], known, Path(order.log))
    served = _accept(worker)
    ended = threading.Event()
    if served is not None:
        threading.Thread(target=_down, args=(connection, served, worker, ended), daemon=True).start()
        _up(served, connection, worker)
    # at once: the error of another rank, which has lost its connection to this one, would come first and count as the reason
    ended.set()
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    code = worker.code(_END_TIMEOUT)
    if code != 0:
        worker.kill()
        how = "did not end" if code is None else f"exit {code}" if code >= 0 else f"killed by signal {-code}"
        with suppress(OSError), open(order.log, "a") as log:
            log.write(f"--- {title} has ended ({how})\n")
    os._exit(1 if code is None else code if code >= 0 else 128 - code)


def _greet(connection: socket.socket, order: Order, rank: int, own: str) -> dict[str, str]:
    """Tells the relay who this is; the variables that it gives when all ranks are there."""
    theirs = msgspec.json.decode(read_line(connection, GREETING_TIMEOUT), type=str)
    mine = new_secret()
    hello = Hello(
        proof=proof(order.secret, "rank", theirs),
        challenge=mine,
        rank=rank,
        world=int(os.environ["WORLD_SIZE"]),
        address=own,
        interface=interface_of(own),
        port=free_port(),
    )
    send(connection, hello)
    start = msgspec.json.decode(read_line(connection, GATHER_TIMEOUT), type=Start)
    if not proves(start.proof, order.secret, "relay", mine):
        raise Stranger("who answers at the relay's address does not know its secret")
    return start.env


def _accept(worker: Guarded) -> socket.socket | None:
    """The worker's connection; None where it ends without one."""
    while worker.alive:
        try:
            return worker.listener.accept()[0]
        except TimeoutError:
            continue
    return None


def _up(served: socket.socket, connection: socket.socket, worker: Guarded) -> None:
    """From the worker to the relay, until the worker ends."""
    with suppress(ConnectionResetError):
        while data := served.recv(1 << 20):
            try:
                connection.sendall(data)
            except OSError:
                _lost(worker)


def _down(connection: socket.socket, served: socket.socket, worker: Guarded, ended: threading.Event) -> None:
    """From the relay to the worker, until the relay is gone. What a worker that has ended does not take is dropped."""
    with suppress(OSError):
        while data := connection.recv(1 << 20):
            with suppress(OSError):
                served.sendall(data)
    if not ended.is_set():
        _lost(worker)


def _lost(worker: Guarded) -> None:
    worker.kill()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
