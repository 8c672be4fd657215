"""One true run with vLLM, DeepSpeed, Prefect and DuckDB, made once and read by the tests that look at it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from opd_cli import opd
from places import TINY

from storage.query.catalog import Catalog
from storage.runs import Run
from storage.store import Store


@dataclass(frozen=True)
class FinishedRun:
    root: Path
    name: str
    status: dict

    def opd(self, *args: object, **options) -> subprocess.CompletedProcess[str]:
        return opd(*args, root=self.root, **options)

    def stage(self, round: int, label: str) -> dict:
        return self.status["rounds"][round]["stages"][label]

    def sha(self, round: int) -> str:
        return self.status["rounds"][round]["student_sha256"]

    def query(self, sql: str) -> list[dict]:
        return Catalog(Store(self.root), Run.open(self.root, self.name)).query(sql).to_pylist()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The tiny experiment, three rounds, by `opd run` with its embedded Prefect server."""
    root = tmp_path_factory.mktemp("real") / "store"
    status = json.loads(opd("run", TINY, "--name", "base", "--json", root=root).stdout)
    return FinishedRun(root, "base", status)


@pytest.fixture(scope="session")
def copy_round_0(finished: FinishedRun) -> Callable[[Path], Path]:
    """Makes a new store that holds what round 0 made and nothing else, so that a run in it need not warm up again."""

    def copy(root: Path) -> Path:
        labels = ("model", "model_teacher", "prepare", "warmup", "warmup_teacher", "evaluate")
        for stage, key in {pair for label in labels for pair in finished.stage(0, label)["artifacts"].items()}:
            shutil.copytree(finished.root / "artifacts" / stage / key, root / "artifacts" / stage / key)
        return root

    return copy


@pytest.fixture
def prepared_root(copy_round_0: Callable[[Path], Path], tmp_path: Path) -> Callable[[], Path]:
    """Makes such a store in the test's own folder."""
    return lambda name="store": copy_round_0(tmp_path / name)
