"""What the command line as a whole offers: versions, completion."""

from __future__ import annotations

import importlib.metadata

import pytest
from typer.testing import CliRunner

from flows.cli.app import LIBRARIES, make_app


def test_versions_are_those_that_are_installed() -> None:
    lines = dict(line.split() for line in CliRunner().invoke(make_app(), ["version"]).stdout.splitlines())
    installed = {line for line in LIBRARIES if line in {d.name.lower() for d in importlib.metadata.distributions()}}
    assert lines.keys() == {"opdflow", "python", *installed} and {"torch", "prefect", "duckdb"} <= installed
    assert lines["prefect"] == importlib.metadata.version("prefect")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, f"/bin/{shell}"))
    shown = CliRunner().invoke(make_app(), ["--show-completion"], prog_name="opd")
    assert shown.exit_code == 0 and "_OPD_COMPLETE" in shown.stdout
    answer = CliRunner().invoke(
        make_app(),
        prog_name="opd",
        env={"_OPD_COMPLETE": "complete_bash", "COMP_WORDS": "opd dep", "COMP_CWORD": "1"},
    )
    assert answer.stdout.split() == ["deploy"]
