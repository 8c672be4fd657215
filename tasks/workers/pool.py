"""The supervisor's side of workers: heavy work runs in subprocesses that serve a stream of jobs (`tasks/workers/process.py`).

GPU memory is free when a worker ends, and a crash is only that stage's."""

from __future__ import annotations

import functools
import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import storage.errors
from storage.disk.files import remove_leftovers
from tasks.plugins import loaded_digests
from tasks.workers.metrics import JobsProgress, Progress, silent
from tasks.workers.process import Worker, WorkerDied, WorkerFailed, temporary_folders
from tasks.workers.runtime import RuntimeConfig

__all__ = ["Worker", "WorkerDied", "WorkerFailed", "WorkerPool"]

CHECKOUT = Path(__file__).resolve().parent.parent.parent


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
        for folder in temporary_folders():
            remove_leftovers(folder, places=("",))

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
        on_progress: JobsProgress | None = None,
        settings_extra: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Do the jobs over the role's workers and return their results in the order of the jobs.

        A worker that dies or hangs is started again and its job retried, `runtime.retries` times; the job's handler
        finds what the dead one had finished. The first error ends the rest: jobs under way are stopped, what they
        committed stays."""
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
                    report = functools.partial(on_progress, index) if on_progress else silent
                    results[index] = self._attempt(role, number, jobs[index], report, settings_extra or {})
            except queue.Empty:
                pass
            except WorkerDied as error:
                error.job = index
                errors.append(error)
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
        self, role: str, number: int, job: dict[str, Any], report: Progress, extra: dict[str, Any]
    ) -> dict[str, Any]:
        tries, log = self.runtime.retries + 1, self._log(role, number)
        for attempt in range(1, tries + 1):
            try:
                worker = self._worker(role, number, extra)
                return worker.run(job, report, self.runtime.stage_timeout, log, self.runtime.stall_timeout)
            except WorkerDied as error:
                if attempt == tries:
                    often = f", the last of {tries} tries" if tries > 1 else ""
                    raise WorkerDied(error.what + often, error.tail) from None
                with suppress(OSError), log.open("a") as file:  # a full disk is the job's to notice
                    file.write(f"--- {error.what}; try {attempt + 1} of {tries}\n")
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
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # whoever interrupts wants no more politeness
            for worker in workers:
                worker.kill()
            raise

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
            "plugin_sources": loaded_digests(self.plugins),
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
            # a worker's temporary files go with it; this cache, which lies among them by default, stays
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", _inductor_cache()),
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
        return [sys.executable, "-m", "tasks.workers.main", role], env, 1

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


def _inductor_cache() -> str:
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
