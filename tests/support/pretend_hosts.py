"""Hosts for tests, where there is no sshd and no pdsh: programs of these names on a PATH, and what stands for the hosts' sshd.

`python pretend_hosts.py serve FOLDER` runs the commands, each in a session of its own with a nearly empty environment, as its
children: nothing on a run's side can end them, and whatever is below it is left on a host. A client that is killed ends none of
them, as with sshd; their next write then fails. The hosts' names are those in FOLDER/hosts; the programs are in FOLDER/bin."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ASKED = "asked"
"""File in the folder with a line per command: the host and the command."""


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def with_word(place: int, word: str, among: list[psutil.Process]) -> list[psutil.Process]:
    """Those whose command line has this word there: those of guards and shells have others before it."""
    found = []
    for process in among:
        with suppress(psutil.Error):
            if process.cmdline()[place : place + 1] == [word]:
                found.append(process)
    return found


class Hosts:
    """The running hosts, and a hostfile of them."""

    def __init__(self, folder: Path, slots: dict[str, int]) -> None:
        self.folder, self.bin, self.file = folder, folder / "bin", folder / "hostfile"
        self.bin.mkdir(parents=True)
        (folder / "hosts").write_text("\n".join(slots))
        self.file.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
        for program in ("ssh", "pdsh"):
            script = self.bin / program
            given = " ".join(map(shlex.quote, (sys.executable, __file__, program, str(folder))))
            script.write_text(f'#!/bin/sh\nexec {given} "$@"\n')
            script.chmod(0o755)
        self._sshd = subprocess.Popen([sys.executable, __file__, "serve", str(folder)], start_new_session=True)
        while not (folder / "s").exists():
            assert self._sshd.poll() is None
            time.sleep(0.01)

    def processes(self) -> list[psutil.Process]:
        """All that is left on the hosts."""
        return [process for process in psutil.Process(self._sshd.pid).children(recursive=True) if alive(process)]

    def asked(self) -> list[tuple[str, str]]:
        """(host, command) of everything that was run."""
        return [tuple(json.loads(line)) for line in (self.folder / ASKED).read_text().splitlines()]

    def empty(self, patience: float = 30.0) -> bool:
        deadline = time.monotonic() + patience
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes()

    def end(self) -> None:
        family = self.processes()
        self._sshd.kill()
        self._sshd.wait()
        for process in family:
            with suppress(psutil.Error):
                process.kill()


@contextmanager
def hosts(folder: Path, slots: dict[str, int]) -> Iterator[Hosts]:
    """Hosts with so many slots by name, and their programs first on this process's PATH."""
    before = os.environ["PATH"]
    running = Hosts(folder, slots)
    os.environ["PATH"] = os.pathsep.join([str(running.bin), before])
    try:
        yield running
    finally:
        os.environ["PATH"] = before
        running.end()


# --- the programs ----------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    ctypes.CDLL(None).prctl(
        36, 1, 0, 0, 0
    )  # PR_SET_CHILD_SUBREAPER: what loses its parent on a host is still on that host
    threading.Thread(target=_reap, daemon=True).start()
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(folder)  # the socket's path is short, however long that of the folder is
    listener.bind("s")
    listener.listen(64)
    while True:
        connection, _ = listener.accept()
        known = (folder / "hosts").read_text().split()
        threading.Thread(target=_run, args=(connection, known, folder / ASKED), daemon=True).start()


_own: set[int] = set()
_starting = threading.Lock()


def _reap() -> None:
    """As process 1 of a host does: who waits for the end of a process that has lost its parent would wait forever otherwise."""
    while True:
        with _starting:
            for process in psutil.Process().children():
                with suppress(psutil.Error):
                    if process.pid not in _own and process.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(process.pid, os.WNOHANG)
        time.sleep(0.1)


def _run(connection: socket.socket, known: list[str], asked: Path) -> None:
    lines = connection.makefile("rw")
    host, command, given = json.loads(lines.readline())
    with asked.open("a") as log:
        log.write(json.dumps([host, command]) + "\n")
    if host not in known:
        print(json.dumps(["", f"{host}: Permission denied (publickey).\n", 255]), file=lines, flush=True)
        return
    with _starting:
        remote = subprocess.Popen(
            ["/bin/sh", "-c", command],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(asked.parent)},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        _own.add(remote.pid)
    assert remote.stdin is not None and remote.stdout is not None
    remote.stdin.write(given)
    remote.stdin.close()
    with suppress(OSError):  # the client was killed
        for line in remote.stdout:
            print(json.dumps([line, "", None]), file=lines, flush=True)
    remote.stdout.close()
    code = remote.wait()
    with suppress(OSError):
        print(json.dumps(["", "", code if code >= 0 else 255]), file=lines, flush=True)


def _ask(folder: Path, host: str, command: str, given: str, prefix: str) -> int:
    connection = socket.socket(socket.AF_UNIX)
    os.chdir(folder)
    connection.connect("s")
    lines = connection.makefile("rw")
    print(json.dumps([host, command, given]), file=lines, flush=True)
    for line in lines:
        out, error, code = json.loads(line)
        if out:
            print(f"{prefix}{out}", end="", flush=True)
        if error:
            print(f"{prefix}{error}", end="", file=sys.stderr, flush=True)
        if code is not None:
            return int(code)
    return 255


def ssh(folder: Path, arguments: list[str]) -> int:
    while arguments[0].startswith("-"):
        arguments = arguments[2:]
    host, *command = arguments
    return _ask(folder, host, " ".join(command), sys.stdin.read(), "")


def pdsh(folder: Path, arguments: list[str]) -> int:
    """`pdsh -S -f N -w HOST,... COMMAND...`"""
    assert arguments[0] == "-S" and arguments[1] == "-f" and arguments[3] == "-w"
    assert os.environ["PDSH_RCMD_TYPE"] == "ssh"
    names = arguments[4].split(",")
    command, codes = " ".join(arguments[5:]), dict[str, int]()

    def one(number: int, host: str) -> None:
        own = command.replace("%n", str(number)).replace("%h", host)
        if code := _ask(folder, host, own, "", f"{host}: "):
            print(f"pdsh@here: {host}: ssh exited with exit code {code}", file=sys.stderr, flush=True)
        codes[host] = code

    threads = [threading.Thread(target=one, args=item) for item in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(codes.values())


if __name__ == "__main__":
    what, place, *rest = sys.argv[1:]
    sys.exit({"serve": lambda *_: serve(Path(place)), "ssh": ssh, "pdsh": pdsh}[what](Path(place), rest))
