"""A plugin: the trainer, with failpoints armed per job (`runtime.failpoints`), so that a warm one can be stopped anywhere."""

from __future__ import annotations

from typing import Any

from storage import failpoints
from tasks.figures import Progress
from tasks.plugins import register_role
from tasks.trainer.worker import Trainer


class Stoppable(Trainer):
    def handle(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        failpoints.arm({failpoints.SPEC: job["runtime"].get("failpoints", "")})
        return super().handle(job, progress)


register_role("trainer", f"{__name__}:{Stoppable.__name__}")
