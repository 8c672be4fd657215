"""Guards one worker: `python -I -S tasks/workers/guard.py SUPERVISOR FOLDER COMMAND...` runs the command and ends with it.

It ends when the command ends, when it receives SIGTERM, and when SUPERVISOR, the process that started it, is gone. Each time it
kills all processes below it, also those that ignore SIGTERM, started a session or lost their parent, and removes FOLDER (the
socket, temporary files).

It is a separate process because the supervisor may be gone and the worker may hang in a library's call. Linux only: elsewhere
just the worker's process group is ended. It imports little and costs 10 ms and 8 MB."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import sys
import time

SELF = "{guard}"
POLL_SECONDS = 0.25
PATIENCE_SECONDS = 8.0
"""Seconds to wait for killed processes to end; one in an uninterruptible kernel call may not."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOPPING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def main(supervisor: int, folder: str, command: list[str]) -> None:
    """Exits with the command's code or by its signal, and with 128 + SIGTERM after a SIGTERM. A part `SELF` of the command stands
    for this process's id: the supervisor of a guard below."""
    command = [str(os.getpid()) if part == SELF else part for part in command]
    _adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOPPING, signal.SIGCHLD})
    worker = os.posix_spawnp(command[0], command, os.environ, setpgroup=0, setsigmask=())
    status = _wait(worker, supervisor)
    _end_all_below()
    shutil.rmtree(folder, ignore_errors=True)
    if status is None:
        os._exit(128 + signal.SIGTERM)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # the supervisor must see the signal
        _die_by(-code)
    os._exit(code)


def _wait(worker: int, supervisor: int) -> int | None:
    """The worker's exit status; None when it must be ended first."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == worker:
            return status
        if pid:  # an orphan that was adopted and has ended
            continue
        if os.getppid() != supervisor:
            return None
        got = signal.sigtimedwait({*_STOPPING, signal.SIGCHLD}, POLL_SECONDS)
        if got is not None and got.si_signo in _STOPPING:
            return None


def end_with_parent() -> None:
    """Ends this process, by SIGKILL, together with the one that started it, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _adopt_orphans() -> None:
    """Make descendants whose parent ends children of this process, so that none can escape."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_all_below() -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for pid in _below(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # no child is left, so no process below is either
            return
        time.sleep(0.01)


def _below(ancestor: int) -> list[int]:
    """All processes below one, parents first."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, at = [ancestor], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found[1:]


def _parents() -> list[tuple[int, int]]:
    """(pid, its parent's pid) of every process."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                found.append((int(name), int(file.read().rpartition(b")")[2].split()[1])))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _die_by(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker itself may have dumped core
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
