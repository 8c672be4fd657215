"""A small disk of this process's own: a tmpfs in a mount namespace that ends with the process and its children."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import forked

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_PRIVATE, _REMOUNT = (1 << 18) | (1 << 14), 32
PAGE = 4096
_ATTEMPTS = 1000


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(path: Path, size: int) -> None:
    """An empty tmpfs of `size` bytes at `path`, seen by this process and its children alone. OSError where the kernel does
    not let us; needs a process with one thread."""
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", _NEWNS)
    except PermissionError:
        _call("unshare", _NEWNS | _NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None)
    path.mkdir(parents=True, exist_ok=True)
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode())


def resize(path: Path, size: int) -> None:
    """Gives a disk made by `mount` another size."""
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(_REMOUNT), f"size={size}".encode())


def leave(path: Path, free: int) -> None:
    """Resizes it to what is used and `free` bytes more. The kernel refuses a size below what is used (EINVAL), so it is asked
    again where another process, such as Prefect's server, wrote in between."""
    for attempt in range(_ATTEMPTS):
        try:
            return resize(path, used(path) + free)
        except OSError as error:
            if error.errno != errno.EINVAL or attempt == _ATTEMPTS - 1:
                raise


def used(path: Path) -> int:
    """Bytes taken, in whole pages."""
    stat = os.statvfs(path)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def _try(path: str) -> None:
    mount(Path(path), PAGE)


def possible(folder: Path) -> bool:
    """Whether this machine lets us."""
    return forked.exit_code(forked.start(_try, str(folder), output=Path(os.devnull))) == 0
