"""The scripted engines inside the run's own process, so that a schedule's tick takes seconds. Before a rollout it does what a
file in the store's root asks for, once: `fail` raises, `slow` waits for the seconds that it holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from in_process import InProcess

from tasks.workers.pool import WorkerPool

engines = InProcess()


def share(self: WorkerPool, role: str, job: Any, *arguments: Any, **more: Any) -> tuple[list[Any], list[Any]]:
    root = Path(job.store)
    if role == "sampler" and not job.intermediate:
        if (root / "fail").exists():
            (root / "fail").unlink()
            raise ValueError("the sampler fails once")
        if (root / "slow").exists():
            seconds = float((root / "slow").read_text())
            (root / "slow").rename(root / "is-slow")
            time.sleep(seconds)
    return engines.share(role, job, *arguments, **more)


WorkerPool.share = share  # type: ignore[method-assign]
WorkerPool.each = lambda self, *arguments: engines.each(*arguments)  # type: ignore[method-assign]
WorkerPool.run = lambda self, *arguments: engines.run(*arguments)  # type: ignore[method-assign]
