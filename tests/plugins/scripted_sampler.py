"""A plugin that takes the engine's place: completions made of the sample's seed. The sampler's other half, which writes
the shards, is the real one. Faults on demand through files beside the store."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from tasks.engines.sampler import Completion, Sampler
from tasks.plugins import register_role

register_role("sampler", f"{__name__}:Scripted")


class Scripted(Sampler):
    def _complete(self, job, prompts, seeds, progress):
        deadly = Path(job["store"]) / "die-before-shard"
        if deadly.exists() and int(deadly.read_text()) == job["shard"]:
            os.kill(os.getpid(), signal.SIGKILL)
        with (Path(job["store"]) / "shards-done").open("a") as log:
            log.write(f"{job['shard']}\n")
        self.proof = {"weights": job["weights"]}
        completions = []
        for done, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True), 1):
            draw = random.Random(f"{seed}{prompt}")
            length = draw.randint(1, job["sampling"]["max_completion_length"])
            reason = "length" if length == job["sampling"]["max_completion_length"] else "stop"
            ids = [draw.randrange(256) for _ in range(length)]
            completions.append(Completion(ids, f"text {seed}", reason, [-draw.random() for _ in ids]))
            progress(done, len(prompts))
        return completions, [7]
