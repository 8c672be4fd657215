"""Memory that a worker holds without using it, given back to the system. Results do not depend on it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator

_WEIGHTS = b".safetensors"


def give_back(maps: bool = False) -> None:
    """Returns what was freed: glibc keeps it, after a training gigabytes of activations. With `maps` also
    the pages of mapped weights, which are read again from the page cache on access."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    if maps and sys.platform == "linux":
        for start, size in list(_clean_maps()):
            drop_pages(start, size)


def drop_pages(start: int, size: int) -> None:
    """Takes the whole pages of `size` bytes from address `start` out of this process's memory: those of a file are read again on
    access, others are zeros then. Linux only; nothing elsewhere."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if sys.platform == "linux" and length > 0:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if madvise(first, length, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")


def _clean_maps() -> Iterator[tuple[int, int]]:
    """(address, bytes) of this process's mappings of weight files whose pages are all the file's: none was written to, in memory
    or in swap, so none is lost when they are dropped."""
    with open("/proc/self/smaps", "rb") as file:
        lines = file.read().split(b"\n")
    found: tuple[int, int] | None = None
    for line in lines:
        name, _, rest = line.partition(b" ")
        if b"-" in name:  # ADDRESSES PERMISSIONS OFFSET DEVICE INODE PATH
            start, end = (int(address, 16) for address in name.split(b"-"))
            found = (start, end - start) if rest.endswith(_WEIGHTS) else None
        elif name == b"Anonymous:" and int(rest.split()[0]) > 0:
            found = None
        elif name == b"Swap:" and found is not None and int(rest.split()[0]) == 0:
            yield found
