"""Trackio: a local database with a dashboard, or a Space of the Hub."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from flows.trackers.base import Point, Tracked, Tracker, TrackerConfig, register


@register
class Trackio(TrackerConfig):
    """A run of a Trackio project; `trackio show --project NAME` shows it. A Space is written with HF_TOKEN."""

    kind: Literal["trackio"] = "trackio"
    project: str = Field("opdflow", description="the project")
    group: str | None = Field(None, description="group of runs; null: the run that this one was forked from")
    space: str | None = Field(None, description="a Space of the Hub, OWNER/NAME, to write to; null: the local database")
    folder: Path | None = Field(
        None, description="folder of the local databases; null: TRACKIO_DIR, without it trackers/trackio in the store"
    )
    module: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"

    def open(self, run: Tracked) -> Tracker:
        return _Run(self, run)


class _Run:
    def __init__(self, config: Trackio, run: Tracked) -> None:
        folder = config.folder or Path(os.environ.get("TRACKIO_DIR") or run.folder / "trackio")
        os.environ["TRACKIO_DIR"] = str(folder.absolute())  # read when it is imported, and by its own processes
        self.id = run.name
        with _quiet():
            import trackio

            self._run: Any = trackio.init(
                project=config.project,
                name=run.name,
                group=config.group or run.group,
                space_id=config.space,
                config=dict(run.config),
                resume="allow" if run.id is not None else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(dict(point.values), step=point.number)

    def close(self, status: str) -> None:
        with _quiet():
            self._run.finish()


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """It prints on standard output, where `--json` writes."""
    return contextlib.redirect_stdout(io.StringIO())
