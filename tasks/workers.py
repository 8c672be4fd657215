"""The supervisor's side of workers: heavy work runs in subprocesses that serve a stream of jobs.

A worker runs in its own session, so that stopping it stops everything it started; it holds a socket whose closing tells it
that its supervisor died; its output goes to a log file. GPU memory is free when it ends, and a crash is only that
stage's."""

from __future__ import annotations

import json
import os
import queue
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import storage.errors
from storage.errors import OpdError
from tasks.runtime import RuntimeConfig

START_TIMEOUT = 600.0
"""Seconds until a worker must be ready: importing an engine on a cold, busy machine takes a minute or more."""
STOP_TIMEOUT = 10.0
"""Seconds a worker gets to end by itself before its process group is killed."""
CHECKOUT = Path(__file__).resolve().parent.parent

Progress = Callable[[int, int, int], None]
"""Called with (job index, done, total)."""


class WorkerFailed(OpdError):
    """A worker raised something unexpected; the message carries the cause and the log's place."""


class WorkerDied(WorkerFailed):
    """A worker ended, or was killed, without an answer. Trying again can help."""


class Worker:
    """One worker subprocess (or one launcher with `world` ranks) and the jobs it is asked to do."""

    def __init__(self, role: str, argv: list[str], env: dict[str, str], log: Path, world: int = 1) -> None:
        self.role, self.log, self.world = role, log, world
        self._folder = tempfile.mkdtemp(prefix="opd-")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = os.path.join(self._folder, "s")
        self._listener.bind(path)
        self._listener.listen(world)
        self._listener.settimeout(0.5)
        self._ranks: dict[int, socket.socket] = {}
        self._buffers: dict[int, bytes] = {}
        self._jobs = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            out.write(f"--- {role}: {' '.join(argv)}\n".encode())
            out.flush()
            self.process = subprocess.Popen(
                argv,
                env=env | {"OPD_WORKER_SOCKET": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._handshake()
        except BaseException:
            self.kill()
            raise

    def _handshake(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        waiting: list[socket.socket] = []
        while len(waiting) < self.world:
            try:
                connection, _ = self._listener.accept()
                waiting.append(connection)
            except TimeoutError:
                if self.process.poll() is not None:
                    raise self._died("before it was ready") from None
                if time.monotonic() > deadline:
                    raise self._died(f"not ready after {START_TIMEOUT:.0f} s") from None
        for slot, connection in enumerate(waiting):
            self._ranks[slot] = connection
            self._buffers[slot] = b""
        ready = 0
        while ready < self.world:
            for _, message in self._receive(deadline):
                if message["kind"] == "failed":
                    raise self._error(message)
                ready += message["kind"] == "ready"

    def run(
        self,
        job: dict[str, Any],
        progress: Callable[[int, int], None],
        timeout: float | None = None,
        log: Path | None = None,
    ) -> dict[str, Any]:
        """Do one job and return rank 0's result. From now on the worker writes to `log`, if one is given.

        Raises the OpdError that the worker raised, WorkerFailed for anything else it raised, WorkerDied when it ended
        without an answer or did not answer within `timeout` seconds; after the last two the worker is gone."""
        self._jobs += 1
        self.log = log or self.log
        line = json.dumps({"kind": "job", "id": self._jobs, "job": job, "log": str(self.log)}).encode() + b"\n"
        deadline = time.monotonic() + timeout if timeout else None
        result: dict[str, Any] = {}
        done = 0
        try:
            for connection in self._ranks.values():
                connection.sendall(line)
            while done < self.world:
                for _, message in self._receive(deadline):
                    if message["kind"] == "progress":
                        progress(message["done"], message["total"])
                    elif message["kind"] == "error":
                        raise self._error(message)
                    elif message["kind"] == "result":
                        done += 1
                        if message["rank"] == 0:
                            result = message["result"]
        except (BrokenPipeError, ConnectionResetError):
            error = self._died("while a job was sent to it")
            self.kill()
            raise error from None
        except BaseException as error:
            # one rank of several may wait for the failed one for ever; an interrupted job leaves no answer to read
            if self.world > 1 or not isinstance(error, OpdError) or isinstance(error, WorkerFailed):
                self.kill()
            raise
        return result

    def _receive(self, deadline: float | None) -> list[tuple[int, dict[str, Any]]]:
        """Messages that have come, waiting at most half a second."""
        messages: list[tuple[int, dict[str, Any]]] = []
        with selectors.DefaultSelector() as selector:
            for slot, connection in self._ranks.items():
                selector.register(connection, selectors.EVENT_READ, slot)
            for key, _ in selector.select(0.5):
                slot = key.data
                data = self._ranks[slot].recv(1 << 20)
                if not data:
                    raise self._died("without an answer")
                *lines, self._buffers[slot] = (self._buffers[slot] + data).split(b"\n")
                messages += [(slot, json.loads(line)) for line in lines]
        if deadline is not None and time.monotonic() > deadline and not messages:
            raise self._died("stopped: it did not answer within its time limit")
        return messages

    def _died(self, when: str) -> WorkerDied:
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            code = None
        how = "" if code is None else f" (exit {code})" if code >= 0 else f" (killed by signal {-code})"
        return WorkerDied(f"{self.role} worker ended {when}{how}\n{self._tail()}")

    def _error(self, message: dict[str, Any]) -> OpdError:
        kind = getattr(storage.errors, message["type"], None)
        if message["ours"] and isinstance(kind, type) and issubclass(kind, OpdError):
            try:
                return kind(message["message"])
            except TypeError:
                return OpdError(message["message"])
        if message["ours"]:
            return OpdError(message["message"])
        last = message["traceback"].strip().splitlines()[-6:]
        return WorkerFailed(
            f"{self.role} worker: {message['type']}: {message['message']}\n" + "\n".join(last) + f"\nlog: {self.log}"
        )

    def _tail(self, lines: int = 12) -> str:
        try:
            with self.log.open(errors="replace") as file:
                tail = [line.rstrip() for line in deque(file, lines)]
        except OSError:
            tail = []
        return f"last lines of {self.log}:\n  " + "\n  ".join(tail)

    def close(self) -> None:
        """Ask the worker to end, then make sure that nothing of its session is left."""
        try:
            for connection in self._ranks.values():
                connection.sendall(b'{"kind": "stop"}\n')
            self.process.wait(STOP_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        """End the worker's whole process group now."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for connection in self._ranks.values():
            connection.close()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class WorkerPool:
    """The workers of a run, or of several runs in turn (`serving`), by role: started on first use, kept warm or ended after
    a stage, all ended at the end."""

    def __init__(
        self,
        runtime: RuntimeConfig,
        logs: Path,
        plugins: tuple[str, ...] = (),
        plugin_path: str | None = None,
    ) -> None:
        self.runtime, self.logs = runtime, logs
        self.plugins, self.plugin_path = plugins, plugin_path
        self._workers: dict[tuple[str, int, str], Worker] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    @contextmanager
    def serving(self, runtime: RuntimeConfig, logs: Path, plugins: tuple[str, ...]) -> Iterator[WorkerPool]:
        """For one of several runs that share these workers: what they do for it is logged in its folder `logs`.

        They stay warm afterwards; after an error all end, since a job may still be under way. ConfigError when the run
        asks for other workers than these."""
        if (runtime, plugins) != (self.runtime, self.plugins):
            raise storage.errors.ConfigError("runtime, plugins: runs that share their workers must not differ in these")
        self.logs = logs
        try:
            yield self
        except BaseException:
            self.kill()
            raise

    def run(
        self,
        role: str,
        jobs: list[dict[str, Any]],
        on_progress: Progress | None = None,
        settings_extra: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Do the jobs over the role's workers and return their results in the order of the jobs.

        A worker that dies is started again and its job retried, `runtime.retries` times. The first error ends the
        rest: jobs under way are stopped, what they committed stays."""
        if not jobs:
            return []
        count = min(self._count(role), len(jobs))
        pending: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            pending.put(index)
        results: list[dict[str, Any]] = [{} for _ in jobs]
        errors: list[BaseException] = []

        def drain(number: int) -> None:
            try:
                while not errors:
                    index = pending.get_nowait()
                    report = (lambda done, total, i=index: on_progress(i, done, total)) if on_progress else _silent
                    results[index] = self._attempt(role, number, jobs[index], report, settings_extra or {})
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)

        if count == 1:
            drain(0)
        else:
            threads = [threading.Thread(target=drain, args=(number,), daemon=True) for number in range(count)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)
            except BaseException as error:
                errors.append(error)
                self.kill()
        if errors:
            raise errors[0]
        return results

    def _attempt(
        self, role: str, number: int, job: dict[str, Any], report: Callable[[int, int], None], extra: dict[str, Any]
    ) -> dict[str, Any]:
        for attempt in range(self.runtime.retries + 1):
            worker = self._worker(role, number, extra)
            try:
                return worker.run(job, report, self.runtime.stage_timeout, self._log(role, number))
            except WorkerDied:
                if attempt == self.runtime.retries:
                    raise
        raise AssertionError("unreachable")

    def stage_done(self) -> None:
        """A stage has ended: workers end too unless they are kept warm."""
        if not self.runtime.keep_warm:
            self.close()

    def close(self) -> None:
        """End all workers, politely first."""
        self._end(Worker.close)

    def kill(self) -> None:
        """End all workers at once."""
        self._end(Worker.kill)

    def _end(self, how: Callable[[Worker], None]) -> None:
        with self._lock:
            workers, self._workers = list(self._workers.values()), {}
        threads = [threading.Thread(target=how, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _log(self, role: str, number: int) -> Path:
        return self.logs / f"{role if number == 0 else f'{role}-{number}'}.log"

    def _count(self, role: str) -> int:
        return {"sampler": self.runtime.sampler.workers, "scorer": self.runtime.scorer.workers}.get(role, 1)

    def _worker(self, role: str, number: int, extra: dict[str, Any]) -> Worker:
        settings = self._settings(role) | extra
        key = (role, number, json.dumps(settings, sort_keys=True))
        with self._lock:
            for other in [k for k in self._workers if k[:2] == key[:2] and (k != key or not self._workers[k].alive)]:
                self._workers.pop(other).close()
            worker = self._workers.get(key)
        if worker is None:
            argv, env, world = self._command(role, number, settings)
            worker = Worker(role, argv, env, self._log(role, number), world)
            with self._lock:
                self._workers[key] = worker
        return worker

    def _settings(self, role: str) -> dict[str, Any]:
        own = getattr(self.runtime, role, None)
        settings: dict[str, Any] = own.model_dump(mode="json") if own is not None else {}
        return settings | {
            "device": self.runtime.device,
            "threads": self.runtime.threads,
            "plugins": list(self.plugins),
            "plugin_path": self.plugin_path,
        }

    def _command(self, role: str, number: int, settings: dict[str, Any]) -> tuple[list[str], dict[str, str], int]:
        path = os.pathsep.join(filter(None, [str(CHECKOUT), self.plugin_path, os.environ.get("PYTHONPATH")]))
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = dict(os.environ) | {
            "PATH": tools,  # ninja lies beside the interpreter; DeepSpeed compiles with it
            "PYTHONPATH": path,
            "PYTHONSAFEPATH": "1",  # a folder from which `opd` is called brings no modules along (-m would put it first)
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(self.runtime.threads),
            # threads that spin at barriers starve each other as soon as anything else runs (docs/log.md: 4 to 7 times)
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # workers get local folders; nothing is fetched behind the user's back
            "USE_HUB_KERNELS": "NO",  # a config may name kernels of the Hub: compiled code that nobody here has seen
            "DO_NOT_TRACK": "1",
            "OPD_WORKER_SETTINGS": json.dumps(settings),
        }
        devices = self._devices(role, number)
        if devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = devices
        if role == "trainer":
            from tasks.trainer.launch import free_port, launch_command

            world = self.runtime.trainer.processes
            argv, more = launch_command(world, self.runtime.device, free_port(), self.runtime.trainer.devices)
            return argv, env | more, world
        return [sys.executable, "-m", "tasks.worker_main", role], env, 1

    def _devices(self, role: str, number: int) -> str | None:
        own = getattr(self.runtime, role)
        if self.runtime.device == "cpu":
            return ""
        if own.devices is None:
            return None if self._count(role) == 1 else str(number)
        if role == "trainer":
            return ",".join(map(str, own.devices))
        width = getattr(own, "tensor_parallel_size", 1)
        mine = own.devices[number * width : (number + 1) * width]
        if len(mine) < width:
            raise storage.errors.ConfigError(
                f"runtime.{role}.devices: {len(own.devices)} GPUs named, but worker {number} of {own.workers} needs"
                f" {width}; name at least {own.workers * width}"
            )
        return ",".join(map(str, mine))


def _silent(done: int, total: int) -> None:
    """No one listens."""
