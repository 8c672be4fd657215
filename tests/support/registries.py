"""What a test's plugins register is forgotten after it, and they are imported as by a new process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from places import PLUGINS

from tasks import plugins
from tasks.behaviours import BEHAVIOURS
from tasks.engines.teacher import TEACHERS
from tasks.losses.credit import CREDITS
from tasks.losses.token_weights import TOKEN_WEIGHTS
from tasks.signals import SIGNALS
from tasks.trainer import launch
from tasks.workers import jobs
from tasks.workers.pool import WorkerPool

OWN_ROLES = {
    "sampler": "tasks.engines.sampler:Sampler",
    "scorer": "tasks.engines.scorer:Scorer",
    "trainer": "tasks.trainer.trainer:Trainer",
    "judge": "tasks.engines.judge:Judge",
}
OWN_LAUNCH = launch.launch_command
OWN_POOL = {name: getattr(WorkerPool, name) for name in ("run", "share", "each")}
"""Kept before a plugin can replace them: tests/plugins/scripted_engines.py and scripted_ticks.py do."""


def own_workers(patch: pytest.MonkeyPatch) -> None:
    """This program's workers serve every role and are started by its own launcher and pool, whatever plugin an earlier test
    registered in this process."""
    patch.setattr(jobs, "ROLES", dict(OWN_ROLES))
    patch.setattr(launch, "launch_command", OWN_LAUNCH)
    for name, method in OWN_POOL.items():
        patch.setattr(WorkerPool, name, method)


@contextmanager
def plugin_path() -> Iterator[None]:
    """`tests/plugins` can be imported, and what its modules register is forgotten at the end. What an earlier test of this
    process has imported of them, and registered as workers, is not there meanwhile."""
    signals = dict(SIGNALS)
    earlier = {name: sys.modules.pop(name) for name in _of_plugins()}
    with pytest.MonkeyPatch.context() as patch:
        for registry in (BEHAVIOURS, CREDITS, TEACHERS, TOKEN_WEIGHTS):
            patch.setattr(registry, "classes", dict(registry.classes))
        own_workers(patch)
        patch.setattr(plugins, "_registered", list(plugins._registered))
        patch.setattr(plugins, "_loaded", {n: digest for n, digest in plugins._loaded.items() if n not in earlier})
        patch.syspath_prepend(PLUGINS)
        yield
    SIGNALS.clear()
    SIGNALS.update(signals)
    for name in _of_plugins():
        del sys.modules[name]
    sys.modules.update(earlier)


def _of_plugins() -> list[str]:
    """The modules of `tests/plugins` that are imported."""
    modules = [(name, str(getattr(module, "__file__", ""))) for name, module in [*sys.modules.items()]]
    return [name for name, file in modules if file.startswith(str(PLUGINS))]
