"""vLLM's executor over Ray, on the GPUs that the worker's bridge has reserved (`tasks/workers/reserve.py`).

vLLM takes a placement group from the Ray actor in which it runs. A worker here is a process below an actor, so the group comes
from a variable. The engine's workers are actors of this process's job in Ray, and end with this process too."""

from __future__ import annotations

import os

import msgspec
import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup
from vllm.ray.ray_env import RAY_NON_CARRY_OVER_ENV_VARS
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from storage.disk.redact import names_secret
from storage.errors import ConfigError
from tasks.workers.span import ENGINE, Place

_OF_THIS_PROCESS = ("OPD_", "RAY_", "CUDA_VISIBLE_DEVICES")
_OF_THIS_MACHINE = {"TMPDIR", "HOME", "PWD", "OLDPWD", "HOSTNAME", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH"}


class OverNodes(RayExecutorV2):
    """`distributed_executor_backend` of an engine over several nodes."""

    def _init_executor(self) -> None:
        if (text := os.environ.get(ENGINE)) is None:
            raise ConfigError("runtime.cluster: an engine over several nodes was started without its bridge")
        place = msgspec.json.decode(text, type=Place)
        if not ray.is_initialized():
            # the address chooses the node where a machine has several; output of the engine's workers comes to this log
            ray.init(place.address, _node_ip_address=place.node, logging_level="ERROR", configure_logging=False)
        config = self.vllm_config.parallel_config
        config.placement_group = PlacementGroup(PlacementGroupID.from_hex(place.group))
        # vLLM's workers check the number of GPUs of their node unless this is the text (vllm/v1/worker/gpu_worker.py)
        config.distributed_executor_backend = "ray"
        # vLLM gives all variables of this process to workers on other nodes that do not have them
        RAY_NON_CARRY_OVER_ENV_VARS.update(name for name in os.environ if not carried(name))
        super()._init_executor()


def carried(name: str) -> bool:
    """Whether a variable of this process is for the engine's workers on other nodes too."""
    return not (name.startswith(_OF_THIS_PROCESS) or name in _OF_THIS_MACHINE or names_secret(name))
