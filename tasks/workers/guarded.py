"""A command under its guard (`guard.py`), with a folder of its own for temporary files and for the Unix socket that its processes
connect to. Imports little: the actors of a cluster start workers with it too."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from storage.disk.files import explain_full_disk, temporary_name
from tasks.workers.guard import SELF
from tasks.workers.logs import attempt_begins

CHECKOUT = Path(__file__).resolve().parent.parent.parent
SOCKET = "OPD_WORKER_SOCKET"
"""Variable with the path of a worker's socket. Every process that the worker starts inherits it."""
STOP_TIMEOUT = 5.0
"""Seconds that a worker has to end by itself before it is killed, with every process that it started."""
_GUARD = Path(__file__).with_name("guard.py")
_SOCKET_PATH = 107
"""Longest socket path on Linux, in bytes."""
_SOCKET_NAME = len("/5ff1b2c0-0b6c-4f1e-9d6a-0123456789ab")
"""Room below a worker's folder: engines with several processes name their sockets so."""


class Guarded:
    """A running command, and the socket `listener` for `connections` of its processes. Its output is added to `log`, below a line
    with `title` and the command. `twice`: under two guards, where something else may kill this process and its children."""

    def __init__(
        self,
        title: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        connections: int = 1,
        twice: bool = False,
    ) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.folder = _new_folder()
        self._socket = str(self.folder / "s")
        # also when an interruption loses this object; a killed supervisor's folder is removed by the guard
        self._remove_folder = weakref.finalize(self, _remove, self.folder, os.getpid())
        try:
            self.folder.mkdir(0o700)
            self.listener.bind(self._socket)
            self.listener.listen(connections)
            self.listener.settimeout(0.5)
            log.parent.mkdir(parents=True, exist_ok=True)
            with explain_full_disk(log):
                attempt_begins(log, f"{title}: {' '.join(argv)}")
                with log.open("ab") as out:
                    self.process = subprocess.Popen(
                        [*_guard(self.folder, twice), *argv],
                        env={**env, SOCKET: self._socket, "TMPDIR": str(self.folder)},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
        except BaseException:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def code(self, patience: float) -> int | None:
        """The exit code, negative for a signal; None where it has not ended after `patience` seconds."""
        try:
            return self.process.wait(patience) if self.process is not None else None
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill the command and every process that it started, and remove the folder."""
        if self.process is not None:
            self.process.terminate()  # its guard ends all below and itself
            self.code(STOP_TIMEOUT)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            if self.process.wait() == -signal.SIGKILL:
                _end_all_with(self._socket)  # the guard itself was killed, so it has ended nothing
        self.listener.close()
        self._remove_folder()


def machine_environment(plugin_path: str | None) -> dict[str, str]:
    """This process's environment, with what a worker on this machine finds modules, programs and caches by."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), plugin_path, os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        # ninja is beside the interpreter; DeepSpeed compiles with it
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": path,
        # a worker's temporary files are removed with it; this cache, by default among them, must stay
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", _inductor_cache()),
    }


def temporary_folders() -> list[Path]:
    """Candidates for workers' folders: the folder for temporary files, and /tmp where its path is too long."""
    return [Path(tempfile.gettempdir()), Path("/tmp")]


def _inductor_cache() -> str:
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")


def _new_folder() -> Path:
    """Path of a new worker's folder, not created yet; short enough for sockets however long TMPDIR is."""
    name = temporary_name()
    folders = (folder / name for folder in temporary_folders())
    return next(path for path in folders if len(os.fsencode(path)) + _SOCKET_NAME <= _SOCKET_PATH)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not remove it
        shutil.rmtree(folder, ignore_errors=True)


def _end_all_with(path: str) -> None:
    """SIGKILL to every process whose environment names this socket, until there is none."""
    found = True
    while found:
        found = False
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(SOCKET) == path and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found = True


def _guard(folder: Path, twice: bool) -> list[str]:
    """The command before a worker's own: see `guard.py`."""
    if sys.platform != "linux":
        return []
    supervisors = [str(os.getpid()), *([SELF] if twice else [])]
    return [
        part
        for supervisor in supervisors
        for part in (sys.executable, "-I", "-S", str(_GUARD), supervisor, str(folder))
    ]
