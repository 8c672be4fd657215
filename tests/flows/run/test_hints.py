"""The hint after an error: committed results are kept, and the command that continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_run import EXPERIMENT

from flows.cli.app import make_app
from flows.prefect_.schedule import tick
from flows.run.hints import with_resume_hint
from storage.errors import ConfigError, CorruptArtifact, IdentityMismatch, InputError, OpdError, RunBusy
from storage.runs import Run

KEPT = "committed results are kept; after fixing the cause: "


@pytest.mark.parametrize("kind", [InputError, ConfigError, CorruptArtifact, OpdError])
def test_whatever_its_exit_code_an_error_of_a_run_says_how_to_go_on(tmp_path: Path, kind: type[OpdError]) -> None:
    Run.create(tmp_path, "base", {}, {})
    message = with_resume_hint(kind("the tokenizer has changed"), "base", tmp_path)
    assert message.startswith(f"the tokenizer has changed\n{KEPT}") and "opd resume base --root" in message


def test_a_run_that_failed_at_its_start_may_take_another_config(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "base", {}, {})
    state = run.state
    state.status = "failed"
    run.save(state)
    first, resume, again = with_resume_hint(InputError("no such file"), "base", tmp_path).splitlines()
    assert (first, resume.startswith(KEPT)) == ("no such file", True)
    assert again.startswith("where the config has to change: ") and "opd run CONFIG --name base" in again


@pytest.mark.parametrize("error", [RunBusy("held by another"), IdentityMismatch("another experiment's")])
def test_what_resuming_would_not_cure_says_nothing_of_it(tmp_path: Path, error: OpdError) -> None:
    Run.create(tmp_path, "base", {}, {})
    assert with_resume_hint(error, "base", tmp_path) == str(error)


def test_nothing_is_said_where_nothing_was_begun(tmp_path: Path) -> None:
    assert with_resume_hint(InputError("no such file"), "base", tmp_path) == "no such file"
    Run.create(tmp_path, "another", {}, {})
    assert with_resume_hint(InputError("no such file"), "base", tmp_path) == "no such file"


def test_a_bad_input_in_mid_run_and_before_it(tmp_path: Path) -> None:
    """Through the command line: a checkpoint that is not there is noticed by a stage, a bad field before the run exists."""
    root, config = tmp_path / "store", tmp_path / "config.yaml"
    student = {"source": {"kind": "checkpoint", "path": str(tmp_path / "gone")}}
    config.write_text(json.dumps(EXPERIMENT | {"plugins": [], "student": student}))
    for command in (["run", str(config), "--name", "base"], ["resume", "base"]):
        with pytest.raises(InputError, match=r"gone(.|\n)*opd resume base"):
            make_app()([*command, "--no-prefect", "--json", "--root", str(root)], standalone_mode=False)
    with pytest.raises(ConfigError) as told:
        make_app()(
            ["run", str(config), "--name", "other", "--set", "train.lr=-1", "--root", str(root)], standalone_mode=False
        )
    assert KEPT not in str(told.value)


def damaged(config_path: str, name: str, root: str, rounds: int, overrides: list[str]) -> None:
    """In the place of `flows.run.runner.run_rounds`."""
    if config_path == "begun":
        Run.create(root, name, {}, {})
    raise InputError("the tokenizer has changed")


@pytest.mark.parametrize("begun", [True, False])
def test_a_ticks_last_word(tmp_path: Path, begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.run.runner.run_rounds", damaged)
    state = tick("begun" if begun else "", "nightly", str(tmp_path), 1, [])
    assert state.name == "Refused" and "the schedule ends here" in state.message
    assert state.message.startswith("tick failed: the tokenizer has changed")
    assert (f"{KEPT}" in state.message and "opd resume nightly --root" in state.message) == begun
