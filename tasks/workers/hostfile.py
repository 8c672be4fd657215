"""DeepSpeed's hostfile (`runtime.cluster: {kind: hostfile}`): which host has which ranks, the command of DeepSpeed's runner, and
the checks before a run. Imports no DeepSpeed; the relay that calls its runner is `hosts.py`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil

from storage.errors import ConfigError
from tasks.workers.actor import versions
from tasks.workers.cluster import (
    Group,
    HostfileCluster,
    Node,
    Settings,
    asking,
    differences,
    forwarded,
    has_passed,
    passed_lately,
)
from tasks.workers.guarded import CHECKOUT, machine_environment

LAUNCH = "OPD_RELAY_LAUNCH"
"""Variable with what a relay has to start, a `RelayLaunch` in JSON."""
ANSWER_TIMEOUT = 120.0
"""Seconds for a host's answer to the checks."""
_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)(\s.*)?")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Names that pdsh and the runner's --include take as they are; both have signs of their own for lists, users and slots."""
_PLAIN = re.compile(r"[\w+=:,./~-]*", re.ASCII)
"""Paths that the runner's command line leaves as they are: it quotes none of them for the shell of a host."""
_COMPARED = ("python", "torch", "deepspeed", "opdflow")
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of the variables that the runner writes into the command line of every host, for all to see."""
_PROGRAMS = {"pdsh": "pdsh", "ssh": "openssh-client"}
"""Programs that the runner needs -> their package in Debian."""


class RelayLaunch(msgspec.Struct, frozen=True):
    """What a relay starts: `world` ranks `python ARGV` with the variables `env`. `modules`: folders of modules, as in
    PYTHONPATH; `log`: where their output goes."""

    cluster: dict[str, Any]
    world: int
    device: str
    log: str
    argv: list[str]
    env: dict[str, str]
    modules: str


def relay_command(
    cluster: HostfileCluster,
    group: Group,
    device: str,
    log: Path,
    argv: Sequence[str],
    env: Mapping[str, str],
    plugin_path: str | None,
) -> tuple[list[str], dict[str, str]]:
    """The command of the relay to the trainer's ranks, and its additional environment."""
    launch = RelayLaunch(
        cluster=cluster.model_dump(mode="json"),
        world=group.world,
        device=device,
        log=str(log),
        argv=list(argv),
        env=forwarded() | dict(env),
        # the hosts see the same folders, and workers here have those of the run too
        modules=os.pathsep.join(filter(None, [plugin_path, os.environ.get("PYTHONPATH")])),
    )
    return [sys.executable, "-m", "tasks.workers.hosts"], {LAUNCH: msgspec.json.encode(launch).decode()}


# --- hosts and ranks -------------------------------------------------------------------------------------------------


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the file's order. ConfigError, with the line, for what DeepSpeed would refuse, and for names that its
    runner or pdsh would read as something else."""
    field = f"runtime.cluster.hostfile: {path}"
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {getattr(error, 'strerror', None) or 'is no text in UTF-8'}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or _NAME.fullmatch(found[1]) is None:
            raise ConfigError(f"{field}, line {number}: {line!r}; write HOST slots=N, with a name or an IPv4 address")
        if found[1] in hosts:
            raise ConfigError(f"{field}, line {number}: {found[1]} a second time; give all of its slots in one line")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{field}: has no host; write lines of HOST slots=N")
    return hosts


def placed(cluster: HostfileCluster, ranks: int) -> dict[str, list[int]]:
    """The slots that the ranks take, by host in the file's order: rank 0 has the first. ConfigError for too few."""
    hosts, taken, left = read_hostfile(cluster.hostfile), dict[str, list[int]](), ranks
    for host, slots in hosts.items():
        if mine := min(slots, left):
            taken[host] = list(range(mine))
            left -= mine
    if left:
        have = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
        raise ConfigError(
            f"runtime.trainer.processes: {ranks} ranks, but {cluster.hostfile} has {sum(hosts.values())} slots ({have}); lower"
            " it, or add slots"
        )
    return taken


def runner_command(cluster: HostfileCluster, taken: Mapping[str, Sequence[int]], order: Path) -> list[str]:
    """DeepSpeed's runner, which starts `tasks.workers.on_host rank ORDER` in the given slots."""
    include = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in taken.items())
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        f"--hostfile={cluster.hostfile.absolute()}",
        f"--include={include}",
        "--launcher=pdsh",
        "--force_multi",  # else it starts the ranks of a single host on this machine
        "--no_ssh_check",  # our own asks every host, with the arguments that pdsh gives to ssh
        f"--master_addr={next(iter(taken))}",  # not used, but the runner asks the first host by ssh where it is missing
        *("--no_local_rank", "--log_level=warning", "--module", "tasks.workers.on_host", "rank", str(order)),
    ]


def runner_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's runner, without what it would show in command lines: passwords of MLflow among it."""
    kept = {name: value for name, value in env.items() if not name.startswith(_EXPORTED)}
    return kept | {
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",  # of the runner alone: it asks for GPUs of this machine otherwise
    }


def own_address(cluster: HostfileCluster, hosts: Sequence[str]) -> str:
    """The address of this machine at which the hosts find it. ConfigError where a name says nothing here."""
    if cluster.address is not None:
        return cluster.address
    mine = _addresses()
    for host in hosts:
        try:
            family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing
                own = str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(
                f"runtime.cluster.address: no route to host {host} ({error.strerror}); give the address of this machine that the"
                " hosts reach"
            ) from None
        if target[0] not in mine and not str(target[0]).startswith("127."):
            return own
    return "127.0.0.1"


# --- checks ----------------------------------------------------------------------------------------------------------


