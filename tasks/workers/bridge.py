"""The only process of a run that connects to a Ray cluster: `python -m tasks.workers.bridge serve|ask`.

`serve` stands where a worker process stands on one machine, below the same guard. It places an actor (`actor.py`) per process of
the worker, connects to the supervisor's socket once for each, and passes bytes both ways. It ends as the worker ends. Actors
belong to the bridge's job in Ray: however the bridge ends, they end too. `ask` puts the questions of `cluster.ask`."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import ray
from ray import exceptions
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from tasks.workers.actor import Host, look, loopback, versions
from tasks.workers.cluster import LAUNCH, Launch, RayCluster
from tasks.workers.guard import end_with_parent
from tasks.workers.guarded import SOCKET
from tasks.workers.reserve import Reserved, reserve

CONNECT_TIMEOUT = 90.0
"""Seconds to connect to a cluster. Ray itself would wait longer, and ends the process without a reason."""
ANSWER_TIMEOUT = 120.0
"""Seconds for a node's answer to the checks: its first process of this program imports much on a cold machine."""
_PATIENCE = 2.0
"""Seconds of one call that waits for output of a worker; well below the host's SILENCE."""
_END_TIMEOUT = 12.0
"""Seconds between the end of a worker's output and the end of its guard."""
_NAMESPACE = "opdflow"


class Refused(Exception):
    """The cluster cannot do what was asked; the text is one line with a field, a node where there is one, and the way out."""


def main(command: str) -> None:
    """Exits with 1, and one line on standard error, where the cluster or an actor is lost."""
    end_with_parent()  # also where the guard or the run is killed
    try:
        _serve() if command == "serve" else _ask()
    except Refused as error:
        _exit(str(error))
    except exceptions.RayError as error:
        _exit(f"the cluster failed: {type(error).__name__}: {_first_line(error)}")


def _exit(why: str) -> None:
    """Ends the process at once: threads of Ray may wait for a cluster that is gone."""
    print(why, file=sys.stderr, flush=True)
    os._exit(1)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


# --- the cluster -----------------------------------------------------------------------------------------------------


def connect(cluster: RayCluster) -> None:
    """Connects this process to the cluster. Refused where none answers, or this machine is none of its nodes."""
    with suppress(ConnectionError):
        address = cluster.address
        address = canonicalize_bootstrap_address_or_die(address)  # what ray.init does; here to know whom to call
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), 10).close()
        with _limit(
            CONNECT_TIMEOUT, f"runtime.cluster.address: the cluster at {address} does not answer; {_restart()}"
        ):
            try:
                ray.init(
                    address, namespace=_NAMESPACE, log_to_driver=False, logging_level="ERROR", configure_logging=False
                )
            except (
                Exception
            ) as error:  # another version of Ray or Python, no node on this machine: all are RuntimeErrors
                raise Refused(
                    f"runtime.cluster.address: cannot join the cluster at {address} from this machine"
                    f" ({_first_line(error)}); call opd on one of its nodes, with its versions of Python and Ray"
                ) from error
        return
    raise Refused(f"runtime.cluster.address: no Ray cluster answers at {cluster.address}; {_restart()}")


def _restart() -> str:
    return "start it (ray start --head, and on other nodes ray start --address=HEAD:6379), then call opd again"


@contextmanager
def _limit(seconds: float, why: str) -> Iterator[None]:
    timer = threading.Timer(seconds, _exit, (why,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _named(node: dict[str, Any]) -> str:
    """How a node is named to users: host and address; several nodes of one host by their port too."""
    shared = sum(other["NodeManagerAddress"] == node["NodeManagerAddress"] for other in ray.nodes()) > 1
    port = f":{node['NodeManagerPort']}" if shared else ""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}{port})"


# --- checks ----------------------------------------------------------------------------------------------------------


