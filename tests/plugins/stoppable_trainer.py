"""A plugin: the trainer, with failpoints armed per job (`runtime.failpoints`), so that a warm one can be stopped anywhere; and a
job `spoilt_gradient`, which shows what its engines do with a gradient that is not finite."""

from __future__ import annotations

from typing import Any

import spoilt_gradient

from storage.disk import failpoints
from tasks.plugins import register_role
from tasks.trainer.trainer import Trainer
from tasks.workers.metrics import Progress


class Stoppable(Trainer):
    def handle(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if job["op"] == "spoilt_gradient":
            return {"kinds": spoilt_gradient.steps(self.device)}
        failpoints.arm({failpoints.SPEC: job["runtime"].get("failpoints", "")})
        return super().handle(job, progress)


register_role("trainer", f"{__name__}:{Stoppable.__name__}")
