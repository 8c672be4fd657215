"""The scripted engines, one of which starts a family (process_family.py) and then hangs, where a file `family` in the store's
root names its role."""

from __future__ import annotations

import os
import time
from pathlib import Path

import scripted_engines
from process_family import start_family

from opdflow.plugin import register_role

for role in ("sampler", "scorer", "trainer"):
    register_role(role, f"{__name__}:{role.capitalize()}")


class Family:
    def handle(self, job, link):
        root = Path(job.store)
        asked = root / "family"
        if asked.exists() and asked.read_text() == type(self).__name__.lower():
            start_family(root, os.getpid())
            time.sleep(600)
        return super().handle(job, link)


class Sampler(Family, scripted_engines.Sampler): ...


class Scorer(Family, scripted_engines.Scorer): ...


class Trainer(Family, scripted_engines.Trainer): ...
