"""A scripted run on a small disk (`small_disk`) that fills up in a stage of choice; in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import small_disk
from scripted_run import NAME, Trial, experiment, find_engines

from flows.prefect_ import tasks as prefect_tasks
from flows.run.executor import Maker
from flows.run.runner import run_experiment
from storage.errors import NotEnoughSpace
from storage.store import Store
from tasks.stage import Work

LARGE = 1 << 30
START, SERVER = "start", "Prefect's server"
"""What comes before the first stage."""
BETWEEN = "between stages"
"""Remembered file hashes are written there, where there is room."""
FREED = "--- space is freed"


class Stages:
    """What a run does on its disk, by stage: pages used before and after each; where it stood at its end."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.now = disk, START
        self.growth: dict[str, int] = {}

    @contextmanager
    def watching(
        self, full: str | None = None, share: float = 0.0, growth: int = 0, late: bool = False
    ) -> Iterator[None]:
        """The disk has `share` of the `growth` pages that the stage `full` needs left when the stage begins; with `late`
        as soon as its estimate was found to fit."""
        make, session, require = Maker._make, prefect_tasks.prefect_session, Store.require_space
        before = small_disk.used(self.disk)

        def shrink(stage: str) -> None:
            if stage == full:
                small_disk.leave(self.disk, int(share * growth) * small_disk.PAGE)

        def enter(stage: str) -> None:
            nonlocal before
            used = small_disk.used(self.disk)
            self.growth[self.now] = self.growth.get(self.now, 0) + (used - before) // small_disk.PAGE
            self.now, before = stage, used

        def making(maker: Maker, label: str, work: Work, inputs: tuple[Any, ...]) -> Any:
            stage = f"{maker._round.round} {label}"
            enter(stage)
            if not late:
                shrink(stage)
            made = make(maker, label, work, inputs)
            enter(BETWEEN)
            return made

        def requiring(store: Store, needed: int, purpose: str = "") -> None:
            require(store, needed, purpose)
            if late:
                shrink(self.now)

        def serving(root: Path) -> Any:
            enter(SERVER)
            shrink(SERVER)
            return session(root)

        Maker._make, Store.require_space = making, requiring  # type: ignore[method-assign]
        prefect_tasks.prefect_session = serving
        shrink(START)
        try:
            yield
        finally:
            Maker._make, Store.require_space = make, require  # type: ignore[method-assign]
            prefect_tasks.prefect_session = session
            if full is None:
                enter("end")


def prepare(template: Path, folder: Path, home: Path | None = None) -> tuple[Path, Path]:
    """Disk and store."""
    disk = folder / "disk"
    small_disk.mount(disk, LARGE)
    root = disk / "store"
    shutil.copytree(template, root)
    if home is not None:
        shutil.copytree(home, root / "prefect")
    find_engines()
    return disk, root


def go(root: Path, prefect: bool) -> None:
    run_experiment(experiment(), name=NAME, root=root, prefect=prefect)


def measure(template: Path, folder: Path) -> None:
    """Pages that each stage takes, of a run that nothing disturbs."""
    disk, root = prepare(template, folder)
    stages = Stages(disk)
    with stages.watching():
        go(root, False)
    (folder / "growth.json").write_text(json.dumps(stages.growth))


def fill(template: Path, folder: Path, where: dict[str, Any], home: Path | None = None, prefect: bool = False) -> None:
    """A run on a disk that fills up (`where`: arguments of `watching`); then with enough. Writes down what happened.
    `home`: Prefect's folder of another run."""
    disk, root = prepare(template, folder, home)
    stages = Stages(disk)
    said: dict[str, Any] = {"error": None}
    with stages.watching(**where):
        try:
            go(root, prefect)
        except NotEnoughSpace as error:
            said["error"] = str(error)
    said["stage"] = stages.now
    said["processes"] = [process.name() for process in psutil.Process().children(recursive=True)]
    small_disk.resize(disk, LARGE)
    store = Store(root)
    said["damaged"] = [problem for artifact in store.list() for problem in store.verify(artifact, move=False)]
    said["committed"] = {f"{a.stage}/{a.key}": a.content for a in store.list()}
    print(FREED, flush=True)
    go(root, prefect)
    said["result"] = Trial(disk, folder / "none").result()
    said["leftovers"] = [str(path) for path in root.rglob(".tmp-*")]
    (folder / "said.json").write_text(json.dumps(said))
