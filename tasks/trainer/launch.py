"""Starts the trainer with DeepSpeed's per-node launcher, one process per rank. Imports no engine.

The launcher puts RANK, WORLD_SIZE, LOCAL_RANK and the visible devices into each rank's environment; the ranks stay in
the launcher's process group, so killing the group ends all of them. If a rank fails the launcher terminates the
others; on SIGTERM or SIGINT it terminates all. Ranks find each other through a file beside the supervisor's socket (see
`engine.start`), so concurrent runs share no port, and nothing listens outside the loopback device."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys


def launch_command(
    processes: int, device: str, port: int, devices: list[int] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command line and the additional environment that start a trainer of `processes` ranks.

    `device` is "cpu" or "cuda". `devices` are the GPU ids of the ranks; None takes the first that CUDA_VISIBLE_DEVICES
    of this process names, or 0, 1, ... Raises ValueError if fewer GPUs are named than processes."""
    visible: list[int | str]
    if device == "cpu":
        visible = list(range(processes))  # the launcher takes the number of ranks from this list, also on CPU
    elif devices is not None:
        visible = list(devices)
    else:
        named = [item for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
        visible = list(named) if named else list(range(processes))
    if len(visible) < processes:
        raise ValueError(
            f"runtime.trainer.processes: {processes} ranks need as many GPUs, but only {len(visible)} are named"
            f" ({', '.join(map(str, visible))}); name more in runtime.trainer.devices or lower processes"
        )
    world = base64.urlsafe_b64encode(json.dumps({"localhost": visible[:processes]}).encode()).decode()
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
        "tasks.workers.main",
        "trainer",
    ]
    loopback = "lo" if sys.platform == "linux" else "lo0"
    env = {
        "DS_ACCELERATOR": device,
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
    }
    return argv, env


def free_port() -> int:
    """A TCP port on the loopback device that is free now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
