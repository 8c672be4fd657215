"""A run whose samples have contexts of their own: the order of its stages, a plan, collection and restore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import scripted_run
from in_process import go, gone
from registries import plugin_path

from flows.distill import distill
from flows.experiment import Experiment, with_plugins
from flows.run.executor import Planner
from storage.runs import Run
from storage.store import Store


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


def experiment(rounds: int = 2, **policy: object) -> Experiment:
    e = scripted_run.experiment(rounds, "contexts")
    return e.model_copy(update={"policy": e.policy.model_copy(update=policy)})


def test_contexts_are_made_between_judge_and_supervise_collected_and_made_again(tmp_path: Path) -> None:
    e = experiment()
    root = scripted_run.prepare_root(tmp_path / "store", e)
    planner = Planner(Store(root))
    distill(e, planner, 1)
    assert [line.stage for line in planner.lines if line.round == 1] == [
        "rollout", "judge", "context", "supervise", "train", "evaluate",
    ]  # fmt: skip
    keep = e.policy.retain.model_copy(update={"signals": 1, "rollouts": 1})
    go(root, experiment(retain=keep))
    store, entry = Store(root), Run.open(root, "one").state.rounds[1]
    assert list(entry.stages) == ["rollout", "judge", "context", "supervise", "train", "evaluate"]
    assert gone(root)["context"] == [1] and "judge" not in gone(root)
    metrics = entry.metrics
    assert metrics["context_samples"] == 8
    assert sum(metrics[f"context_{source}"] for source in ("sibling", "prompt", "none")) == 8
    artifact = store.get("context", entry.stages["context"].artifacts["context"])
    go(root, experiment(retain=keep), restore=1)
    assert "context" not in gone(root)
    assert store.verify(artifact, move=False) == [] and store.read_table(artifact, "contexts").num_rows == 8
    distill(with_plugins(e), planner := Planner(Store(root)), 2)
    assert {line.state for line in planner.lines} == {"cached"}
