"""The GPUs of an engine over several nodes: the bridge reserves them as a placement group of Ray, which the worker joins. The
group belongs to the bridge's job: however the bridge ends, the group ends, and with it all actors in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import msgspec
import ray
from ray import PlacementGroupID
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from storage.errors import ConfigError
from tasks.workers.span import ENGINE, Place, Room, Span, choose

_WAIT = 10.0
"""Seconds for a group on nodes that had room a moment ago; then nodes are chosen again."""
_GONE = ("REMOVED", "RESCHEDULING")
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True)
class Reserved:
    """A placement group with a bundle per GPU, and the nodes that it is on. The worker runs on the first."""

    group: PlacementGroup
    nodes: list[dict[str, Any]]

    def whole(self) -> bool:
        """Whether all nodes still hold their GPUs for it."""
        return placement_group_table(self.group)["state"] not in _GONE

    def variables(self, interface: str | None) -> dict[str, str]:
        """What the worker must know. vLLM gives its variables to the engine's workers on all nodes, except VLLM_HOST_IP."""
        node = self.nodes[0]["NodeManagerAddress"]
        place = Place(ray.get_runtime_context().gcs_address, node, self.group.id.hex())
        found = {ENGINE: msgspec.json.encode(place).decode(), "VLLM_HOST_IP": node}
        return found | (dict.fromkeys(_INTERFACES, interface) if interface else {})


def reserve(span: Span, cpus: int, gpus: int, patience: float) -> Reserved | None:
    """Reserves the GPUs on nodes of which the first has room for the worker too, which has `cpus` and `gpus` of its own. None
    where no nodes have room now."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    has = [free.get(node["NodeID"], {}) for node in nodes]
    chosen = choose([Room(room.get("CPU", 0), room.get("GPU", 0)) for room in has], cpus, gpus, span)
    if chosen is None:
        return None
    on = [nodes[index] for index in chosen]
    labels = [{"ray.io/node-id": node["NodeID"]} for node in on for _ in range(span.gpus)]
    group = placement_group([{"GPU": 1.0}] * len(labels), strategy="PACK", bundle_label_selector=labels)
    if group.wait(max(0.1, min(_WAIT, patience))):
        return Reserved(group, on)
    remove_placement_group(group)  # something else was faster
    return None


def join() -> PlacementGroup:
    """The group of this worker, whose process becomes a driver of the cluster; its actors end with it."""
    if (text := os.environ.get(ENGINE)) is None:
        raise ConfigError("runtime.cluster: an engine over several nodes was started without its bridge")
    place = msgspec.json.decode(text, type=Place)
    if not ray.is_initialized():
        # the address chooses the node where a machine has several; output of the engine's workers comes to this process's
        ray.init(place.address, _node_ip_address=place.node, logging_level="ERROR", configure_logging=False)
    return PlacementGroup(PlacementGroupID.from_hex(place.group))
