"""The pool of workers of a run. Heavy work runs in subprocesses that serve a stream of jobs (`tasks/workers/process.py`): GPU
memory is free when a worker ends, and a crash ends one worker, not the run."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any, Protocol, cast

import storage.errors
from storage.disk.files import remove_leftovers
from tasks.plugins import loaded_digests
from tasks.workers import jobs
from tasks.workers.cluster import HostfileCluster, RayCluster, bridge_command
from tasks.workers.devices import Role
from tasks.workers.guarded import CHECKOUT, machine_environment, temporary_folders
from tasks.workers.hostfile import relay_command
from tasks.workers.metrics import Metrics, Progress, silent
from tasks.workers.process import Items, Worker, WorkerDied, WorkerFailed
from tasks.workers.runtime import RuntimeConfig

__all__ = ["CHECKOUT", "Worker", "WorkerDied", "WorkerFailed", "WorkerPool"]

_SHOWN = 8
LOADS = {
    "sampler": "vLLM and the student",
    "scorer": "student and teacher",
    "trainer": "DeepSpeed and the student",
    "harness": "lm-eval and the student",
}
"""What a role's first job loads, in words."""


class Item(Protocol):
    """One shard of a job that several workers share."""

    @property
    def shard(self) -> int: ...
    @property
    def size(self) -> int:
        """Samples of the shard."""


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
        self.say: Callable[[str], None] = lambda text: None
        """Gets a line when a worker starts, and when it is ready; from any thread."""
        self._workers: dict[tuple[str, int, str], Worker] = {}
        self._lock = threading.Lock()
        self._ends = 0
        """How often all workers were ended: one that was being started meanwhile is too late."""
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
        """Use these workers for one of several runs; its jobs are logged in its folder `logs`.

        They stay warm afterwards. After an error all end, because a job may still be running. ConfigError when the run
        needs workers with other settings."""
        if (runtime, plugins) != (self.runtime, self.plugins):
            raise storage.errors.ConfigError("runtime, plugins: runs that share their workers must not differ in these")
        self.logs = logs
        try:
            yield self
        except BaseException:
            self.kill()
            raise

    def run(self, role: str, job: jobs.Schema, on_progress: Progress = silent) -> Any:
        """Do one job on one worker and return its result.

        A worker that dies or hangs is started again and the job tried again, `runtime.retries` times."""
        tries = self.runtime.retries + 1
        for attempt in range(1, tries + 1):
            try:
                return self._do(role, 0, job, on_progress, None)
            except WorkerDied as error:
                self._again(role, 0, error, attempt, tries)
        raise AssertionError("unreachable")

    def share(
        self,
        role: str,
        job: jobs.Schema,
        items: Sequence[Item],
        on_progress: Callable[[int], None] = lambda done: None,
        written: Callable[[int], bool] = lambda shard: False,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> tuple[list[Any], list[Any]]:
        """Let the role's workers do one job over a queue of items: each takes the next item as soon as it has room.
        `on_progress` is called with the samples that are finished, `on_note` with what a worker has to say at once.

        Returns the results of the items that have one, in their order, and the results of the workers. When a worker dies
        or hangs, its unfinished items go back to the front of the queue and it is started again; an item that was
        unfinished at more than `runtime.retries` deaths ends the stage (WorkerDied). The first error ends the rest: what
        they wrote stays. `written` says whether a shard is there: a worker can die between writing and reporting one, and a
        second one need not have the same bits. A death that leaves no item unfinished ends nothing."""
        shared = _Shared(items, on_progress, self.runtime.retries + 1, written, on_note=on_note)
        count = min(self._count(role), len(items))
        self._on_workers(count, lambda number: self._drain(role, number, job, shared), shared.errors)
        return [result for _, result in sorted(shared.results.items())], shared.answers

    def each(
        self,
        role: str,
        work: Sequence[tuple[jobs.Schema, Sequence[Item]]],
        on_progress: Callable[[int, int], None] = lambda number, done: None,
        written: Callable[[int, int], bool] = lambda number, shard: False,
    ) -> list[Any]:
        """Let the role's workers do several jobs. One worker does a job with all of its items, and all of them again after a
        death; different jobs go to different workers. `on_progress` is called with a job's number and its finished samples.

        Returns the results of the jobs. `written` says whether what a job (its number) has to write of a shard is there:
        a worker that dies when everything is there has lost nothing."""
        lock, errors = threading.Lock(), list[BaseException]()
        shared = [
            _Shared(
                items,
                functools.partial(on_progress, number),
                self.runtime.retries + 1,
                functools.partial(written, number),
                together=True,
                lock=lock,
                errors=errors,
            )
            for number, (_, items) in enumerate(work)
        ]
        waiting = deque(range(len(work)))

        def drain(worker: int) -> None:
            while not errors:
                with lock:
                    if not waiting:
                        return
                    number = waiting.popleft()
                self._drain(role, worker, work[number][0], shared[number])

        self._on_workers(min(self._count(role), len(work)), drain, errors)
        return [answer for part in shared for answer in part.answers]

    def _on_workers(self, count: int, drain: Callable[[int], None], errors: list[BaseException]) -> None:
        """Calls `drain` for each of `count` workers, at the same time. Raises the first of the errors that it collects; an
        interruption comes before all, because it may have ended workers too."""
        if count == 1:
            drain(0)
        elif count > 1:
            # each in the caller's context, which Prefect's loggers and artifacts look up
            threads = [
                threading.Thread(target=copy_context().run, args=(drain, number), daemon=True)
                for number in range(count)
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)
            except BaseException as error:
                errors.insert(0, error)
                self.kill()
        if errors:
            raise errors[0]

    def _drain(self, role: str, number: int, job: jobs.Schema, shared: _Shared) -> None:
        attempt = 0
        try:
            while not shared.errors:
                part = shared.part()
                try:
                    answer = self._do(role, number, job, part.progress, Items(part.take, part.done))
                    shared.answers.append(answer)
                    return
                except WorkerDied as error:
                    attempt = 0 if part.finished else attempt
                    attempt += 1
                    lost = part.give_back()
                    if not lost and not shared.queue:
                        self._note(role, number, f"{error.what}; all of its shards are written, nothing is lost")
                        return
                    tries = max([attempt, *(shared.deaths[index] for index in lost)])
                    self._again(role, number, shared.naming(error, lost), tries, shared.tries)
        except BaseException as error:
            shared.errors.append(error)

    def _do(self, role: str, number: int, job: jobs.Schema, report: Progress, items: Items | None) -> Any:
        began = time.monotonic()
        with self._lock:
            known = set(self._workers.values())
        if role == "trainer":  # the others' student is replaced by what it makes
            for other in known:
                if other.role != role:
                    other.rest()
        worker, runtime = self._worker(role, number), self.runtime
        log = self._log(role, number)
        if worker not in known and number == 0:
            report, items = self._until_ready(role, began, report, items)
        return worker.run(job, report, runtime.stage_timeout, log, runtime.stall_timeout, items)

    def _until_ready(
        self, role: str, began: float, report: Progress, items: Items | None
    ) -> tuple[Progress, Items | None]:
        """The same callbacks; at the first sign of work they tell how long the worker took to load."""
        waiting = [True]

        def ready() -> None:
            if waiting and waiting.pop():
                self.say(f"{role} ready after {time.monotonic() - began:.1f} s")

        def heard(done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
            ready()
            told: dict[str, Any] = {"metrics": metrics, "note": note}
            report(done, total, **{name: value for name, value in told.items() if value is not None})

        def take() -> Any:
            ready()
            return items.take() if items is not None else None

        return heard, None if items is None else Items(take, items.done)

    def _again(self, role: str, number: int, error: WorkerDied, attempt: int, tries: int) -> None:
        """Logs that a worker is started again; raises the error when no try is left."""
        if attempt >= tries:
            often = f", the last of {tries} tries" if tries > 1 else ""
            raise WorkerDied(error.what + often, error.tail) from None
        self._note(role, number, f"{error.what}; try {attempt + 1} of {tries}")

    def _note(self, role: str, number: int, text: str) -> None:
        with suppress(OSError), self._log(role, number).open("a") as file:  # the job itself reports a full disk
            file.write(f"--- {text}\n")

    def stage_done(self) -> None:
        """Call at the end of a stage: ends all workers unless they are kept warm."""
        if not self.runtime.keep_warm:
            self.close()

    def close(self) -> None:
        """End all workers; they are asked to stop first."""
        self._end(Worker.close)

    def kill(self) -> None:
        """End all workers at once."""
        self._end(Worker.kill)

    def _end(self, how: Callable[[Worker], None]) -> None:
        with self._lock:
            workers, self._workers = list(self._workers.values()), {}
            self._ends += 1
        threads = [threading.Thread(target=how, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # interrupted: do not wait for them any longer
            for worker in workers:
                worker.kill()
            raise

    def _log(self, role: str, number: int) -> Path:
        return self.logs / f"{role if number == 0 else f'{role}-{number}'}.log"

    def _count(self, role: str) -> int:
        return int(getattr(getattr(self.runtime, role, None), "workers", 1))

    def _worker(self, role: str, number: int) -> Worker:
        settings = self._settings(role) | {"number": number}
        key = (role, number, json.dumps(settings, sort_keys=True))
        with self._lock:
            for other in [k for k in self._workers if k[:2] == key[:2] and (k != key or not self._workers[k].alive)]:
                self._workers.pop(other).close()
            worker, ends = self._workers.get(key), self._ends
        if worker is None:
            if number == 0:
                self.say(f"starting {role}{f': loads {LOADS[role]}' if role in LOADS else ''}")
            argv, env, world = self._command(role, number, settings)
            worker = Worker(role, argv, env, self._log(role, number), world)
            with self._lock:
                late = self._ends != ends
                if not late:
                    self._workers[key] = worker
            if late:
                worker.kill()
                raise WorkerDied(f"{role} worker stopped: all workers were ended while it started")
        return worker

    def _settings(self, role: str) -> dict[str, Any]:
        own = getattr(self.runtime, role, None)
        settings: dict[str, Any] = own.model_dump(mode="json") if own is not None else {}
        if role == "harness":
            settings["devices_per_worker"] = self.runtime.scorer.devices_per_worker
        return settings | {
            "device": self.runtime.device,
            "threads": self.runtime.threads,
            "plugins": list(self.plugins),
            "plugin_sources": loaded_digests(self.plugins),
            "plugin_path": self.plugin_path,
            "modules": [str(folder) for folder in self.runtime.modules],
        }

    def _command(self, role: str, number: int, settings: dict[str, Any]) -> tuple[list[str], dict[str, str], int]:
        env = {
            "PYTHONSAFEPATH": "1",  # a folder from which `opd` is called brings no modules along (-m would put it first)
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(self.runtime.threads),
            # threads that spin at barriers starve each other as soon as anything else runs (docs/log.md: 4 to 7 times)
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            # but one that sleeps at once is often woken on the core of the thread that wakes it, and then both share that core:
            # a short wait before it sleeps makes steps of small models 1.8 times as fast (docs/performance.md, Threads)
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # workers read local folders; nothing is downloaded unasked
            "USE_HUB_KERNELS": "NO",  # a config may name kernels of the Hub: compiled code that nobody has checked
            "DO_NOT_TRACK": "1",
            "OPD_WORKER_SETTINGS": json.dumps(settings),
        }
        argv = [sys.executable, "-m", "tasks.workers.main", role]
        here = machine_environment(self.plugin_path)
        cluster, group = self.runtime.cluster, self.runtime.group(cast(Role, role))
        given = (group, self.runtime.device, self._log(role, number).absolute(), argv[1:], env, self.plugin_path)
        between = None
        if isinstance(cluster, RayCluster):
            between = bridge_command(cluster, *given)
        elif isinstance(cluster, HostfileCluster) and role == "trainer":
            between = relay_command(cluster, *given)
        if between is not None:
            argv, more = between
            # neither needs a module of the user's, and must not import one in place of Ray's or DeepSpeed's
            return argv, here | {"PYTHONSAFEPATH": "1"} | more, group.world
        gpus = self.runtime.gpus(cast(Role, role))
        mine = [gpu for rank in gpus for gpu in rank] if role == "trainer" else gpus[number]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        if role == "trainer":
            from tasks.trainer.launch import launch_command
            from tasks.workers.actor import free_port

            argv, more = launch_command(len(gpus), self.runtime.device, free_port(), mine)
            return argv, here | env | more, len(gpus)
        return argv, here | env, 1


class _Shared:
    """A queue of items that several workers take from, and the result of each."""

    def __init__(
        self,
        items: Sequence[Item],
        on_progress: Callable[[int], None],
        tries: int,
        written: Callable[[int], bool],
        together: bool = False,
        lock: threading.Lock | None = None,
        errors: list[BaseException] | None = None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.note = on_note
        self.items, self.tries, self.together, self.written = items, tries, together, written
        self.queue = deque(range(len(items)))
        self.deaths = [0] * len(items)
        """By item: how many workers died while it was unfinished."""
        self.results: dict[int, Any] = {}
        self.answers: list[Any] = []
        self.errors: list[BaseException] = [] if errors is None else errors
        self.lock = lock or threading.Lock()
        self._on_progress = on_progress
        self._parts: list[_Part] = []
        self._index = {item.shard: index for index, item in enumerate(items)}

    def part(self) -> _Part:
        with self.lock:
            self._parts.append(_Part(self))
            return self._parts[-1]

    def index(self, shard: int) -> int:
        return self._index[shard]

    def report(self) -> None:
        self._on_progress(sum(part.samples for part in self._parts))

    def naming(self, error: WorkerDied, lost: Sequence[int]) -> WorkerDied:
        """The error, with the shards that are not finished; where the worker had none, with those that nobody has begun."""
        done = "not finished"
        if not lost:
            lost, done = list(self.queue), "not begun"
        shards = sorted(self.items[index].shard for index in lost)
        more = f" and {len(shards) - _SHOWN} more" if len(shards) > _SHOWN else ""
        samples = sum(self.items[index].size for index in lost)
        what = f"shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards[:_SHOWN]))}{more}"
        return WorkerDied(f"{error.what}; {what} ({samples} samples) {done}, finished shards are kept", error.tail)


class _Part:
    """One worker's share of a queue, from its start to its end or death."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._open: list[int] = []
        self._written = 0
        self.samples = 0
        """Finished samples, including those of unfinished shards."""
        self.finished = False
        """Whether it has finished an item."""

    def take(self) -> Item | None:
        with self._shared.lock:
            if self._shared.errors or not self._shared.queue:
                return None
            self._open.append(self._shared.queue.popleft())
            return self._shared.items[self._open[-1]]

    def done(self, result: Any) -> None:
        with self._shared.lock:
            index = self._shared.index(result.shard)
            if not self._shared.together:
                self._open.remove(index)
            self._shared.results[index] = result
            self._written += self._shared.items[index].size
            self.samples = max(self.samples, self._written)
            self.finished = True
            self._shared.report()

    def progress(self, done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
        with self._shared.lock:
            self.samples = max(done, self._written)
            self._shared.report()
            if note is not None:
                self._shared.note(note)

    def give_back(self) -> list[int]:
        """Call when the worker is gone: puts its unfinished items back at the front of the queue."""
        items = range(len(self._shared.items)) if self._shared.together else list(self._open)
        there = {index for index in items if self._shared.written(self._shared.items[index].shard)}
        if self._shared.together and len(there) < len(items):
            there = set()  # the items of a repeated batch are all needed again
        with self._shared.lock:
            lost, self._open = [index for index in self._open if index not in there], []
            if self._shared.together:
                self.samples = 0
                if there:
                    self._shared.queue.clear()
            else:
                self._written += sum(self._shared.items[index].size for index in there)
                self.samples = self._written
            for index in reversed(lost):
                self._shared.deaths[index] += 1
                self._shared.queue.appendleft(index)
            return lost
