"""The scripted run without processes: the engines serve inside this one, so that a run takes a fraction of a second."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import scripted_run
from feed import InProcessPool

from flows.experiment import Experiment
from flows.run.progress import SilentReporter
from flows.run.runner import run_experiment
from storage.artifacts import shards
from storage.runs import Run
from storage.store import Store
from storage.upkeep.retention import evicted_of

sys.path.insert(0, str(scripted_run.PLUGINS))


class InProcess(InProcessPool):
    """In the place of a `WorkerPool` that is lent to a run."""

    def __init__(self) -> None:
        import scripted_engines as engines

        from tasks.engines.judge import Judge

        super().__init__(
            sampler=engines.Sampler({}),
            scorer=engines.Scorer({}),
            trainer=engines.Trainer({}),
            judge=Judge({}),
        )

    @contextmanager
    def serving(self, *_: Any) -> Iterator[InProcess]:
        yield self
        if (judge := self.handlers.get("judge")) is not None:
            judge.close()


def run(
    root: Path, rounds: int = scripted_run.ROUNDS, variant: str = "plain", **handlers: Any
) -> list[tuple[str, Any, list[Any]]]:
    """Brings the run to its end as a new process would, with nothing verified yet; the jobs that its engines did. `handlers`: by
    role in the place of the scripted ones."""
    shards._verified.clear()
    pool = InProcess()
    pool.handlers |= handlers
    e = scripted_run.experiment(rounds, variant)
    run_experiment(e, name=scripted_run.NAME, root=root, prefect=False, workers=pool)  # type: ignore[arg-type]
    return pool.jobs


def go(root: Path, e: Experiment, name: str = "one", **more: Any) -> list[str]:
    """What the run said."""
    said: list[str] = []

    class Reporter(SilentReporter):
        def note(self, round: int, label: str, text: str) -> None:
            said.append(text)

    pool: Any = InProcess()
    run_experiment(e, name=name, root=root, prefect=False, workers=pool, reporter=Reporter(), **more)
    return said


def gone(root: Path, name: str = "one") -> dict[str, list[int]]:
    """Stage -> rounds whose data was removed."""
    state = Run.open(root, name).state
    lost = evicted_of(Store(root), state)
    found: dict[str, set[int]] = {}
    for round in state.rounds:
        for stage in round.stages.values():
            for artifact in set(stage.artifacts.items()) & lost:
                found.setdefault(artifact[0], set()).add(round.round)
    return {stage: sorted(rounds) for stage, rounds in found.items()}
