"""A round whose state is lost and whose training cannot be repeated: what is refused, and that the ways on work."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run

from flows.run.runner import fork_experiment, resume_experiment, run_experiment
from storage.errors import ConfigError, CorruptArtifact
from storage.runs import Run
from storage.store import Store

NAME = scripted_run.NAME


def go_on(root: Path, *overrides: str) -> None:
    """`opd resume --set ...`"""
    e = resume_experiment(NAME, root, list(overrides))
    run_experiment(e, name=NAME, root=root, prefect=False, workers=in_process.InProcess())  # type: ignore[arg-type]


def everything(root: Path) -> dict[str, Any]:
    return {f"{a.stage}/{a.key}": a.content for a in Store(root).list()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished run of two rounds."""
    root = scripted_run.prepare_root(tmp_path / "store")
    in_process.run(root, 2)
    return root


def lose(root: Path) -> str:
    """The second round's state; its name."""
    key = Run.open(root, NAME).state.rounds[2].stages["train"].artifacts["trainer_state"]
    shutil.rmtree(root / "artifacts" / "trainer_state" / key)
    return f"trainer_state/{key}"


def test_settings_that_changed_are_set_back(root: Path) -> None:
    before = everything(root)
    lose(root)
    with pytest.raises(ConfigError, match=r"runtime\.threads 1, now 3") as refused:
        go_on(root, "runtime.threads=3", "policy.rounds=3")
    assert "opd resume NAME --set FIELD=VALUE" in str(refused.value)
    go_on(root, "runtime.threads=1", "policy.rounds=2")
    assert everything(root) == before
    go_on(root, "runtime.threads=3", "policy.rounds=3")  # for later rounds they may change
    assert Run.open(root, NAME).state.status == "finished"


def test_a_training_that_cannot_be_repeated_is_made_beside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the error, as it is written there, ends; nothing of the first run is lost by it."""
    before = everything(root)
    lost = lose(root)
    with monkeypatch.context() as changed:
        changed.setattr(sys.modules["scripted_engines"], "table_digest", lambda table: "of a new release")
        for _ in range(2):
            with pytest.raises(CorruptArtifact, match="retraining gave weights") as refused:
                go_on(root)
        assert everything(root) == {name: content for name, content in before.items() if name != lost}
        [found] = re.findall(r"opd fork NAME@(\d) --name NEW --set (seed=\d+)$", str(refused.value))
        e = fork_experiment(NAME, int(found[0]), root, [found[1]])
        run_experiment(e, name="new", root=root, prefect=False, workers=in_process.InProcess())  # type: ignore[arg-type]
    old, new = (Run.open(root, name).state for name in (NAME, "new"))
    assert new.status == "finished" and len(new.rounds) == 3
    shas = [[round.student_sha256 for round in state.rounds] for state in (old, new)]
    assert shas[0][:2] == shas[1][:2] and shas[0][2] != shas[1][2]
    assert {name: everything(root)[name] for name in before if name != lost} == {
        name: content for name, content in before.items() if name != lost
    }
    go_on(root)
    assert {name: everything(root)[name] for name in before} == before
