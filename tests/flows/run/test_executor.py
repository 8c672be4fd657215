"""What the executor says about a stage that it has built."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from flows.run.executor import Maker
from flows.run.progress import SilentReporter
from storage.runs import Run
from storage.store import ArtifactSpec, Builder, Store
from tasks.stage import Context, Work
from tasks.workers.metrics import StageProgress
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig


def rollout(clipped: float | None) -> Work:
    def build(builders: dict[str, Builder], context: Context) -> None:
        builders["rollout"].write_shard("mask", 0, pa.table({"sample_id": ["a"], "mask_reasons": [[0]]}))
        builders["rollout"].commit(meta={"metrics": {"clipped_ratio": clipped}})

    return Work("rollout", {"rollout": ArtifactSpec.of("rollout", 1, {"clipped": clipped}, {})}, build)


def prompts(number: int) -> Work:
    def build(builders: dict[str, Builder], context: Context) -> None:
        builders["prepare"].write_shard("mask", 0, pa.table({"sample_id": ["a"], "mask_reasons": [[0]]}))
        builders["prepare"].commit()

    return Work("prepare", {"prepare": ArtifactSpec.of("prepare", 1, {"number": number}, {})}, build)


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def note(self, round: int, label: str, text: str) -> None:
        self.seen.append(text)


@pytest.mark.parametrize(("clipped", "warned"), [(1.0, True), (0.5, False), (None, False)])
def test_a_stage_all_of_whose_completions_are_clipped_is_a_warning_once(
    tmp_path: Path, clipped: float | None, warned: bool
) -> None:
    store, run, logged, notes = Store(tmp_path), Run.create(tmp_path, "one", {}, {}), list[str](), Notes()
    runtime = RuntimeConfig(device="cpu")
    with WorkerPool(runtime, tmp_path / "logs") as workers, run.lock():

        def context(progress: StageProgress) -> Context:
            return Context(store, runtime, workers, progress, logged.append)

        for _ in range(2):  # the second time it is in the store
            maker = Maker(store, run, run.state, context, notes)
            with maker.round(1):
                maker("rollout", rollout, clipped)
    assert len(notes.seen) == warned and all("rollout.max_completion_length" in text for text in notes.seen)
    assert logged == [f"rollout: {text}" for text in notes.seen]


def test_a_run_that_goes_on_with_other_prompts_says_so(tmp_path: Path) -> None:
    store, run, logged, notes = Store(tmp_path), Run.create(tmp_path, "one", {}, {}), list[str](), Notes()
    runtime = RuntimeConfig(device="cpu")
    with WorkerPool(runtime, tmp_path / "logs") as workers, run.lock():
        maker = Maker(store, run, run.state, lambda p: Context(store, runtime, workers, p, logged.append), notes)
        for number in (0, 0, 1):
            with maker.round(0):
                maker("prepare", prompts, number)
    (note,) = notes.seen
    assert all(prompts(number).outputs["prepare"].key in note for number in (0, 1))
