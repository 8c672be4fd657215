"""The user's own code: engines, objectives, verifiers, named in a config as `plugins: [module]`.

A plugin is a Python module or package on the import path that registers its classes on import. Its source (the module's
file, or every .py file of the package) enters the keys of the stages that use what it registered, and no others. Its
imports from elsewhere are not tracked; use a package if it has several files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from storage.errors import ConfigError, InputError

NO_PLUGINS: Mapping[str, str] = MappingProxyType({})
_OURS = ("tasks", "storage", "flows", "opdflow")
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_loaded: dict[str, str] = {}
"""Plugin -> digest of its source when this process imported it."""
_loading: list[str] = []
_registered: list[tuple[str, str, str | None]] = []
"""(role, module of its target, the plugin that was being imported) of every call of `jobs.register_role`."""


def note_role(role: str, module: str) -> None:
    """Remember that `module`, or the plugin that is being imported, brings a role's handler."""
    _registered.append((role, module, _loading[-1] if _loading else None))


def beside(name: str, folders: Iterable[Path]) -> Path | None:
    """The first of the folders that holds the module or package `name`; None if none does."""
    top = name.partition(".")[0]
    for folder in folders:
        if (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file():
            return folder
    return None


def search_in(folder: Path) -> None:
    """Modules are found in this folder too, after all others: a file of the user's hides no library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def refuse_hidden(name: str, folders: Iterable[Path]) -> None:
    """ConfigError where one of the folders holds the module `name`, but the import path has another one of that name before."""
    folder, top = beside(name, folders), name.partition(".")[0]
    if folder is None:
        return
    spec = importlib.util.find_spec(top)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin and spec.has_location else None
    if origin is None or not origin.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"module {name!r}: {folder} holds one of that name, but the import path has another before it"
            f" ({origin or 'built into Python'}); rename yours"
        )


def load_plugins(modules: Iterable[str], search: str | None = None) -> dict[str, str]:
    """Imports the modules, with the folder `search` first on the path, and returns the digest of each source as this process
    imported it, even if the file has changed since. ConfigError for a module that is missing or cannot be imported."""
    if search and search not in sys.path:
        sys.path.insert(0, search)
    found = {}
    for name in modules:
        if name not in _loaded:
            digest = source_digest(name)  # before the import: the next process then detects an edit in between
            _loading.append(name)
            try:
                importlib.import_module(name)
            except Exception as error:
                raise ConfigError(
                    f"plugins: module {name!r} fails on import ({_where(error, name)}{type(error).__name__}: {error})"
                ) from error
            finally:
                _loading.pop()
            _loaded[name] = digest
        found[name] = _loaded[name]
    return found


def _where(error: Exception, name: str) -> str:
    """`FILE:LINE: ` of the plugin's last frame in the traceback; empty where it has none (a syntax error names its own)."""
    place = source_place(name)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(place)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def loaded_digests(modules: Iterable[str]) -> dict[str, str]:
    """The digests of the modules that this process has imported."""
    return {name: _loaded[name] for name in modules if name in _loaded}


def source_digest(name: str) -> str:
    """SHA-256 over the names and contents of a plugin's files. ConfigError for a missing module."""
    origin = source_place(name)
    files = sorted(origin.rglob("*.py")) if origin.is_dir() else [origin]
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(origin.parent).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def source_place(name: str) -> Path:
    """A module's file, or a package's folder. ConfigError for a missing module."""
    try:
        spec = importlib.util.find_spec(name) if _NAME.fullmatch(name) else None
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"plugins: no module named {name!r} beside the config or on the import path")
    return Path(spec.origin)


def used_plugins(
    plugins: Mapping[str, str], *roles: str, config: BaseModel | None = None, classes: Iterable[type] = ()
) -> dict[str, str]:
    """Which of a run's plugins (name -> digest of its source) a stage uses: those that registered one of these roles, a
    class in its `config` or one of `classes`, or hold a function that the config names. A registered class from outside every
    plugin counts as used by all of them. Without plugins the result is empty and keys do not change."""
    found = {
        name
        for role, module, during in _registered
        for name in plugins
        if role in roles and (during == name or _within(module, name))
    }
    own = ((cls.__module__, True) for cls in classes if cls.__module__.partition(".")[0] not in _OURS)
    for module, certain in (*_modules(config), *own) if plugins else ():
        owners = {name for name in plugins if _within(module, name)}
        found |= owners if owners or not certain else set(plugins)
    return {name: plugins[name] for name in sorted(found)}


def refuse_changed(recorded: Mapping[str, str], what: str) -> None:
    """InputError, naming the file, if a plugin imported by this process differs from the recorded one."""
    for name, digest in recorded.items():
        if _loaded.get(name, digest) != digest:
            raise InputError(f"{changed(name)}, but {what} needs the old version; restore the old file")


def changed(name: str) -> str:
    """The message that a plugin has changed, with its path."""
    return f"the plugin {name!r} ({source_place(name)}) has changed"


def _within(module: str, plugin: str) -> bool:
    return module == plugin or module.startswith(f"{plugin}.")


def _modules(value: Any) -> Iterator[tuple[str, bool]]:
    """Modules from outside the project that a config uses: (name, whether it is a registered class)."""
    if isinstance(value, BaseModel):
        module = type(value).__module__
        if module.partition(".")[0] not in _OURS:
            yield module, True
        if getattr(value, "kind", None) == "function":
            yield str(getattr(value, "target", "")).partition(":")[0], False
        for name in type(value).model_fields:
            yield from _modules(getattr(value, name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _modules(item)