def require_hosts(cluster: HostfileCluster, runtime: Settings, root: Path | str) -> str | None:
    """Asks every host that gets ranks whether it can train for a store in `root`.

    Returns a line with what goes where. ConfigError with a line for everything that is wrong, by field and host."""
    taken = placed(cluster, runtime.group("trainer").world)
    question = json.dumps([cluster.model_dump(mode="json"), taken, runtime.device, str(root)])
    if passed_lately(question):
        return None
    _require_programs()
    _require_plain({"root": Path(root).absolute(), "the path of opdflow": CHECKOUT, "Python": Path(sys.executable)})
    address = own_address(cluster, list(taken))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    nodes, unreached = _ask(taken, address, Path(root), runtime.files)
    mine = {name: version for name, version in versions().items() if name in _COMPARED}
    problems = differences(mine, nodes, "host")
    problems += [
        f"runtime.cluster.address: host {host} does not reach this machine at {address} ({why}); open its firewall to the"
        " hosts, or give another address"
        for host, why in unreached.items()
    ]
    problems += [
        f"runtime.cluster.hostfile: host {host} is this machine, where DeepSpeed's launcher takes the first {len(slots)} GPUs,"
        f" but CUDA_VISIBLE_DEVICES is {visible}; leave this host out, or unset the variable"
        for host, slots in taken.items()
        if runtime.device == "cuda" and visible and not _begins(visible, slots) and _is_this_machine(host)
    ]
    problems += [
        f"runtime.cluster.hostfile: host {node.name} gets {len(taken[node.name])} ranks and has {node.gpus:g} GPUs; lower its"
        " slots"
        for node in nodes
        if runtime.device == "cuda" and node.problem is None and node.gpus < len(taken[node.name])
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    has_passed(question)
    return f"ranks of the trainer: {_ranks(taken)}; all other workers on this machine ({address})"


def _begins(visible: str, slots: Sequence[int]) -> bool:
    """Whether a CUDA_VISIBLE_DEVICES begins with the GPUs of these slots."""
    return visible.split(",")[: len(slots)] == list(map(str, slots))


def _is_this_machine(host: str) -> bool:
    try:
        address = str(socket.getaddrinfo(host, 9)[0][4][0])
    except OSError:  # a name of ssh's own
        return False
    return address.startswith("127.") or address in _addresses()


def _addresses() -> set[str]:
    return {known.address for all_of in psutil.net_if_addrs().values() for known in all_of}


def _ranks(taken: Mapping[str, Sequence[int]]) -> str:
    first, found = 0, []
    for host, slots in taken.items():
        last = first + len(slots) - 1
        found.append(f"{first if first == last else f'{first} to {last}'} on {host}")
        first = last + 1
    return ", ".join(found)


def _require_programs() -> None:
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise ConfigError(
                f"runtime.cluster: {program} is not on PATH, and DeepSpeed's launcher needs it; install it on this machine"
                f" (Debian: apt-get install {package})"
            )


def _require_plain(paths: Mapping[str, Path]) -> None:
    for name, path in paths.items():
        if _PLAIN.fullmatch(str(path)) is None:
            raise ConfigError(
                f"{name}: {path} has characters that DeepSpeed's launcher does not quote for the shell of a host; use a path of"
                " letters, digits and + - . _ / alone"
            )


def ssh_command(host: str, command: str) -> list[str]:
    """ssh with what pdsh gives to it, asking nobody for a password."""
    more = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", *more, host, command]


def _ask(
    hosts: Mapping[str, object], address: str, root: Path, files: Mapping[str, Path]
) -> tuple[list[Node], dict[str, str]]:
    """What every host says of itself, and why some do not reach this machine."""
    unreached: dict[str, str] = {}

    def one(host: str) -> Node:
        answer = _answer(host, text)
        if (why := answer.pop("unreached", None)) is not None:
            unreached[host] = why
        missing = tuple(answer.pop("missing", ()))
        if (user := answer.pop("user", os.getuid())) != os.getuid():
            answer["problem"] = (
                f"ssh logs in as the user {user}, and the run is of the user {os.getuid()}: the ranks could not read its files;"
                f" set User for {host} in ~/.ssh/config"
            )
        known = {name: version for name, version in answer.pop("versions", {}).items() if name in _COMPARED}
        return Node(host, 0, answer.pop("gpus", 0), known, missing=missing, **answer)

    with asking(root, files) as question, _open(address, len(hosts)) as port, ThreadPoolExecutor(32) as pool:
        text = json.dumps({**question, "address": [address, port]})
        nodes = list(pool.map(one, hosts))
    return nodes, unreached


@contextmanager
def _open(address: str, hosts: int) -> Iterator[int]:
    """A port at which so many hosts can see whether they reach this machine; nobody accepts their connections."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=hosts + 16) as listener:
            yield int(listener.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"runtime.cluster.address: {address} is no address of this machine ({error.strerror})"
        ) from None


def _answer(host: str, question: str) -> dict[str, Any]:
    ask = f"cd {CHECKOUT}; env PYTHONPATH={CHECKOUT} PYTHONSAFEPATH=1 {sys.executable} -m tasks.workers.on_host look"
    try:
        asked = subprocess.run(
            ssh_command(host, ask),
            input=question,
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT,
            env=machine_environment(None),
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {ANSWER_TIMEOUT:g} s"}
    said = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
    if asked.returncode == 255:  # ssh's own
        return {
            "problem": f"ssh does not reach it without a password ({said}); see `ssh {host} true` (ssh-copy-id {host})"
        }
    try:
        found: dict[str, Any] = dict(json.loads(asked.stdout.strip().splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        return {
            "problem": f"cannot run opdflow ({said}); {CHECKOUT} and {sys.executable} must be there under the same paths"
        }
    return found
