"""A plugin that takes the engine's place, at vLLM's own interface: completions made of the sample's seed. All of the sampler
but the engine is the real one. Faults on demand through files beside the store:

- `die-before-shard`: the number of a shard; its worker kills itself before the engine gets its requests;
- `fault`: JSON {kind, seed, times}: what happens when the sample of that seed is about to be finished, and how often. Kinds:
  kill (SIGKILL), hang, raise_, abort, empty, infinite (a log-probability), vanish (no output), and the other bad numbers.

It notes the shards that were begun (`shards-done`) and the seeds that were asked for, a line per request (`asked`)."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

from opdflow.plugin import register_role
from tasks.engines import sampler
from tasks.engines.sampler import Disk, Sampler

register_role("sampler", f"{__name__}:Scripted")
DISKS: list[Disk] = []


class NotedDisk(Disk):
    def __init__(self) -> None:
        super().__init__()
        DISKS.append(self)


sampler.Disk = NotedDisk


def die() -> None:
    """SIGKILL, when all finished shards are written: how far the writing thread has got must not decide a trial."""
    for disk in DISKS:
        disk.check()
    os.kill(os.getpid(), signal.SIGKILL)


class Scripted(Sampler):
    def _prepare(self, job):
        engine = self.engine
        engine.proof = {"weights": job.model.weights}
        engine._params = lambda sampling, seed, max_tokens, stop_ids: SimpleNamespace(seed=seed, limit=max_tokens)
        if engine.llm is None:
            engine.llm = Engine(Path(job.store))
            engine.tokenizer = SimpleNamespace(decode=lambda ids, **_: f"text {sum(ids)}", eos_token_id=7)
            engine.vocabulary = 256
        engine.llm.store = Path(job.store)

    def _stop_ids(self, job, sampling):
        self._stopped_by = [7]
        return [7]

    def _begin(self, shard, *how):
        deadly = self.engine.llm.store / "die-before-shard"
        if deadly.exists() and int(deadly.read_text()) == shard.item.shard:
            die()
        self.engine.llm.note("shards-done", str(shard.item.shard))
        return super()._begin(shard, *how)


class Engine:
    """What the sampler uses of `vllm.LLM`, of its engine and of the engine's core. A step finishes one request."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.llm_engine = self.engine_core = self
        self.requests: list[tuple[str, list[int], SimpleNamespace]] = []
        self.count = 0

    def note(self, name: str, line: str) -> None:
        with (self.store / name).open("a") as file:
            file.write(f"{line}\n")

    def enqueue(self, prompts, params, use_tqdm):
        names = []
        for prompt, how in zip(prompts, params, strict=True):
            self.count += 1
            names.append(f"{self.count}-unique")
            self.requests.append((names[-1], prompt["prompt_token_ids"], how))
        self.note("asked", " ".join(str(how.seed) for how in params))
        return names

    def reset_prefix_cache(self) -> None:
        assert not self.requests, "requests of an earlier batch are left in the engine"

    def shutdown(self) -> None:
        self.requests.clear()

    def abort_request(self, names, internal) -> None:
        self.requests = [request for request in self.requests if request[0] not in names]

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[SimpleNamespace]:
        name, prompt, how = self.requests.pop(0)
        draw = random.Random(f"{how.seed}{prompt}")
        length = draw.randint(1, how.limit)
        ids = [draw.randrange(256) for _ in range(length)]
        output = SimpleNamespace(
            token_ids=ids, logprobs=Flat(ids, draw), finish_reason="length" if length == how.limit else "stop"
        )
        if (kind := self.fault(how.seed)) is not None:
            output = getattr(self, kind)(output)
        return [SimpleNamespace(request_id=name, finished=True, outputs=[output])] if output else []

    def fault(self, seed: int) -> str | None:
        path, met = self.store / "fault", self.store / "fault-met"
        fault = json.loads(path.read_text()) if path.exists() else {}
        if fault.get("seed") != seed or (met.exists() and len(met.read_text().split()) >= fault["times"]):
            return None
        self.note("fault-met", fault["kind"])
        return fault["kind"]

    def kill(self, output):
        die()

    def hang(self, output):
        time.sleep(600)

    def raise_(self, output):
        raise RuntimeError("the engine core is dead")

    def abort(self, output):
        output.finish_reason = "abort"
        return output

    def empty(self, output):
        output.token_ids, output.logprobs = [], Flat([], random)
        return output

    def infinite(self, output):
        output.logprobs.logprobs[0] = float("-inf")
        return output

    def plus_infinite(self, output):
        output.logprobs.logprobs[-1] = float("inf")
        return output

    def nan(self, output):
        output.logprobs.logprobs[-1] = float("nan")
        return output

    def negative_id(self, output):
        output.token_ids[-1] = output.logprobs.token_ids[-1] = -1
        return output

    def foreign_id(self, output):
        output.token_ids[0] = output.logprobs.token_ids[0] = 256
        return output

    def short(self, output):
        output.logprobs = Flat(output.token_ids[:-1], random)
        return output

    def vanish(self, output):
        return None


class Flat:
    """vLLM's flat log-probabilities of the sampled tokens."""

    def __init__(self, ids, draw) -> None:
        self.token_ids, self.start_indices = list(ids), list(range(len(ids)))
        self.logprobs = [-draw.random() for _ in ids]

    def __len__(self) -> int:
        return len(self.token_ids)
