"""A plugin: the real sampler with its real vLLM engine, and a fault once. `<store>/fault` is JSON {kind, shard, at}: what happens
when that many samples of the shard are finished. Kinds: kill (SIGKILL), hang, raise_, abort."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tasks.engines.sampler import Sampler
from tasks.workers.jobs import register_role

register_role("sampler", f"{__name__}:Faulty")


class Faulty(Sampler):
    def handle(self, job, progress):
        self.job = job
        return super().handle(job, progress)

    def _ask(self, batch, sampling, stop_ids, progress):
        self.batch = batch
        return super()._ask(batch, sampling, stop_ids, progress)

    def _steps(self, prompts, params):
        for finished in super()._steps(prompts, params):
            if finished and self.is_due(len(finished)):
                kind = self.fault["kind"]
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "hang":
                    time.sleep(600)
                if kind == "raise_":
                    raise RuntimeError("the engine core is dead")
                finished[0][1].finish_reason = "abort"
            yield finished

    def is_due(self, finished: int) -> bool:
        path = Path(self.job["store"]) / "fault"
        if not path.exists() or not hasattr(self, "batch"):
            return False
        self.fault = json.loads(path.read_text())
        met = path.with_name("fault-met")
        due = self.fault["shard"] == self.job["shard"] and self.batch.done + finished > self.fault["at"]
        if not due or met.exists():
            return False
        met.touch()
        return True