def _ask() -> None:
    question = json.load(sys.stdin)
    connect(RayCluster(**question["cluster"]))
    asked = []
    for node in _nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answer = ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        asked.append((node, answer.remote(question["path"], question["token"], question["files"])))
    found, deadline = [], time.monotonic() + ANSWER_TIMEOUT
    for node, answer in asked:
        has = node["Resources"]
        known = {"name": _named(node), "cpus": has.get("CPU", 0.0), "gpus": has.get("GPU", 0.0), "versions": {}}
        try:
            known |= ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
        except exceptions.GetTimeoutError:
            known["problem"] = (
                f"no answer within {ANSWER_TIMEOUT:g} s; look at its Ray logs (/tmp/ray/session_latest/logs)"
            )
        except exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            known["problem"] = (
                f"cannot run opdflow ({_first_line(cause)}); install it in the environment in which Ray was started"
            )
        found.append(known)
    print(json.dumps({"versions": versions(), "nodes": found}), flush=True)
    os._exit(0)


# --- a worker --------------------------------------------------------------------------------------------------------


class _Rank:
    """One process of the worker: its actor, and a connection to the supervisor."""

    def __init__(self, number: int, actor: Any, has_others: bool) -> None:
        self.number, self.actor, self.has_others = number, actor, has_others
        self.node = "a node"
        """Where it runs."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Calls the actor and waits. Refused, naming the node, where the actor or its node is lost."""
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout)
        except exceptions.RayActorError as error:
            raise Refused(
                f"the actor of rank {self.number} on node {self.node} was lost ({_first_line(error)})"
            ) from error


def _serve() -> None:
    launch = msgspec.json.decode(os.environ.pop(LAUNCH), type=Launch)
    cluster = RayCluster(**launch.cluster)
    connect(cluster)
    reserved = _reserve(launch, cluster)
    ranks = _place(launch, cluster, reserved)
    variables = _meeting(launch, cluster, ranks)
    if reserved is not None:
        variables[0] |= reserved.variables(cluster.interface)
        named = ", ".join(_named(node) for node in reserved.nodes)
        print(f"{launch.role}: {launch.engine} ({named})", flush=True)
        threading.Thread(target=_watch, args=(launch, reserved), daemon=True).start()
    for rank in ranks:
        title = f"{launch.role} on node {rank.node}"
        gpus = rank.call(
            "start",
            title,
            launch.argv,
            launch.env | variables[rank.number],
            launch.gpus,
            launch.plugin_path,
            launch.log,
        )
        print(f"{title}{f', GPUs {gpus}' if gpus else ''}", flush=True)
    path, ended = os.environ[SOCKET], threading.Barrier(len(ranks) + 1)
    for rank in ranks:
        rank.socket.connect(path)
        for task in (_up, _down):
            threading.Thread(target=_guarded, args=(task, rank, ended), daemon=True).start()
    ended.wait()
    _leave(ranks, 0)


def _guarded(task: Callable[[_Rank], bool], rank: _Rank, ended: threading.Barrier) -> None:
    try:
        if task(rank):
            ended.wait()
    except Refused as error:
        _exit(str(error))
    except exceptions.RayError as error:
        _exit(f"the cluster failed: {type(error).__name__}: {_first_line(error)}")


def _up(rank: _Rank) -> bool:
    """From the worker to the supervisor, until the worker ends in order. Another end ends the bridge in the same way."""
    while (data := rank.call("receive", _PATIENCE)) is not None:
        rank.socket.sendall(data)
    if rank.has_others:
        # before its guard has ended what it started: else what the others say of their lost connection is taken for the reason
        rank.socket.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + _END_TIMEOUT
    while (code := rank.call("code")) is None and time.monotonic() < deadline:
        pass  # its guard ends what the worker has started
    if code != 0:
        how = (
            "is still there"
            if code is None
            else f"has ended (exit {code})"
            if code > 0
            else f"was ended by signal {-code}"
        )
        print(f"rank {rank.number} on node {rank.node} {how}", flush=True)
        _leave([rank], 1 if code is None else code)
    return True


def _down(rank: _Rank) -> bool:
    """From the supervisor to the worker. The guard ends this process where the supervisor is gone."""
    with suppress(OSError):
        while data := rank.socket.recv(1 << 20):
            rank.call("send", data)
    return False


def _leave(ranks: list[_Rank], code: int) -> None:
    """Ends actors and this process, with a worker's exit code or by the signal that ended it."""
    for rank in ranks:
        with suppress(Exception):
            ray.kill(rank.actor)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def _reserve(launch: Launch, cluster: RayCluster) -> Reserved | None:
    """The GPUs of an engine over several nodes. Refused where there is no room within `placement_timeout`."""
    if launch.engine is None:
        return None
    deadline = time.monotonic() + cluster.placement_timeout
    while (found := reserve(launch.engine, launch.cpus, launch.gpus, deadline - time.monotonic())) is None:
        if time.monotonic() > deadline:
            raise Refused(_no_room(launch, cluster))
        time.sleep(0.5)
    return found


