"""What a replay leaves: nothing, or, when asked to, a scratch store that stays until it is collected."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import CHECKOUT

from flows.run.replay import _scratch
from storage.store import Store
from storage.upkeep.gc import Collector

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
