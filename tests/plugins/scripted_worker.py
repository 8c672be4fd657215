"""A plugin that takes the scorer's and the trainer's place and does what a job says: real worker code, faults on demand."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from scripted_jobs import ScriptedAnswer, ScriptedDone, ScriptedJob

from opdflow.plugin import register_role
from storage.errors import InputError
from tasks.workers import jobs

for role in ("scorer", "trainer"):
    register_role(role, f"{__name__}:Scripted")


class Scripted:
    def __init__(self, settings: dict) -> None:
        self.settings = settings
        self.served = 0
        self.rests = 0

    def handle(self, job: ScriptedJob, link) -> ScriptedAnswer:
        self.served += 1
        match job.do:
            case "echo":
                link.progress(1, 1)
                return ScriptedAnswer(job.value, self.served, os.getpid())
            case "rests":
                return ScriptedAnswer(self.rests, self.served, os.getpid())
            case "train":
                for step, metrics in enumerate(job.metrics, 1):
                    link.progress(step, len(job.metrics), metrics)
                    time.sleep(job.pause)
                return ScriptedAnswer()
            case "shards":
                return self.shards(job, link)
            case "burn":
                return self.burn(job, link)
            case "die_once":
                marker = Path(job.path)
                if not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return ScriptedAnswer(2)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "late":  # as if an earlier job answered now
                late = link._job - 1
                link._channel.send(jobs.Progress(late, 99, 99))
                link._channel.send(jobs.Done(late, jobs.raw(ScriptedDone(99, 0))))
                link._channel.send(jobs.Result(late, 0, jobs.raw(ScriptedAnswer(99))))
                return ScriptedAnswer(job.value)
            case "unsendable":
                return object()
            case "refuse":
                raise InputError("prompts.jsonl:3: no field `prompt`")
            case "crash":
                raise ZeroDivisionError("a bug")
            case "socket":
                path = Path(tempfile.gettempdir(), str(uuid.uuid4()))  # as vLLM names those of its own processes
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(path))
                return ScriptedAnswer(folder=str(path.parent))
            case "grandchild":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                Path(job.path).write_text(f"{os.getpid()} {child.pid}")
                time.sleep(600)
        raise ValueError(job.do)

    def burn(self, job: ScriptedJob, link) -> ScriptedAnswer:
        """Items of `pause` seconds of CPU each (benchmarks/cluster.py)."""
        count = 0
        while (item := link.next()) is not None:
            end = time.thread_time() + job.pause
            while time.thread_time() < end:
                pass
            count += 1
            link.done(ScriptedDone(item.shard, os.getpid()))
        return ScriptedAnswer(count, self.served, os.getpid())

    def shards(self, job: ScriptedJob, link) -> ScriptedAnswer:
        """Takes two items at a time. A file `<path>/die-N` kills it once when it has taken the item N, `kill-N` each time, and
        `die-written-N` when it has written the item (`there-N`) and not reported it."""
        count, held = 0, []
        while True:
            while len(held) < 2 and (item := link.next()) is not None:
                held.append(item)
                once, always = Path(job.path, f"die-{item.shard}"), Path(job.path, f"kill-{item.shard}")
                if once.exists() or always.exists():
                    once.unlink(missing_ok=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            if not held:
                return ScriptedAnswer(count, self.served, os.getpid())
            item = held.pop(0)
            time.sleep(job.pause)
            count += 1
            Path(job.path, f"there-{item.shard}").touch()
            if Path(job.path, f"die-written-{item.shard}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            link.progress(count, 0)
            link.done(ScriptedDone(item.shard, os.getpid()))

    def rest(self) -> None:
        self.rests += 1
        if self.rests == 2:
            raise ZeroDivisionError("a bug")

    def close(self) -> None: ...
