"""The store alone, killed at every failpoint: the second attempt ends where an undisturbed one does."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import pytest
from fault_trials import Trials, both_forms
from store_story import before, process, story, told

from storage.artifacts.builder import unfinished_work
from storage.disk import failpoints
from storage.disk.failpoints import NAMES


def run(root: Path, spec: str, log: Path) -> int:
    return forked.exit_code(forked.start(process, str(root), spec, str(log), output=log.with_name("output")))


class World:
    def __init__(self, folder: Path) -> None:
        self.start = folder / "start"
        before(self.start)
        whole = folder / "whole"
        shutil.copytree(self.start, whole)
        log = folder / "hits"
        assert run(whole, "", log) == 0
        self.hits = Counter(line.split()[0] for line in log.read_text().splitlines())
        self.result = told(whole)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("story"))


def trial(world: World, folder: Path, spec: str) -> tuple[int, dict[str, Any]]:
    root = folder / "store"
    shutil.copytree(world.start, root)
    code = run(root, spec, folder / "hits")
    assert run(root, "", folder / "later-hits") == 0
    assert [*root.rglob(".tmp-*"), *unfinished_work(root / "artifacts", "*/*/")] == []
    for path in (root / "quarantine").iterdir():  # nothing lies there without a reason
        reason = path if path.name.endswith(".reason.json") else path.with_name(path.name + ".reason.json")
        assert json.loads(reason.read_text())["reason"]
    result = told(root)
    shutil.rmtree(folder)
    return code, result


@both_forms(short=len(NAMES), full=10 * len(NAMES))
def test_killed_at_every_failpoint(world: World, trials: Trials, tmp_path: Path, count: int) -> None:
    assert set(world.hits) == set(NAMES), "a failpoint that nothing meets proves nothing"
    names = [f"{name} {number}" for number in range(10) for name in NAMES]

    def attempt(name: str) -> None:
        point, number = name.split()
        hit = random.Random(f"store {name}").randint(1, world.hits[point])
        code, result = trial(
            world, tmp_path / name.replace(" ", "-"), f"{point}={('kill', 'exit')[number == '9']}@{hit}"
        )
        assert code != 0
        assert result == world.result

    trials(1, "SIGKILL at every failpoint of the store alone x 10", names[:count], attempt, parallel=2)


@both_forms(short=8, full=5 * len(NAMES))
def test_a_full_disk_at_every_failpoint(world: World, trials: Trials, tmp_path: Path, count: int) -> None:
    """ENOSPC where nothing but a test can bring it about exactly: the program ends, and goes on later."""
    names = [f"{name} {number}" for number in range(5) for name in NAMES]
    random.Random("full").shuffle(names)

    def attempt(name: str) -> None:
        point, _ = name.split()
        hit = random.Random(f"full {name}").randint(1, world.hits[point])
        code, result = trial(world, tmp_path / name.replace(" ", "-"), f"{point}=raise:OSError(ENOSPC)@{hit}")
        assert code == 1
        assert result == world.result

    trials(11, "ENOSPC at every failpoint of the store alone x 5", names[:count], attempt, parallel=2)


def test_off_means_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failpoints.SPEC, raising=False)
    monkeypatch.delenv(failpoints.LOG, raising=False)
    failpoints.arm()
    before(tmp_path)
    story(tmp_path)
    assert failpoints._armed is None and not failpoints._hits
