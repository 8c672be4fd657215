"""Starts the trainer: on one machine with DeepSpeed's per-node launcher, one process per rank; a single rank without it. On a
Ray cluster an actor starts each rank (`tasks/workers/bridge.py`), with the variables that the launcher would set; on hosts of a
hostfile DeepSpeed's runner starts the launchers (`tasks/workers/hosts.py`). Imports no engine.

The launcher puts RANK, WORLD_SIZE, LOCAL_RANK and the visible devices into each rank's environment; the ranks stay in
the launcher's process group, so killing the group ends all of them. If a rank fails the launcher terminates the
others; on SIGTERM or SIGINT it terminates all. Ranks find each other through a file beside the supervisor's socket (see
`engine.start`), so concurrent runs share no port, and nothing listens outside the loopback device."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence

from tasks.workers.actor import loopback


def launch_command(
    processes: int, device: str, port: int, gpus: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The command line and the additional environment that start a trainer of `processes` ranks; a single one without the
    launcher, whose imports take seconds and memory.

    `device` is "cpu" or "cuda"; `gpus` (cuda): the GPU of each rank, as CUDA_VISIBLE_DEVICES names it."""
    own = ["tasks.workers.main", "trainer"]
    if processes == 1:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "1"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [sys.executable, "-m", *own], _libraries(device, loopback()) | alone | place
    # the launcher takes the number of ranks from this list, also on CPU, and makes CUDA_VISIBLE_DEVICES of it
    visible = list(range(processes)) if device == "cpu" else list(gpus)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": visible}).encode()).decode()
    argv = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--log_level=warning",
        "--no_local_rank",
        "--module",
        *own,
    ]
    return argv, _libraries(device, loopback())


MEETING = "OPD_MEETING"
"""Variable with HOST:PORT of rank 0's store, where ranks on several machines find each other."""
NODES = "OPD_NODES"
"""Variable with the number of nodes that the ranks are on."""


def rank_environment(
    rank: int, world: int, device: str, meeting: str, interface: str, nodes: int = 1
) -> dict[str, str]:
    """The additional environment of a rank that is started alone on its node, where it sees one GPU.

    `meeting`: HOST:PORT on rank 0's node; `interface`: the network interface to the other ranks; `nodes`: of all ranks."""
    alone = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": str(world)}
    return alone | meeting_environment(device, meeting, interface, nodes)


def meeting_environment(device: str, meeting: str, interface: str, nodes: int) -> dict[str, str]:
    """Of that, what a launcher on a rank's node does not set."""
    host, _, port = meeting.rpartition(":")
    return _libraries(device, interface) | {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        MEETING: meeting,
        NODES: str(nodes),
    }


def _libraries(device: str, interface: str) -> dict[str, str]:
    return {
        "DS_ACCELERATOR": device,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
    }
