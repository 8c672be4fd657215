"""The CPU platform's communicator without its shared memory, which it takes for processes whose rendezvous has one port."""

from __future__ import annotations

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Sockets(CpuCommunicator):
    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
