"""The relay between a run and the trainer's ranks on the hosts of a hostfile: `python -m tasks.workers.hosts`.

It stands where the launcher stands on one machine, below the same guard. It calls DeepSpeed's runner, which starts `on_host.py`
on each host by pdsh and ssh. Each rank connects over TCP and proves that it knows the secret of this relay; then the relay
connects to the supervisor's socket for it, and passes bytes both ways. However the relay ends, these connections end, and with
them the ranks.

The runner is never sent SIGTERM or SIGINT: it answers with `pkill -f` on all hosts, which ends every launcher of this Python
there, also those of other runs. It is killed instead. Hosts do not notice that, but the connections of the ranks end."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from storage.disk.files import temporary_name
from storage.errors import ConfigError
from tasks.workers.actor import loopback
from tasks.workers.cluster import HostfileCluster
from tasks.workers.guard import end_with_parent
from tasks.workers.guarded import CHECKOUT, SOCKET
from tasks.workers.hostfile import LAUNCH, RelayLaunch, own_address, placed, runner_command, runner_environment
from tasks.workers.wire import (
    GREETING_TIMEOUT,
    SILENCE_HERE,
    Hello,
    Order,
    Start,
    Stranger,
    new_secret,
    pass_on,
    proof,
    proves,
    read_line,
    send,
    watch,
)

_HOST_ENDED = re.compile(rb"pdsh@\S+: (\S+): \S+ exited with exit code (\d+)")
"""What pdsh writes when a command on a host fails. It waits for the other hosts, whose ranks would wait for those of this one."""


@dataclass(frozen=True)
class _Rank:
    hello: Hello
    connection: socket.socket


class Ended(Exception):
    """The relay ends with `code`; the text says why, where the log does not have it."""

    def __init__(self, code: int, why: str = "") -> None:
        super().__init__(why)
        self.code = code


def main() -> None:
    """Ends at once where the runner has ended; the guard ends what is left below."""
    end_with_parent()  # also where the guard or the run is killed
    try:
        relay(msgspec.json.decode(os.environ.pop(LAUNCH), type=RelayLaunch))
    except Ended as end:
        if str(end):
            print(end, file=sys.stderr, flush=True)
        os._exit(end.code)


def relay(launch: RelayLaunch) -> NoReturn:
    """Raises Ended with the runner's exit code, or with 1 where that hides that ranks are left."""
    cluster = HostfileCluster(**launch.cluster)
    try:
        taken = placed(cluster, launch.world)
        address = own_address(cluster, list(taken))
    except ConfigError as error:  # the file was changed since the checks
        raise Ended(1, str(error)) from None
    secret = new_secret()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=launch.world + 16) as listener:
        where = (address, int(listener.getsockname()[1]))
        order = Order(where, secret, launch.argv, launch.env, launch.modules, launch.log)
        with _written(order) as path:
            runner = subprocess.Popen(
                runner_command(cluster, taken, path),
                env=runner_environment(os.environ),
                cwd=CHECKOUT,  # the launchers on the hosts change to it
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,
            )
            output = _Output(runner)
            ranks = _gather(listener, secret, launch.world, output.failure)
    variables = _meeting(launch, cluster, ranks, len(taken))
    for rank, env in zip(ranks, variables, strict=True):
        with suppress(OSError):  # one that has ended meanwhile is seen below
            send(rank.connection, Start(proof(secret, "relay", rank.hello.challenge), env))
    ups = [_serve(rank) for rank in ranks]
    code = runner.wait()
    for thread in (*ups, output.thread):
        thread.join(1.0)
    left = any(up.is_alive() for up in ups)
    raise Ended(
        code if code > 0 else int(left or code < 0), "DeepSpeed's runner has ended before the ranks" if left else ""
    )


class _Output:
    """Copies the runner's output to this process's own, which is the worker's log."""

    def __init__(self, runner: subprocess.Popen[bytes]) -> None:
        self._runner, self._failed = runner, list[tuple[int, str]]()
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def _copy(self) -> None:
        assert self._runner.stdout is not None
        for line in self._runner.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            if found := _HOST_ENDED.match(line):
                self._failed.append((int(found[2]), f"the launcher on host {found[1].decode()} has ended"))

    def failure(self) -> tuple[int, str] | None:
        """An exit code other than 0, and what has ended: a host's launcher, or the runner; None where neither has."""
        if not self._failed and (code := self._runner.poll()) is not None:
            self.thread.join(1.0)
            return max(code, 1), "DeepSpeed's runner has ended"
        return self._failed[0] if self._failed else None


@contextmanager
def _written(order: Order) -> Iterator[Path]:
    """The order as a file that this user alone can read, beside the worker's log: there the hosts see it."""
    path = Path(order.log).parent / temporary_name("hosts")
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(order))
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _gather(
    listener: socket.socket, secret: str, world: int, failure: Callable[[], tuple[int, str] | None]
) -> list[_Rank]:
    """All ranks, in order. Ended where there is a failure before they are there."""
    found: dict[int, _Rank] = {}
    listener.settimeout(0.5)

    def greet(connection: socket.socket) -> None:
        with suppress(Stranger, OSError, msgspec.MsgspecError):
            hello = _hello(connection, secret)
            if hello.world == world and 0 <= hello.rank < world:
                found.setdefault(hello.rank, _Rank(hello, connection))
                return
        connection.close()

    while len(found) < world:
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            threading.Thread(target=greet, args=(connection,), daemon=True).start()
        if len(found) < world and (failed := failure()) is not None:
            raise Ended(failed[0], f"{failed[1]}, and {len(found)} of {world} ranks were there")
    return [found[rank] for rank in range(world)]


def _hello(connection: socket.socket, secret: str) -> Hello:
    """Who has connected; Stranger where it does not know the secret."""
    challenge = new_secret()
    connection.settimeout(GREETING_TIMEOUT)
    send(connection, challenge)
    hello = msgspec.json.decode(read_line(connection, GREETING_TIMEOUT), type=Hello)
    if not proves(hello.proof, secret, "rank", challenge):
        raise Stranger
    watch(connection, SILENCE_HERE)
    return hello


def _meeting(launch: RelayLaunch, cluster: HostfileCluster, ranks: list[_Rank], hosts: int) -> list[dict[str, str]]:
    """Per rank the variables by which the ranks find each other: at a store that rank 0 opens on its host."""
    from tasks.trainer.launch import meeting_environment

    first = ranks[0].hello
    meeting = f"{'127.0.0.1' if hosts == 1 else first.address}:{first.port}"
    return [
        meeting_environment(
            launch.device,
            meeting,
            loopback() if hosts == 1 else cluster.interface or rank.hello.interface,
            nodes=hosts,
        )
        for rank in ranks
    ]


def _serve(rank: _Rank) -> threading.Thread:
    """Passes bytes between a rank and the supervisor; the thread ends when the rank has.

    A rank that ends closes its socket to the supervisor, which then ends the worker, as with ranks on one machine."""
    supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    supervisor.connect(os.environ[SOCKET])
    up = threading.Thread(target=pass_on, args=(rank.connection, supervisor), daemon=True)
    down = threading.Thread(target=pass_on, args=(supervisor, rank.connection), daemon=True)
    up.start()
    down.start()
    return up


if __name__ == "__main__":
    main()