def _watch(launch: Launch, reserved: Reserved) -> None:
    """Ends the worker when its engine has lost a node: vLLM would wait for the GPUs of that one."""
    while reserved.whole():
        time.sleep(_PATIENCE)
    _exit(f"{launch.role}: {launch.engine} has lost a node")


def _place(launch: Launch, cluster: RayCluster, reserved: Reserved | None) -> list[_Rank]:
    """An actor per process of the worker, each on a node. Refused where there is no room within `placement_timeout`."""
    deadline = time.monotonic() + cluster.placement_timeout
    strategy: Any = "SPREAD"
    if reserved is not None:
        strategy = NodeAffinitySchedulingStrategy(reserved.nodes[0]["NodeID"], soft=False)
    if launch.world > 1:
        bundle = {"CPU": float(launch.cpus)} | ({"GPU": float(launch.gpus)} if launch.gpus else {})
        group = placement_group([bundle] * launch.world, strategy="PACK")
        if not group.wait(cluster.placement_timeout):
            raise Refused(_no_room(launch, cluster))
        strategy = PlacementGroupSchedulingStrategy(group)
    ranks = []
    for number in range(launch.world):
        options = {
            "name": f"{launch.name}-{number}",
            "num_cpus": launch.cpus,
            "num_gpus": launch.gpus,
            "max_concurrency": 8,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if launch.world > 1:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        ranks.append(_Rank(number, _create(options | {"scheduling_strategy": strategy}, deadline), launch.world > 1))
    nodes = {node["NodeID"]: node for node in _nodes()}
    for rank in ranks:
        try:
            where = rank.call("node", timeout=max(1.0, deadline - time.monotonic()))
        except exceptions.GetTimeoutError:
            raise Refused(_no_room(launch, cluster)) from None
        if where in nodes:
            rank.node = _named(nodes[where])
    return ranks


def _create(options: dict[str, Any], deadline: float) -> Any:
    """A new actor. One of that name is the same worker of a run that was killed a moment ago: it must be gone first."""
    while True:
        try:
            return ray.remote(Host).options(**options).remote()
        except ValueError as error:
            if time.monotonic() > deadline:
                raise Refused(
                    f"an earlier actor of this worker is still there ({_first_line(error)}); see `ray list actors`"
                ) from None
            time.sleep(0.2)


def _no_room(launch: Launch, cluster: RayCluster) -> str:
    free = ray.available_resources()
    many = f"{launch.world} x " if launch.world > 1 else ""
    needs = f"{many}{launch.cpus} CPUs" + (f" and {launch.gpus} GPUs" if launch.gpus else "")
    needs += f" and {launch.engine}" if launch.engine else ""
    return (
        f"runtime.{launch.role}: no room for {needs} within {cluster.placement_timeout:g} s"
        f" (runtime.cluster.placement_timeout): {len(_nodes())} nodes have {free.get('CPU', 0):g} CPUs and"
        f" {free.get('GPU', 0):g} GPUs free; start more nodes, or end what else runs on them"
    )


def _meeting(launch: Launch, cluster: RayCluster, ranks: list[_Rank]) -> list[dict[str, str]]:
    """Per rank the variables by which the trainer's ranks find each other; empty for other roles."""
    if launch.role != "trainer":
        return [{} for _ in ranks]
    from tasks.trainer.launch import rank_environment

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in _nodes()}
    at = [addresses[rank.call("node")] for rank in ranks]
    one = len(set(at)) == 1
    meeting = f"{'127.0.0.1' if one else at[0]}:{ranks[0].call('free_port')}"
    interfaces = [
        loopback() if one else cluster.interface or rank.call("interface", address)
        for rank, address in zip(ranks, at, strict=True)
    ]
    return [
        rank_environment(rank.number, launch.world, launch.device, meeting, interface, nodes=len(set(at)))
        for rank, interface in zip(ranks, interfaces, strict=True)
    ]


if __name__ == "__main__":
    main(sys.argv[1])
