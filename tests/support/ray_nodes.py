"""A Ray cluster of several nodes on this machine for tests. A node has the machine's own address or one of the loopback device
(Ray replaces 127.0.0.1): no packet leaves the machine. `python ray_nodes.py FOLDER` starts and kills the nodes, because Ray
takes the signals of the process that does, and its main thread.

Everything of Ray that these tests do not need is off, and its time limits are raised: it ends a node whose helpers take longer
than 15 seconds, which a busy machine makes them do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
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
    """A running cluster. A run's bridges are on the head's machine, as all nodes are here."""

    def __init__(self, folder: str, also: tuple[Path, ...] = ()) -> None:
        path = os.pathsep.join(map(str, [CHECKOUT, CHECKOUT / "tests" / "support", PLUGINS, *also]))
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, folder],
            env={**os.environ, **QUIET, "PYTHONPATH": path, "RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.workers = 0
        """Nodes beside the head."""
        self.address = ""

    def _ask(self, what: str, *arguments: object) -> Any:
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._keeper.stdin.flush()
        line = self._keeper.stdout.readline()
        assert line, f"the keeper of the cluster has ended at {what}"
        return json.loads(line)

    def start(self, cpus: int = 1, gpus: int = 0, address: str | None = None) -> None:
        """Start a node, the first time the head. Nodes of different addresses count as different machines."""
        self.workers += bool(self.address)
        self.address = self._ask("start", cpus, gpus, address)

    def kill(self, number: int) -> None:
        """SIGKILL to a node (not the head) and all its processes."""
        self.workers -= 1
        self._ask("kill", number)

    def kill_head(self) -> None:
        """SIGKILL to the head and all its processes; the other nodes stay, without one."""
        self._ask("kill_head")

    def end(self) -> None:
        """SIGKILL to everything that is left."""
        family = [self._keeper]
        with suppress(psutil.Error):
            family = psutil.Process(self._keeper.pid).children(recursive=True)
        with suppress(AssertionError, BrokenPipeError):
            self._ask("end")
        self._keeper.kill()
        self._keeper.wait()
        for process in family:  # helpers of a node look after it now and then only
            with suppress(psutil.Error):
                process.kill()


@contextmanager
def nodes(
    *cpus: int, addresses: tuple[str | None, ...] = (), gpus: int = 0, also: tuple[Path, ...] = ()
) -> Iterator[Nodes]:
    """A cluster with a node of so many CPUs each, the head first. `also`: folders with modules that the nodes find."""
    folder = tempfile.mkdtemp(prefix="opd-ray-", dir="/tmp")  # short: sockets are below it
    (Path(folder) / "ray").mkdir()
    before = {name: os.environ.get(name) for name in QUIET}
    cluster = Nodes(folder, also)
    try:
        os.environ.update(QUIET)  # bridges read it too
        for number, count in enumerate(cpus):
            cluster.start(count, gpus, addresses[number] if addresses else None)
        yield cluster
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def gone(*pids: int, patience: float = 90.0) -> bool:
    """Whether all of these processes end in this time."""
    deadline = time.monotonic() + patience
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def keep() -> None:
    """Does what the lines of standard input say, and answers each with a line; ends with it."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints
    cluster = Cluster()
    workers: list[Any] = []
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        if what == "start":
            cpus, gpus, address = arguments
            first = cluster.head_node is None
            node = cluster.add_node(
                wait=False,
                num_cpus=cpus,
                num_gpus=gpus,
                object_store_memory=STORE,
                include_dashboard=False,
                include_log_monitor=False,
                no_monitor=True,
                **({} if address is None else {"node_ip_address": address}),
            )
            cluster._wait_for_node(node, 300)  # its own wait is of 30 seconds
            workers += [] if first else [node]
        elif what == "kill":
            cluster.remove_node(workers.pop(arguments[0]), allow_graceful=False)
        elif what == "kill_head":
            cluster.remove_node(cluster.head_node, allow_graceful=False)
        else:
            for node in cluster.list_all_nodes():
                cluster.remove_node(node, allow_graceful=False)
        print(json.dumps(str(cluster.address)), file=answers, flush=True)


if __name__ == "__main__":
    keep()
