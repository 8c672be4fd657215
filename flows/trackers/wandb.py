"""Weights & Biases, online or offline."""

from __future__ import annotations

import importlib
import netrc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field

from flows.trackers.base import Point, Tracked, Tracker, TrackerConfig, register


@register
class WandB(TrackerConfig):
    """A run of a Weights & Biases project. The key comes from WANDB_API_KEY or `wandb login`, a server of your own from
    WANDB_BASE_URL."""

    kind: Literal["wandb"] = "wandb"
    project: str = Field("opdflow", description="the project")
    entity: str | None = Field(None, description="user or team; null: the key's default")
    group: str | None = Field(None, description="group of runs; null: the run that this one was forked from")
    mode: Literal["online", "offline"] | None = Field(
        None,
        description="offline: files only, a folder per call, for `wandb sync --id ID FOLDER...` later (ID ends the folders'"
        " names; in the run's trackers.json it stands before the colon); may change between calls; null: WANDB_MODE, without it"
        " online",
    )
    folder: Path | None = Field(None, description="parent of the folder `wandb`; null: trackers in the store")
    module: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    @property
    def chosen(self) -> str:
        """The mode in use."""
        return self.mode or os.environ.get("WANDB_MODE") or "online"

    def problem(self) -> str | None:
        if (why := super().problem()) is not None:
            return why
        if self.chosen in ("online", "shared") and not _has_key():
            return "no key is there; set WANDB_API_KEY, call `wandb login`, or set mode: offline"
        return None

    def open(self, run: Tracked) -> Tracker:
        return _Run(self, run)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Run:
    """An offline call of W&B knows nothing of the calls before it: its history would begin at step 0 again, and of two folders
    with equal steps only one is uploaded. So `id` is ID:COUNT, with the count of what was logged so far in either mode. Online
    the service knows its last step, which can be further: of a call that was killed, or of one by an earlier version."""

    def __init__(self, config: WandB, run: Tracked) -> None:
        wandb: Any = importlib.import_module("wandb")
        known, _, logged = (run.id or secrets.token_hex(8)).partition(":")
        self._id = known
        folder = config.folder or run.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            name=run.name,
            group=config.group or run.group,
            id=self._id,
            resume="allow",
            mode=config.chosen,
            dir=str(folder),
            config=dict(run.config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self._logged = max(int(logged or 0), int(self._run.step))
        for axis, names in (("step", ("train/*", "warmup*")), ("round", ("eval/*", "*"))):
            self._run.define_metric(axis)
            for name in names:
                self._run.define_metric(name, step_metric=axis)

    @property
    def id(self) -> str:
        return f"{self._id}:{self._logged}"

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, point.axis: point.number}, step=self._logged)
            self._logged += 1

    def close(self, status: str) -> None:
        self._run.finish(exit_code=1 if status == "failed" else 0)
