"""vLLM's CPU platform on nodes of Ray that claim GPUs. vLLM asks a platform for the name of its devices in Ray, and the CPU's has
none; with one, the engine's workers are placed by claimed GPUs and compute on CPU, with gloo between them."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform


class ClaimedGpus(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "claimed_sockets.Sockets"  # as if the nodes shared no memory: gloo

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        vllm_config.parallel_config.worker_cls = "claimed_worker.Profiled"
