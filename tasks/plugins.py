"""The user's own code: engines, objectives, verifiers, named in a config as `plugins: [module]`.

A plugin is a Python module that registers what it brings when it is imported; it must be on the import path. The digest
of its source does not enter keys yet: after a change of a plugin, use a new seed or a new store."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from storage.errors import ConfigError

ROLES: dict[str, str] = {
    "sampler": "tasks.engines.sampler:Sampler",
    "scorer": "tasks.engines.scorer:Scorer",
    "trainer": "tasks.trainer.worker:Trainer",
}


def register_role(role: str, target: str) -> None:
    """Let `target` ("module:class") serve the jobs of a role: sampler, scorer or trainer."""
    if role not in ROLES:
        raise ConfigError(f"plugins: no role named {role!r}; there are {', '.join(ROLES)}")
    ROLES[role] = target


def load_plugins(modules: Iterable[str], search: str | None = None) -> None:
    """Import the modules, `search` (a folder) first on the path."""
    if search and search not in sys.path:
        sys.path.insert(0, search)
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ConfigError(f"plugins: no module named {name!r} on the import path") from error


def source_digest(modules: Iterable[str], search: str | None = None) -> str | None:
    """SHA-256 over the plugins' source files; null without plugins."""
    digest = hashlib.sha256()
    names = list(modules)
    for name in names:
        if search and search not in sys.path:
            sys.path.insert(0, search)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ConfigError(f"plugins: no module named {name!r} on the import path")
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest() if names else None
