"""A relay between clients and a server on loopback, which can be cut and held as a network or a busy server would."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class Between:
    """Passes on every byte, in threads."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._listener, self._open = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()
        self.port = self._listener.getsockname()[1]
        self.url = parts._replace(netloc=f"127.0.0.1:{self.port}").geturl()
        self._flows, self._lock = threading.Event(), threading.Lock()
        self._flows.set()
        self._listen()

    def cut(self) -> None:
        """Closes all connections, and refuses new ones."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in `accept`
        self._listener.close()
        with self._lock:
            for end in self._open:
                _close(end)
            self._open.clear()

    def restore(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listen()

    def hold(self) -> None:
        """Passes nothing on, until `release`; connections stay open."""
        self._flows.clear()

    def release(self) -> None:
        self._flows.set()

    def end(self) -> None:
        self.release()
        with contextlib.suppress(OSError):
            self.cut()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
                with self._lock:
                    self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                to.sendall(data)
        for end in (source, to):
            _close(end)


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def between(url: str) -> Iterator[Between]:
    relay = Between(url)
    try:
        yield relay
    finally:
        relay.end()
