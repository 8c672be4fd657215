"""Process limits for a query that DuckDB does not end itself; for processes with one query, like `opd query`.

DuckDB checks its interrupt and its memory limit between chunks of rows. One function call on a huge constant
(`md5(repeat('x', 1000000000))`) evades both: it took half a minute and 2 GB at limits of 2 seconds and 200 MB. The process
therefore gets a memory limit from the kernel, and a thread that ends it when the interrupt has no effect."""

from __future__ import annotations

import os
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GRACE_SECONDS = 2.0
"""Time after the limit for DuckDB to react to its interrupt."""
SLACK_BYTES = 1 << 30
"""Memory besides DuckDB's: the interpreter, thread stacks, the result."""
_UNITS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@contextmanager
def process_limits(limit_seconds: float, memory: str) -> Iterator[None]:
    """In the block this process ends, with exit code 2 and a line on stderr, `GRACE_SECONDS` after the limit. It can allocate
    at most `memory` (in DuckDB's spelling: 1GB, 512MiB) plus `SLACK_BYTES` more than it has now; MemoryError beyond."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    size = memory_bytes(memory)
    ended = threading.Event()

    def watch() -> None:
        if not ended.wait(limit_seconds + GRACE_SECONDS):
            line = f"error: ended after {limit_seconds:g} seconds, in a call that cannot be interrupted; make the query smaller\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
            os._exit(2)

    threading.Thread(target=watch, daemon=True, name="query-limit").start()
    try:
        if size is not None:
            wanted = _data_bytes() + size + SLACK_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (_least(wanted, before[0], before[1]), before[1]))
        yield
    finally:
        ended.set()
        resource.setrlimit(resource.RLIMIT_DATA, before)


def default_memory() -> str:
    """Half of the memory that this machine, or the container that this process is in, has free; at least 1 GB."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no cgroup v2
    return f"{max(1000, free // 2_000_000)}MB"


def memory_bytes(memory: str) -> int | None:
    """The bytes of a memory limit in DuckDB's spelling; None if it is malformed (DuckDB refuses it)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", memory, re.IGNORECASE)
    if found is None:
        return None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].lower() or "b"])


def _data_bytes() -> int:
    """Private writable memory mapped by this process, as RLIMIT_DATA counts it."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmData:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _least(*limits: int) -> int:
    given = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min(given)
