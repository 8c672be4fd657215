"""A plugin: the real sampler with its real vLLM engine, and a fault once. `<store>/fault` is JSON {kind, shard, at}: what happens
when that many samples of the shard are finished. Kinds: kill (SIGKILL), hang, raise_, abort."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

from opdflow.plugin import register_role
from tasks.engines.sampler import Sampler

register_role("sampler", f"{__name__}:Faulty")


class Faulty(Sampler):
    def handle(self, job, link):
        self.fault = Path(job.store) / "fault"
        return super().handle(job, link)

    def _step(self, waiting):
        answers = super()._step(waiting)
        ended = Counter()  # by shard: most samples of a shard end in one step, and are its completions only after it
        for shard, _, output in answers:
            ended[shard.item.shard] += 1
            if self.is_due(shard, ended[shard.item.shard]):
                kind = json.loads(self.fault.read_text())["kind"]
                self.fault.with_name("fault-met").touch()
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "hang":
                    time.sleep(600)
                if kind == "raise_":
                    raise RuntimeError("the engine core is dead")
                output.finish_reason = "abort"
        return answers

    def is_due(self, shard, ended: int) -> bool:
        if not self.fault.exists() or self.fault.with_name("fault-met").exists():
            return False
        wanted = json.loads(self.fault.read_text())
        return wanted["shard"] == shard.item.shard and len(shard.completions) + ended > wanted["at"]
