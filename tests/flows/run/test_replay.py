"""What a replay refuses first, and what it leaves: nothing, or, when asked to, a scratch store that stays until it is
collected."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from places import CHECKOUT

from flows.run import replay
from flows.run.replay import _scratch, replay_round
from storage.errors import ConfigError
from storage.runs import Run
from storage.store import Store
from storage.upkeep.gc import Collector
from tasks.workers.runtime import RuntimeConfig

SCRIPT = """
import sys
from flows.run.replay import _scratch
from storage.store import Store
with _scratch(Store(sys.argv[1]), sys.argv[2] == "keep", print) as folder:
    (folder / "log").write_text("x")
"""


@pytest.mark.parametrize("keep", [True, False])
def test_a_kept_scratch_store_outlives_its_process_and_the_next_start(tmp_path: Path, keep: bool) -> None:
    store = Store(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "keep" if keep else ""]
    said = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    store.remove_leftovers()
    kept = list(tmp_path.glob("*/log"))
    assert len(kept) == keep and not list(tmp_path.glob(".tmp-*"))
    if keep:
        (folder,) = (path.parent for path in kept)
        assert str(folder) in said
        assert Collector(store).plan().items == []  # it is young
        for path in folder.iterdir():
            os.utime(path, (time.time() - 7200,) * 2)
        collector = Collector(store)
        plan = collector.plan()
        assert [(item.kind, item.path) for item in plan.items] == [("temporary", folder)]
        collector.apply(plan)
        assert not folder.exists()


def test_one_under_way_is_not_collected(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with _scratch(store, True, print) as folder:
        for path in folder.iterdir():
            os.utime(path, (0, 0))
        assert Collector(store).plan().items == []


def test_the_machines_of_all_stages_are_asked_for_before_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training was made on more GPUs than this machine has: the rollout is not repeated in vain."""
    root = scripted_run.prepare_root(tmp_path / "store")
    in_process.run(root, 1)
    runtime_of = replay._runtime

    def on_gpus(numerics: dict[str, Any], *more: Any) -> RuntimeConfig:
        trained = "processes" in numerics  # recorded of a training alone
        return runtime_of(numerics | ({"device": "cuda", "processes": 999} if trained else {}), *more)

    monkeypatch.setattr(replay, "_runtime", on_gpus)
    told: list[str] = []
    with pytest.raises(ConfigError, match="GPU"):
        replay_round(Run.open(root, scripted_run.NAME), root, 1, ("rollout", "train"), [], False, told.append)
    assert told == []
