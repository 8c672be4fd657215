"""Which GPUs each worker gets: a pure function of the config and of the GPUs that this process may use.

A process may use the GPUs that its own CUDA_VISIBLE_DEVICES lists, or all of the machine where that is not set. Workers get
entries of this list and never anything else: on a shared machine the others belong to somebody else."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from storage.errors import ConfigError

Role = Literal["sampler", "scorer", "trainer", "judge", "harness"]
_COUNT_FIELD = {"sampler": "workers", "scorer": "workers", "trainer": "processes"}
_WIDTH_FIELD = {"sampler": "tensor_parallel_size x pipeline_parallel_size", "scorer": "devices_per_worker"}
_UUIDS = ("GPU-", "MIG-")


def visible_gpus(variable: str | None, count: int) -> list[str]:
    """The GPUs that a process may use, as CUDA reads its CUDA_VISIBLE_DEVICES (`variable`; None: not set): ids, UUIDs or MIG
    instances. `count`: GPUs of the machine.

    CUDA ignores an entry that it does not know (-1, a number of no GPU, NoDevFiles) and all after it. ConfigError for one that is
    named twice (CUDA then shows no GPU at all)."""
    if variable is None:
        return [str(number) for number in range(count)]
    found: list[str] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.isdecimal() and (not count or int(entry) < count):
            found.append(str(int(entry)))
        elif entry.startswith(_UUIDS):
            found.append(entry)
        else:
            break
    if twice := sorted({entry for entry in found if found.count(entry) > 1}):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES: {variable} names {twice[0]} twice; name every GPU once")
    return found


def assign(
    role: Role, devices: Sequence[int | str] | None, workers: int, width: int, visible: Sequence[str]
) -> list[list[str]]:
    """The GPUs of each of `workers` workers, `width` each: worker n gets the list's entries from n * width on.

    The list is `visible`, or where `devices` is given what that chooses of it: a number is a place in `visible`, a text an
    entry of it (a UUID may be shortened, as in CUDA). ConfigError, with the numbers, for too few GPUs, an entry that is not
    visible, or one that is named twice."""
    chosen = list(visible) if devices is None else [_chosen(role, entry, visible) for entry in devices]
    if twice := sorted({entry for entry in chosen if chosen.count(entry) > 1}):
        raise ConfigError(
            f"runtime.{role}.devices: {list(devices or ())} has GPU {twice[0]} twice; name every GPU once"
        )
    if len(chosen) < workers * width:
        each = f" of {width} GPUs each ({_WIDTH_FIELD[role]})" if width > 1 else ""
        named = f"runtime.{role}.devices names {len(chosen)}" if devices is not None else _shows(visible)
        more = "name more in runtime." + role + ".devices" if devices is not None else _MORE
        need = "needs 1 GPU" if workers * width == 1 else f"need {workers * width} GPUs"
        raise ConfigError(
            f"runtime.{role}.{_COUNT_FIELD[role]}: {workers}{each} {need} of this machine, but {named};"
            f" {more}, or lower {_COUNT_FIELD[role]}" + (f" or {_WIDTH_FIELD[role]}" if width > 1 else "")
        )
    return [chosen[number * width : (number + 1) * width] for number in range(workers)]


_MORE = "let CUDA_VISIBLE_DEVICES list more"


def _chosen(role: str, entry: int | str, visible: Sequence[str]) -> str:
    if isinstance(entry, int):
        if not 0 <= entry < len(visible):
            places = f"numbers are places in that list, 0 to {len(visible) - 1}" if visible else "so none can be named"
            raise ConfigError(f"runtime.{role}.devices: {entry} is not there: {_shows(visible)}; {places}")
        return visible[entry]
    if entry in visible:
        return entry
    alike = [other for other in visible if entry.startswith(_UUIDS) and _same(entry, other)]
    if len(alike) != 1:
        why = f"fits {len(alike)} of the GPUs" if alike else "is none of the GPUs"
        raise ConfigError(f"runtime.{role}.devices: {entry!r} {why} that this process may use: {_shows(visible)}")
    return alike[0]


def _same(one: str, other: str) -> bool:
    """Whether one is a shortened form of the other; CUDA accepts that for GPU-... alone."""
    return one.startswith("GPU-") and (other.startswith(one) or (other.startswith("GPU-") and one.startswith(other)))


def _shows(visible: Sequence[str]) -> str:
    return f"{len(visible)} {'is' if len(visible) == 1 else 'are'} visible" + (
        f" ({', '.join(visible)})" if visible else ""
    )


def gpu_memory() -> list[int]:
    """Bytes of memory of each GPU of this machine, as nvidia-smi says; empty where it cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return [int(line) * 2**20 for line in answer.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, by their device nodes; asks no CUDA library (that would take a GPU's memory)."""
    if not Path("/dev/nvidiactl").exists():
        return 0
    return sum(node.name.removeprefix("nvidia").isdigit() for node in Path("/dev").glob("nvidia[0-9]*"))
