"""A plugin: the trainer, with settings and failpoints per job (`overriding_jobs.py`), so that a warm one serves every test and
can be stopped anywhere."""

from __future__ import annotations

import os

import spoilt_gradient
from overriding_jobs import SpoiltGradient, SpoiltGradients, TrainWith, WarmupWith

from storage.disk import failpoints
from tasks.trainer.trainer import Trainer
from tasks.workers.jobs import TrainResult, register_role
from tasks.workers.main import Link


class Overriding(Trainer):
    def handle(self, job: TrainWith | WarmupWith | SpoiltGradient, link: Link) -> TrainResult | SpoiltGradients:
        if isinstance(job, SpoiltGradient):
            return SpoiltGradients(spoilt_gradient.steps(self.device))
        if failpoints.SPEC not in os.environ:  # those of a trainer that was launched to die stay armed
            failpoints.arm({failpoints.SPEC: job.failpoints})
        own = self.settings
        self.settings = own | job.overrides
        try:
            return super().handle(job, link)
        finally:
            self.settings = own


register_role("trainer", f"{__name__}:{Overriding.__name__}")
