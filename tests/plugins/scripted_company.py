"""A plugin: the scripted sampler, whose log-probabilities depend on how many requests the engine has got in its batch, as last
bits can in a real engine. `die-before-report`, beside the store, is the number of a shard: its worker kills itself once, when
the shard is written and not yet reported."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import scripted_sampler

from opdflow.plugin import register_role

register_role("sampler", f"{__name__}:Company")


class Company(scripted_sampler.Scripted):
    def handle(self, job, link):
        return super().handle(job, Reporting(link, job.store))

    def _prepare(self, job):
        fresh = self.engine.llm is None
        super()._prepare(job)
        if fresh:
            self.engine.llm.__class__ = Engine


class Engine(scripted_sampler.Engine):
    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        self.before = self.count

    def step(self) -> list[SimpleNamespace]:
        together = self.count - self.before
        answers = super().step()
        for answer in answers:
            flat = answer.outputs[0].logprobs
            flat.logprobs = [value - together * 2**-20 for value in flat.logprobs]
        return answers


class Reporting:
    def __init__(self, link, store) -> None:
        self._link, self._store = link, store

    def __getattr__(self, name):
        return getattr(self._link, name)

    def done(self, result) -> None:
        path = Path(self._store, "die-before-report")
        if path.exists() and path.read_text() == str(result.shard):
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        self._link.done(result)
