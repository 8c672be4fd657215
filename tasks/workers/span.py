"""An engine whose GPUs are on several nodes of a Ray cluster: how many GPUs on how many nodes, and on which.

The choice is a pure function, so that a plan before a run and the start of an engine choose alike. vLLM's own placement group
asks for single GPUs that are close to each other: 6 and 2 of two nodes would do for a pipeline of two stages of 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from storage.text import counted

ENGINE = "OPD_ENGINE"
"""Variable with a `Place` in JSON, for a worker whose engine spans nodes."""


class Span(msgspec.Struct, frozen=True):
    """`gpus` GPUs on each of `nodes` nodes."""

    nodes: int
    gpus: int

    def __str__(self) -> str:
        return f"an engine of {counted(self.gpus, 'GPU')} on each of {self.nodes} nodes"


class Place(msgspec.Struct, frozen=True):
    """Where a worker finds the GPUs that its bridge has reserved: Ray's placement group `group`, in the cluster whose head is at
    `address`. `node`: the worker's own address in it."""

    address: str
    node: str
    group: str


@dataclass
class Room:
    """What is free on a node."""

    cpus: float
    gpus: float


def choose(rooms: Sequence[Room], cpus: int, gpus: int, span: Span | None) -> list[int] | None:
    """The nodes of a worker with `cpus` and `gpus` of one node, and of its engine: its own first. Takes what it needs of `rooms`;
    None, and nothing taken, where there is no room.

    A worker alone gets the first node with room. An engine's worker gets the node with most free GPUs; the engine's other nodes
    are first those that have no room for such a worker, then the fullest. Workers choose one after the other; another choice
    for all of them may hold more."""
    if span is None:
        found = [index for index, room in enumerate(rooms) if room.cpus >= cpus and room.gpus >= gpus][:1]
    else:
        fullest = sorted(range(len(rooms)), key=lambda index: -rooms[index].gpus)
        own = [i for i in fullest if rooms[i].cpus >= cpus and rooms[i].gpus >= gpus + span.gpus][:1]
        hosts = {i for i in fullest if rooms[i].cpus >= cpus and rooms[i].gpus >= gpus + span.gpus}
        others = [i for i in fullest if i not in own and rooms[i].gpus >= span.gpus]
        found = own + sorted(others, key=lambda i: i in hosts)[: span.nodes - 1]
        found = found if own and len(found) == span.nodes else []
    if not found:
        return None
    rooms[found[0]].cpus -= cpus
    rooms[found[0]].gpus -= gpus
    for index in found if span is not None else ():
        rooms[index].gpus -= span.gpus if span is not None else 0
    return found
