"""Other machines from the run's side: their config, what workers need of a Ray cluster, and the checks before a run (those of a
hostfile's hosts: `hostfile.py`). Imports no Ray: another process (`bridge.py`) connects to the cluster, so that a cluster that is
lost takes no run down with it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
from pydantic import Field, field_validator

from storage.disk.files import temporary_name, unique
from storage.disk.redact import names_secret
from storage.errors import ConfigError
from storage.identity import Runtime
from tasks.workers.devices import Role, gpu_memory
from tasks.workers.guarded import machine_environment
from tasks.workers.span import Room, Span, choose

LAUNCH = "OPD_BRIDGE_LAUNCH"
"""Variable with what a bridge has to start, a `Launch` in JSON."""
_FORWARDED = ("OPD_", "VLLM_", "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_")
"""Variables of the run that its workers on other machines get too; everything else there is the machine's own."""
_SAME_FOR = 600.0
"""Seconds for which a cluster that passed the checks is not asked again by one process."""
_passed: dict[str, float] = {}
_memory: dict[str, int] = {}
"""By address of a cluster that passed the checks: bytes of its smallest GPU."""


class LocalCluster(Runtime):
    """This machine alone: workers and ranks are its processes."""

    kind: Literal["local"] = "local"


class RayCluster(Runtime):
    """A Ray cluster: workers and ranks are actors, placed by the CPUs (`threads`) and GPUs that they need (docs/cluster.md)."""

    kind: Literal["ray"] = "ray"
    address: str = Field(
        "auto",
        description="HOST:PORT of the cluster's head; auto: RAY_ADDRESS, else the cluster that this machine belongs to",
    )
    placement_timeout: float = Field(
        120, gt=0, description="seconds that a worker waits for a node with free CPUs and GPUs; then it counts as died"
    )
    interface: str | None = Field(
        None,
        description="network interface of gloo and NCCL between the trainer's ranks, and in engines over several nodes, on"
        " every node; null: for ranks the one that has the node's address in the cluster, or the loopback device where all are on"
        " one node; for engines what gloo and NCCL choose",
    )

    @field_validator("address")
    @classmethod
    def _head(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address != "auto" and not (host and port.isdecimal() and "/" not in address):
            raise ValueError(
                f"{address!r} is no address of a Ray head; write auto or HOST:PORT (a ray:// address is of Ray's client, whose"
                " machine is no node: call opd on a node)"
            )
        return address


class HostfileCluster(Runtime):
    """Hosts of a DeepSpeed hostfile, for the trainer's ranks alone: DeepSpeed's launcher starts them with pdsh. All other workers
    are processes of this machine (docs/cluster.md)."""

    kind: Literal["hostfile"] = "hostfile"
    hostfile: Path = Field(
        description="DeepSpeed's hostfile, lines of `HOST slots=N`: ranks fill the slots in order, on GPUs one each"
    )
    address: str | None = Field(
        None,
        description="address of this machine that the hosts reach; null: the one of its route to them, or 127.0.0.1 where they"
        " are all this machine",
    )
    interface: str | None = Field(
        None,
        description="network interface of gloo and NCCL between the ranks, on every host; null: the one that reaches this"
        " machine, or the loopback device where all ranks are on one host",
    )


Cluster = LocalCluster | RayCluster | HostfileCluster


@dataclass(frozen=True)
class Group:
    """What a role needs of a cluster: `workers` times, `world` processes of so many CPUs and GPUs each. `engine`: what the
    engine of each worker has beside these, on several nodes."""

    role: Role
    workers: int
    cpus: int = 0
    gpus: int = 0
    world: int = 1
    engine: Span | None = None

    @property
    def field(self) -> str:
        return "runtime.trainer.processes" if self.role == "trainer" else f"runtime.{self.role}.workers"

    def __str__(self) -> str:
        each = [f"{self.cpus} CPUs (runtime.threads)", *([f"{self.gpus} GPUs"] if self.gpus else [])]
        each += [str(self.engine)] if self.engine else []
        return f"{self.field} {self.workers * self.world} x {' and '.join(each)}"


class Launch(msgspec.Struct, frozen=True):
    """What a bridge starts: `world` processes `python ARGV` with the variables `env`, placed by CPUs and GPUs. `name`: of the
    actors, equal for the same worker of the same run, so that two never write at once. `log`: where their output goes.
    `engine`: what the worker's engine has beside these, on several nodes."""

    cluster: dict[str, Any]
    role: str
    name: str
    cpus: int
    gpus: int
    world: int
    device: str
    log: str
    argv: list[str]
    env: dict[str, str]
    plugin_path: str | None
    engine: Span | None = None


def bridge_command(
    cluster: RayCluster,
    group: Group,
    device: str,
    log: Path,
    argv: Sequence[str],
    env: Mapping[str, str],
    plugin_path: str | None,
) -> tuple[list[str], dict[str, str]]:
    """The command of the bridge to one worker of a group, and its additional environment."""
    launch = Launch(
        cluster=cluster.model_dump(),
        role=group.role,
        name=f"opd-{hashlib.sha256(str(log).encode()).hexdigest()[:16]}",
        cpus=group.cpus,
        gpus=group.gpus,
        world=group.world,
        device=device,
        log=str(log),
        argv=list(argv),
        env=forwarded() | dict(env),
        plugin_path=plugin_path,
        engine=group.engine,
    )
    return _bridge("serve"), {LAUNCH: msgspec.json.encode(launch).decode()}


def forwarded() -> dict[str, str]:
    """Variables of this process that workers on other machines get."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_FORWARDED) and not names_secret(name) and name != LAUNCH
    }


def _bridge(command: str) -> list[str]:
    return [sys.executable, "-m", "tasks.workers.bridge", command]


# --- checks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A node of a cluster. `versions`: of Python and packages; `problem`: why the node could not be asked; `root`: what is wrong
    with the store's folder there; `missing`: fields whose files it does not see."""

    name: str
    cpus: float
    gpus: float
    versions: dict[str, str | None]
    problem: str | None = None
    root: str | None = None
    missing: tuple[str, ...] = ()
    gpu_memory: int = 0
    """Bytes of its largest GPU; 0: not known."""


class Settings(Protocol):
    """The part of a RuntimeConfig that is read here."""

    @property
    def cluster(self) -> Cluster: ...
    @property
    def device(self) -> str: ...
    @property
    def keep_warm(self) -> bool | None: ...
    @property
    def files(self) -> Mapping[str, Path]: ...
    def group(self, role: Role) -> Group: ...


def require(runtime: Settings, root: Path | str) -> str | None:
    """Asks every machine of the runtime's cluster whether a run with its store in `root` can work there; None for one machine.

    Returns a line about the cluster. ConfigError with a line for everything that is wrong, by field and machine."""
    cluster = runtime.cluster
    if isinstance(cluster, LocalCluster):
        return None
    if isinstance(cluster, HostfileCluster):
        from tasks.workers.hostfile import require_hosts  # which imports this module

        return require_hosts(cluster, runtime, root)
    groups = [runtime.group(role) for role in ("sampler", "scorer", "trainer")]
    question = json.dumps([cluster.model_dump(), str(groups), runtime.keep_warm, str(root)])
    if passed_lately(question):
        return None
    mine, nodes = ask(cluster, Path(root), runtime.files)
    problems = [*differences(mine, nodes), *shortages(groups, nodes, bool(runtime.keep_warm))]
    if problems:
        raise ConfigError("\n".join(problems))
    has_passed(question)
    if memory := [node.gpu_memory for node in nodes if node.gpu_memory and node.gpus]:
        _memory[cluster.address] = max(memory)
    cpus, gpus = (sum(getattr(node, kind) for node in nodes) for kind in ("cpus", "gpus"))
    found = f"{len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs: {', '.join(node.name for node in nodes)}"
    return "; ".join([found, *plan(groups, nodes, bool(runtime.keep_warm))])


def largest_gpu(runtime: Settings) -> int | None:
    """Bytes of the largest GPU of this machine, or of the runtime's cluster after `require`; None where it is not known. What
    does not fit this one fits none; smaller ones may be for a display, and a run may be told to leave them alone."""
    if isinstance(runtime.cluster, RayCluster):
        return _memory.get(runtime.cluster.address)
    return max(gpu_memory(), default=None)


def passed_lately(question: str) -> bool:
    """Whether this process has asked a cluster the same a moment ago, and found nothing wrong."""
    return time.monotonic() - _passed.get(question, -_SAME_FOR) < _SAME_FOR


def has_passed(question: str) -> None:
    _passed[question] = time.monotonic()


def ask(cluster: RayCluster, root: Path, files: Mapping[str, Path]) -> tuple[dict[str, str | None], list[Node]]:
    """Versions here, and what every node says of itself. ConfigError without Ray, a cluster, or a place for a store."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "runtime.cluster: ray is not installed on this machine; pip install 'opdflow[ray]' on every node"
        )
    with asking(root, files) as question:
        answer = _answer({"cluster": cluster.model_dump(), **question}, cluster)
    nodes = [Node(**(node | {"missing": tuple(node.get("missing", ()))})) for node in answer["nodes"]]
    return answer["versions"], nodes


@contextmanager
def asking(root: Path, files: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """What `actor.look` gets on another machine. ConfigError where there is no place for a store.

    The machines look for a file that is made in `root` (or in the nearest folder above it that exists) and locked here: whoever
    reads another content sees another folder, and whoever can lock it has no locks."""
    root = root.expanduser().absolute()
    folder = next(place for place in (root, *root.parents) if place.is_dir())
    path, token = folder / temporary_name("cluster"), unique()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(f"root: {folder} cannot be written ({error.strerror}); choose another --root") from None
    try:
        os.write(descriptor, token.encode())
        os.fsync(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield {"path": str(path), "token": token, "files": {field: str(file) for field, file in files.items()}}
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _answer(question: Mapping[str, Any], cluster: RayCluster) -> dict[str, Any]:
    asked = subprocess.run(
        _bridge("ask"),
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=machine_environment(None) | {"PYTHONSAFEPATH": "1"},
    )
    found = asked.stdout.strip().splitlines()
    if asked.returncode or not found:
        said = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ConfigError(said if said.startswith("runtime.") else f"runtime.cluster: {said}")
    answer: dict[str, Any] = json.loads(found[-1])
    if not answer["nodes"]:
        raise ConfigError(
            f"runtime.cluster.address: the cluster at {cluster.address} has no node; start one: ray start"
        )
    return answer


def differences(mine: Mapping[str, str | None], nodes: Sequence[Node], kind: str = "node") -> list[str]:
    """A line for everything in which a node (or host: `kind`) differs from this machine, or that it does not see."""
    found = []
    for node in nodes:
        if node.problem is not None:
            found.append(f"runtime.cluster: {kind} {node.name}: {node.problem}")
            continue
        found += [
            f"runtime.cluster: {kind} {node.name} has {package} {node.versions.get(package) or '(none)'}, this machine"
            f" {version or '(none)'}; install the same version on every {kind}"
            for package, version in mine.items()
            if node.versions.get(package) != version
        ]
        if node.root is not None:
            found.append(
                f"root: {kind} {node.name}: {node.root}; give a --root on a file system that all {kind}s share"
            )
        found += [
            f"{field}: {kind} {node.name} does not see this file or folder; put it on a file system that all {kind}s share"
            for field in node.missing
        ]
    return found


def shortages(groups: Sequence[Group], nodes: Sequence[Node], together: bool) -> list[str]:
    """A line for every group that all nodes together have no room for; `together`: the groups keep their places side by side."""
    found = []
    for group in groups:
        if (fits := len(_placed([group], nodes))) < group.workers * group.world:
            found.append(
                f"{group.field}: {group.workers * group.world} are asked for, but {_have(nodes)} have room for {fits}"
                f" ({group}); start more nodes, or lower it" + (", or runtime.threads" if group.cpus > 1 else "")
            )
    wanted = sum(group.workers * group.world for group in groups)
    if not found and together and len(_placed(groups, nodes)) < wanted:
        found.append(
            f"runtime.keep_warm: true keeps {', '.join(map(str, groups))} side by side, but {_have(nodes)}; set it false, start"
            " more nodes, or lower runtime.threads"
        )
    return found


def _have(nodes: Sequence[Node]) -> str:
    return "the nodes (" + "; ".join(f"{n.name}: {n.cpus:g} CPUs, {n.gpus:g} GPUs" for n in nodes) + ")"


def plan(groups: Sequence[Group], nodes: Sequence[Node], together: bool) -> list[str]:
    """A line for every engine over several nodes: where it fits. It gets these nodes unless something else takes their GPUs."""
    placed = _placed(groups, nodes) if together else [one for group in groups for one in _placed([group], nodes)]
    return [
        f"{group.role}: {group.engine} ({', '.join(nodes[index].name for index in where)})"
        for group, where in placed
        if group.engine is not None
    ]


def _placed(groups: Sequence[Group], nodes: Sequence[Node]) -> list[tuple[Group, list[int]]]:
    """The processes of the groups that find a place, the largest first, and the nodes of each."""
    free = [Room(node.cpus, node.gpus) for node in nodes]
    found = []
    for group in sorted(groups, key=lambda group: (group.engine is None, -group.gpus, -group.cpus)):
        for _ in range(group.workers * group.world):
            if (where := choose(free, group.cpus, group.gpus, group.engine)) is None:
                break
            found.append((group, where))
    return found
