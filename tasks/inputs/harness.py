"""Tasks of lm-eval, EleutherAI's Language Model Evaluation Harness: how one is named and loaded, and what a result depends on.

lm-eval is an extra: nothing but a call that names its tasks imports it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from storage.errors import ConfigError, InputError, did_you_mean
from storage.identity import Identity
from tasks.rollout_config import Dtype

NEEDS = "--tasks: the tasks of lm-eval are in a package that is not installed; pip install 'opdflow[lm-eval]'"


class HarnessConfig(Identity):
    """A task of lm-eval, or a group or tag, and how it is asked. Prompts, stop rules, filters and metrics are the task's own."""

    task: str = Field(description="name of a task, group or tag")
    limit: int | None = Field(None, ge=1, description="the first so many documents of each task; null: all")
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; null: the task's own number"
    )
    chat_template: bool = Field(False, description="render requests with the student's chat template")
    dtype: Dtype = Field("float32", description="of the model")


@dataclass(frozen=True)
class HarnessTask:
    """A task as it is in this environment. `digest`: of all that its result depends on beside the model and lm-eval itself."""

    config: HarnessConfig
    digest: str
    version: str
    folder: Path | None
    """The user's own tasks, where lm-eval looks first."""


def find_tasks(names: list[str], config: HarnessConfig, folder: Path | None) -> list[HarnessTask]:
    """The tasks of these names, with the other fields of `config`. Their data sets are loaded, over the network where they are
    not in the cache.

    ConfigError without lm-eval; InputError for an unknown name, and for a task that does not load, runs code of the model's, or
    needs more than text."""
    manager = task_manager(folder)
    known = set(manager.all_tasks)
    found = []
    for name in names:
        if name not in known:
            raise InputError(
                f"--tasks {name}: no task, group or tag of lm-eval {version('lm_eval')} has this name;"
                f" {did_you_mean(name, known, 'a folder of yours is given with --include-path')}"
            )
        one = config.model_copy(update={"task": name})
        found.append(HarnessTask(one, digest_of(load(manager, name), one), version("lm_eval"), folder))
    return found


def require_lm_eval() -> None:
    """ConfigError where the package is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(NEEDS)


def task_manager(folder: Path | None) -> Any:
    """lm-eval's index of its own tasks and those in a folder of the user's. ConfigError without lm-eval, InputError without the
    folder."""
    require_lm_eval()
    if folder is not None and not folder.is_dir():
        raise InputError(f"--include-path {folder}: no such folder; it holds the YAML files of your tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about its own command line
    from datasets.utils.logging import disable_progress_bar
    from lm_eval.tasks import TaskManager

    disable_progress_bar()
    return TaskManager(include_path=None if folder is None else str(folder))


def load(manager: Any, name: str) -> dict[str, Any]:
    """What lm-eval loads under a name: `tasks` and `groups` by name. InputError where that fails, and for a task that is not run
    here."""
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # of data sets, of the network, of a task's own code
        raise InputError(
            f"--tasks {name}: lm-eval cannot load it ({type(error).__name__}: {error}); a data set of the Hub must be in the"
            " cache, or the network be there"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"--tasks {name}: {task.task_name} runs code that the model writes, which needs a sandbox; run it with"
                " lm-eval on an exported student (opd export)"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"--tasks {name}: {task.task_name} needs images or sound; students here read text")
    return loaded


def digest_of(loaded: Mapping[str, Any], config: HarnessConfig) -> str:
    """sha256 of the tasks' configs, the files of their functions, their documents and those of their examples."""
    parts: dict[str, Any] = {"groups": {name: _fields(group) for name, group in loaded.get("groups", {}).items()}}
    for name, task in loaded["tasks"].items():
        shots = task.config.num_fewshot if config.num_fewshot is None else config.num_fewshot
        parts[name] = {
            "config": task.config.to_dict(keep_callable=True),
            "documents": list(islice(task.eval_docs, config.limit)),
            "examples": list(task.fewshot_docs()) if shots else [],
        }
    return sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def _fields(group: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(group).items() if not name.startswith("_")} | {
        "children": list(group.child_names)
    }


def _plain(value: Any) -> Any:
    """What JSON has no form for, as something that is the same in every process. InputError for other values."""
    if isinstance(value, partial):
        return [_plain(value.func), list(value.args), dict(value.keywords)]
    if callable(value):
        try:
            file = inspect.getsourcefile(value)
        except TypeError:  # built in, or an object that can be called
            file = None
        source = sha256(Path(file).read_bytes()).hexdigest() if file is not None else None
        return [getattr(value, "__qualname__", type(value).__qualname__), source]
    if is_dataclass(value):
        return asdict(value)  # type: ignore[arg-type]
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    text = str(value)
    if re.search(r" at 0x[0-9a-f]+>", text):
        raise InputError(
            f"--tasks: a task holds a {type(value).__name__}, which has no identity; only text is supported"
        )
    return text
