"""A plugin: the trainer, with failpoints armed per job (`runtime.failpoints`), so that a warm one can be stopped anywhere."""

from __future__ import annotations

from typing import Any

from storage.disk import failpoints
from tasks.trainer.trainer import Trainer
from tasks.workers.jobs import register_role
from tasks.workers.metrics import Progress


class Stoppable(Trainer):
    def handle(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        failpoints.arm({failpoints.SPEC: job["runtime"].get("failpoints", "")})
        return super().handle(job, progress)


register_role("trainer", f"{__name__}:{Stoppable.__name__}")
