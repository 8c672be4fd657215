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


@contextmanager
def plugin_path() -> Iterator[None]:
    """`tests/plugins` can be imported, and what its modules register is forgotten at the end."""
    signals, modules = dict(SIGNALS), set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for registry in (BEHAVIOURS, CREDITS, TEACHERS, TOKEN_WEIGHTS):
            patch.setattr(registry, "classes", dict(registry.classes))
        patch.setattr(jobs, "ROLES", dict(jobs.ROLES))
        patch.setattr(launch, "launch_command", launch.launch_command)
        patch.setattr(plugins, "_registered", list(plugins._registered))
        patch.setattr(plugins, "_loaded", dict(plugins._loaded))
        patch.syspath_prepend(PLUGINS)
        yield
    SIGNALS.clear()
    SIGNALS.update(signals)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(PLUGINS)):
            del sys.modules[name]
