"""vLLM's executor over Ray, on the GPUs that the worker's bridge has reserved (`tasks/workers/reserve.py`).

vLLM takes a placement group from the Ray actor in which it runs. A worker here is a process below an actor, so the group comes
from a variable. The engine's workers are actors of this process's job in Ray, and end with this process too."""

from __future__ import annotations

import os

from vllm.ray.ray_env import RAY_NON_CARRY_OVER_ENV_VARS
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from storage.disk.redact import names_secret
from tasks.workers.reserve import join

_OF_THIS_PROCESS = ("OPD_", "RAY_", "CUDA_VISIBLE_DEVICES")
_OF_THIS_MACHINE = {"TMPDIR", "HOME", "PWD", "OLDPWD", "HOSTNAME", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH"}


class OverNodes(RayExecutorV2):
    """`distributed_executor_backend` of an engine over several nodes."""

    def _init_executor(self) -> None:
        config = self.vllm_config.parallel_config
        config.placement_group = join()
        # vLLM's workers check the number of GPUs of their node unless this is the text (vllm/v1/worker/gpu_worker.py)
        config.distributed_executor_backend = "ray"
        # vLLM gives all variables of this process to workers on other nodes that do not have them
        RAY_NON_CARRY_OVER_ENV_VARS.update(name for name in os.environ if not carried(name))
        super()._init_executor()


def carried(name: str) -> bool:
    """Whether a variable of this process is for the engine's workers on other nodes too."""
    return not (name.startswith(_OF_THIS_PROCESS) or name in _OF_THIS_MACHINE or names_secret(name))
