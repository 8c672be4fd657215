"""File primitives of the store: atomic writes, directory fsync, sealed JSON, quarantine."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.disk.failpoints import failpoint
from storage.errors import CorruptArtifact, NotEnoughSpace, OpdError, StoreError
from storage.identity import canonical_json
from storage.text import size_text

TEMPORARY = ".tmp-"
STORE_PLACES = ("", "artifacts/*/*/", "runs/", "runs/*/", "runs/*/logs/", "quarantine/", "memo/")
"""Folders of a store with temporary files, as prefixes of glob patterns."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
_OWNER = re.compile(re.escape(TEMPORARY) + r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)\.(?P<started>\d+)-")


def unique() -> str:
    """12 hex digits that no other writer uses."""
    return uuid.uuid4().hex[:12]


def temporary_name(suffix: str = "") -> str:
    """A name for a temporary file or directory. It identifies this process, so that `remove_leftovers` can remove it later."""
    known = _state_and_start(os.getpid())
    owner = f"{_machine()}-{os.getpid()}.{known[1] if known is not None else 0}"
    return f"{TEMPORARY}{owner}-{unique()}" + (f"-{suffix}" if suffix else "")


@functools.cache
def _machine() -> str:
    """Identifies a set of comparable process ids: 8 hex digits of host, machine id and pid namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def remove_leftovers(root: Path, places: Sequence[str] = STORE_PLACES, mine: bool = False) -> list[Path]:
    """Removes the temporary files of killed processes from folders under `root`; returns what it removed.

    Files of other hosts are left to `opd gc`. Files of living processes and files with a final name are never touched; `mine`
    also removes this process's own, because an interruption can come before a writer handles it."""
    removed = []
    for place in places:
        for path in root.glob(f"{place}{TEMPORARY}*"):
            owner = _OWNER.match(path.name)
            if owner is None or owner["machine"] != _machine():
                continue
            pid = int(owner["pid"])
            if _alive(pid, int(owner["started"])) and not (mine and pid == os.getpid()):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _alive(pid: int, started: int) -> bool:
    """Whether the process that started then is alive: another may have its id by now. An unknown start (0) matches any. One that
    has ended and that its parent has not asked for yet (a zombie) is dead: where process 1 asks for none, as in many
    containers, it stays in the table."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    known = _state_and_start(pid)
    return known is None or (known[0] not in "ZX" and started in (0, known[1]))


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """A process's state (a letter) and start time in clock ticks since boot; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes a directory and its missing parents, each durable before anything is created in it."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_directory(folder.parent)


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Converts "no space left" and "quota exceeded", from any library, to `NotEnoughSpace`."""
    try:
        yield
    except OpdError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in _FULL or "No space left on device" in str(error):
            left = ""
            with suppress(OSError):
                free = shutil.disk_usage(path if path.is_dir() else path.parent).free
                left = f" ({size_text(free)} free)"
            raise NotEnoughSpace(
                f"the disk is full: could not write {path}{left}. Nothing committed is lost: free space, then resume"
            ) from error
        raise


def require_space(path: Path, bytes_needed: int, purpose: str = "") -> None:
    """Raises NotEnoughSpace unless the file system of `path` has that many bytes free."""
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        for_what = f" for {purpose}" if purpose else ""
        raise NotEnoughSpace(
            f"{path}: {size_text(bytes_needed)} needed{for_what}, {size_text(free)} free. Free some space or choose another root"
            " (--root, OPD_ROOT)"
        )


def write_durably(directory: Path, data: bytes) -> Path:
    """Writes a fsynced temporary file in `directory`; the caller renames or links it to its final name."""
    path = directory / temporary_name()
    with explain_full_disk(path):
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                failpoint("file.before_fsync", path)
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return path


def replace_atomically(path: Path, data: bytes) -> None:
    """Replaces a file atomically: readers see the old or the new bytes, also after a crash."""
    temporary = write_durably(path.parent, data)
    with explain_full_disk(path):
        try:
            failpoint("file.before_replace", temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        failpoint("file.after_replace", path)
        fsync_directory(path.parent)


def append_durably(path: Path, data: bytes) -> None:
    """Adds to the end of a file, which may be missing, and fsyncs. What could not be written whole is taken back."""
    with explain_full_disk(path), open(path, "ab") as file:
        before = file.tell()
        try:
            file.write(data)
            file.flush()
            failpoint("file.before_append", path)
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise
    if before == 0:
        fsync_directory(path.parent)


def publish_exclusively(path: Path, data: bytes) -> bool:
    """Publishes a complete file under a free name, or returns False if the name is taken. One of several racers wins."""
    temporary = write_durably(path.parent, data)
    with explain_full_disk(path):
        try:
            failpoint("manifest.before_link", temporary)
            os.link(temporary, path)
            failpoint("manifest.after_link", path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)
    failpoint("manifest.after_sync", path)
    return True


def remove(path: Path) -> bool:
    """Removes a file or a folder. A folder is first renamed, so that no reader sees half of it. False if it is missing."""
    if path.is_dir() and not path.is_symlink():
        going = path
        if not path.name.startswith(TEMPORARY):
            going = path.with_name(temporary_name())
            try:
                os.rename(path, going)
            except FileNotFoundError:
                return False
            fsync_directory(path.parent)
        shutil.rmtree(going, ignore_errors=True)
        return True
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def seal(content: dict[str, Any]) -> bytes:
    """JSON with the sha256 of its own content, so that damage is detected. Keeps the order of keys."""
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1, allow_nan=False).encode()


def seal_line(content: dict[str, Any]) -> bytes:
    """The same on one line, for `append_durably`."""
    return (
        json.dumps({**content, "checksum": _checksum(content)}, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    )


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()


def unreadable(error: OSError) -> str:
    """A description of the damage if a read failed on the disk (EIO and similar). Raises any other error again."""
    if error.errno not in _BROKEN:
        raise error
    return f"unreadable ({error.strerror}): the disk may be failing, see the kernel's log"


def unseal(path: Path) -> dict[str, Any]:
    """Content of a sealed JSON file. FileNotFoundError if missing, CorruptArtifact if damaged."""
    return unsealed(path, _read(path))


def unseal_lines(path: Path) -> list[dict[str, Any]]:
    """Contents of the lines of `seal_line`. A last line that is not whole was being written when its writer ended: it is left
    out. FileNotFoundError if the file is missing, CorruptArtifact for any other damaged line."""
    lines = _read(path).split(b"\n")
    found = [unsealed(path, line) for line in lines[:-2]]
    with suppress(CorruptArtifact):
        found += [unsealed(path, line) for line in lines[-2:-1]]
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"{path}: {unreadable(error)}") from error


def unsealed(path: Path | str, data: bytes) -> dict[str, Any]:
    """Content of a sealed JSON file's bytes; `path` is for the message. CorruptArtifact if they are damaged."""
    try:
        content = json.loads(data)
        checksum = content.pop("checksum")
        good = checksum == _checksum(content)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path}: not a sealed record ({error})") from error
    if not good:
        raise CorruptArtifact(f"{path}: its checksum does not match its content")
    return dict(content)


