"""The scripted engines inside the run's own process, so that a schedule's tick takes seconds. Before a rollout it does what a
file in the store's root asks for, once: `fail` raises, `slow` waits for the seconds that it holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from in_process import InProcess

from tasks.workers.pool import WorkerPool

engines = InProcess()


def run(self: WorkerPool, role: str, jobs: list[dict], *arguments: Any, **more: Any) -> list[dict]:
    if role == "sampler" and "store" in jobs[0]:
        root = Path(jobs[0]["store"])
        if (root / "fail").exists():
            (root / "fail").unlink()
            raise ValueError("the sampler fails once")
        if (root / "slow").exists():
            seconds = float((root / "slow").read_text())
            (root / "slow").rename(root / "is-slow")
            time.sleep(seconds)
    return engines.run(role, jobs, *arguments, **more)


WorkerPool.run = run  # type: ignore[method-assign]
