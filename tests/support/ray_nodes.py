"""A Ray cluster of several nodes on this machine for tests. Imports Ray only where one is started. A node has the machine's own
address or one of the loopback device (Ray replaces 127.0.0.1): no packet leaves the machine.

Everything of Ray that these tests do not need is off, and its time limits are raised: it ends a node whose helpers take longer
than 15 seconds, which a busy machine makes them do."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from places import CHECKOUT, PLUGINS

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_memory_monitor_refresh_ms": "0",  # it kills what it takes for too large, by the memory of the whole machine
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_raylet_start_wait_time_s": "120",
    "OMP_NUM_THREADS": "1",
}
STORE = 80 * 2**20
"""Bytes of a node's object store; nothing of ours is put there."""


class Nodes:
    """A running cluster. The run's bridges are on the head's machine, as all nodes are here."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        self.folder, self._cluster = folder, Cluster()
        self.workers: list[Any] = []

    def start(self, cpus: int = 1, gpus: int = 0, address: str | None = None) -> None:
        """Start a node, the first time the head. Nodes of different addresses count as different machines."""
        head = self._cluster.head_node is None
        node = self._cluster.add_node(
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=STORE,
            **({} if address is None else {"node_ip_address": address}),
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
        )
        if not head:
            self.workers.append(node)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill(self, number: int) -> None:
        """SIGKILL to a node (not the head) and all its processes."""
        self._cluster.remove_node(self.workers.pop(number), allow_graceful=False)

    def kill_head(self) -> None:
        """SIGKILL to the head and all its processes; the other nodes stay, without one."""
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def end(self) -> None:
        for node in [*self._cluster.worker_nodes]:
            self._cluster.remove_node(node, allow_graceful=False)
        if self._cluster.head_node is not None:
            self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)


@contextmanager
def nodes(*cpus: int, addresses: tuple[str | None, ...] = (), gpus: int = 0) -> Iterator[Nodes]:
    """A cluster with a node of so many CPUs each, the head first."""
    folder = tempfile.mkdtemp(prefix="opd-ray-", dir="/tmp")  # short: sockets are below it
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support"), str(PLUGINS)])
    (Path(folder) / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET | {"PYTHONPATH": path, "RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        cluster = Nodes(folder)
        try:
            for number, count in enumerate(cpus):
                cluster.start(count, gpus, addresses[number] if addresses else None)
            yield cluster
        finally:
            family = _of_ray(folder)
            cluster.end()
            _, slow = psutil.wait_procs(family, 5)
            for process in slow:  # helpers of a node that was killed look after it now and then
                with suppress(psutil.Error):
                    process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def _of_ray(folder: str) -> list[psutil.Process]:
    """Processes below this one that are of Ray: by the cluster's folder in their command, or by the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if folder in command or command.startswith("ray::"):
                found.append(process)
    return found