def quarantine(root: Path, path: Path, reason: str) -> Path | None:
    """Moves a file or directory of the store to `<root>/quarantine`, with the reason beside it as JSON.

    The reason is written first, so that nothing is there without one. Returns the new path, or None if `path` no longer exists
    (another reader was faster)."""
    try:
        inside = path.parent.resolve().relative_to(root.resolve()) / path.name
    except ValueError:
        raise StoreError(f"{path} is outside the store {root}, so it cannot be quarantined") from None
    folder = root / "quarantine"
    folder.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    target = folder / f"{stamp}-{unique()}-{'-'.join(inside.parts[1:]) or inside.name}"
    note = {"path": inside.as_posix(), "reason": reason, "when": utc_now(), "host": socket.gethostname()}
    reasons = target.with_name(target.name + ".reason.json")
    replace_atomically(reasons, json.dumps(note, indent=1).encode())
    failpoint("quarantine.before_move", path)
    try:
        os.rename(path, target)
    except FileNotFoundError:
        reasons.unlink(missing_ok=True)
        return None
    failpoint("quarantine.after_move", target)
    fsync_directory(folder)
    fsync_directory(path.parent)
    return target


def scheme(path: Path | str) -> str | None:
    """`s3:` of a path that looks like a URL or another scheme (`s3://x`, `s3:/x`, `hub:me/x`); None for any other path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", str(path))
    return found[0].lower() if found else None


def link(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy where that cannot be. CorruptArtifact if the source is missing."""
    target.unlink(missing_ok=True)  # never written through: it may be a link itself
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{source}: missing; run again, only the damaged part is rebuilt") from error
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
