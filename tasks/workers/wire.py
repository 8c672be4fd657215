"""The TCP connection of a rank on another host (`on_host.py`) to the relay on the run's machine (`hosts.py`), and the file that
the two share. Each side proves that it knows the file's secret before the other takes anything from it: any process that reaches
a port can connect to it, and a worker does what it is told.

The relay sends a challenge; the rank answers it with a `Hello` and a challenge of its own; when all ranks are there, the relay
answers these with a `Start`. Each is a line of JSON. After that the connection carries the worker's own messages, both ways."""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from contextlib import suppress

import msgspec

SILENCE_HERE = 120
"""Seconds without any answer of a host's network after which the relay takes a rank for lost."""
SILENCE_THERE = 90
"""The same on the host, where the rank then ends. Less, so that it is gone when another one is started in its place."""
GREETING_TIMEOUT = 30.0
"""Seconds that a connection has to say who it is."""
GATHER_TIMEOUT = 600.0
"""Seconds until all ranks must be there, those of hosts that import slowly among them."""
_LONGEST = 1 << 16


class Order(msgspec.Struct, frozen=True):
    """The file, for all ranks of a worker. `address`: of the relay; `env`: variables of the worker; `modules`: folders that
    it finds modules in, as in PYTHONPATH; `log`: where it writes."""

    address: tuple[str, int]
    secret: str
    argv: list[str]
    env: dict[str, str]
    modules: str
    log: str


class Hello(msgspec.Struct, frozen=True):
    """Who a rank is. `address`: its host's, as the relay's machine sees it; `interface`: which has it; `port`: free there."""

    proof: str
    challenge: str
    rank: int
    world: int
    address: str
    interface: str
    port: int


class Start(msgspec.Struct, frozen=True):
    """What a rank gets when all are there: variables by which they find each other."""

    proof: str
    env: dict[str, str]


class Stranger(Exception):
    """The other side does not know the secret, or is no rank of this worker."""


def new_secret() -> str:
    return secrets.token_hex(32)


def proof(secret: str, who: str, challenge: str) -> str:
    """That `who` (relay or rank: no answer of one is an answer of the other) knows the secret."""
    return hmac.digest(bytes.fromhex(secret), f"{who} {challenge}".encode(), "sha256").hex()


def proves(given: str, secret: str, who: str, challenge: str) -> bool:
    return hmac.compare_digest(given.encode(), proof(secret, who, challenge).encode())


def send(connection: socket.socket, message: msgspec.Struct | str) -> None:
    connection.sendall(msgspec.json.encode(message) + b"\n")


def read_line(connection: socket.socket, timeout: float) -> bytes:
    """One line, and not a byte more, since what comes after it is for others. Stranger where there is none in time."""
    deadline, line = time.monotonic() + timeout, bytearray()
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            byte = connection.recv(1)
        except OSError as error:
            raise Stranger(f"no whole line came ({error})") from None
        if not byte or len(line) > _LONGEST or time.monotonic() > deadline:
            raise Stranger("no whole line came")
        line += byte
    connection.settimeout(None)
    return bytes(line)


def watch(connection: socket.socket, silence: int) -> None:
    """Lets reads and writes fail after `silence` seconds without an answer of the other machine, whether it is asked or not."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", silence // 3),
        ("TCP_KEEPINTVL", silence // 9),
        ("TCP_KEEPCNT", 6),
        ("TCP_USER_TIMEOUT", silence * 1000),  # on Linux: also of what was sent and is not acknowledged
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def pass_on(source: socket.socket, target: socket.socket) -> None:
    """Passes bytes until either side ends; then both do, after what was passed already."""
    with suppress(OSError):
        while data := source.recv(1 << 20):
            target.sendall(data)
    for side in (source, target):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
