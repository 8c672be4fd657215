"""Memory that is given back is gone from the process, and nothing that was written is lost with it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.workers.memory import drop_pages, give_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise and /proc")
MIB = 2**20


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    size, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            ours = rest.endswith(str(path))
        elif name == "Rss:" and ours:
            size += 1024 * int(rest.split()[0])
    return size


def test_mapped_weights_leave_the_memory_and_are_read_again(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = torch.arange(2 * MIB, dtype=torch.float32)
    save_file({"weight": weights}, path)
    held = load_file(path)["weight"]
    assert torch.equal(held, weights) and resident(path) >= 8 * MIB
    give_back(maps=True)
    assert resident(path) == 0
    assert torch.equal(held, weights) and resident(path) >= 8 * MIB


def test_mapped_weights_that_were_written_to_stay(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2 * MIB)}, path)
    held = load_file(path)["weight"]
    held[-1] = 1
    give_back(maps=True)
    assert held[-1] == 1 and held.sum() == 1


def test_dropped_pages_are_zeros_and_others_stay():
    held = np.full(4 * MIB + 6, 7, np.uint8)[3:-3]
    start = held.ctypes.data
    drop_pages(start, held.nbytes)
    first, last = -start % 4096, (start + held.nbytes) % 4096
    assert not held[first : held.nbytes - last].any()
    assert (held[:first] == 7).all() and (held[held.nbytes - last :] == 7).all()
    drop_pages(start, 1)  # no whole page
