"""A plugin that is edited in mid-run, or between run and resume, is refused (row 12): nothing is made with it under the run's old
name, and with the old file back the run ends undisturbed. A new name, or a fork, makes exactly what depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect_faults import ReportedRun
from scripted_run import EXPERIMENT, NAME, OWN_PLUGINS
from stopping import PATIENCE

from storage.runs import Run

SCORER = """
import numpy as np
import scripted_engines
from tasks.workers.jobs import register_role

register_role("scorer", f"{__name__}:Scorer")


class Scorer(scripted_engines.Scorer):
    def top(self, models, rollouts, k):
        tail = [np.full(n, -30.0, np.float32) for _, n in self.samples(rollouts)]
        return super().top(models, rollouts, k) | {f"teacher_top{k}_tail": tail}
"""
EDITED = SCORER.replace("-30.0", "-29.0")
SIGNALS = {"sampled", "mask", "teacher_topk"}


class PluginRun(ReportedRun):
    """A run whose scorer is a plugin beside the store."""

    @property
    def plugin(self) -> Path:
        return self.folder / "own_scorer.py"

    def write(self, role: str | None = None) -> None:
        experiment = EXPERIMENT | {"plugins": ["scripted_engines", "own_scorer"], "policy": {"rounds": self.rounds}}
        (self.folder / "config.yaml").write_text(json.dumps(experiment))
        self.plugin.write_text(SCORER)

    def opd(self, *arguments: str, **environment: str) -> Any:
        return super().opd(*arguments, **environment, **{OWN_PLUGINS: str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"})

    def call(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a command."""
        before = len(self.output)
        process = self.opd(*arguments)
        process.join(PATIENCE)
        assert process.exitcode is not None, self.output
        return process.exitcode, self.output[before:]

    def keys(self, name: str) -> dict[tuple[int, str], dict[str, str]]:
        rounds = Run.open(self.root, name).state.rounds
        return {(r.round, label): stage.artifacts for r in rounds for label, stage in r.stages.items()}


@pytest.fixture
def run(template: Path, tmp_path: Path) -> PluginRun:
    run = PluginRun.of(template, tmp_path / "run")
    run.write()
    return run


@pytest.mark.promise(12, "a plugin edited between run and resume, and in mid-run: refused")
def test_an_edited_plugin_is_refused_until_it_is_put_back(run: PluginRun, template: Path, tmp_path: Path) -> None:
    whole = PluginRun.of(template, tmp_path / "whole")
    whole.write()
    assert whole.call("run", str(whole.folder / "config.yaml"), "--name", NAME, "--no-prefect")[0] == 0

    # the worker that would score is started after the edit: the process that computes keys still knows the old one
    process = run.begin_until("shard.before_write@1", prefect=False)
    run.plugin.write_text(EDITED)
    run.go_on()
    process.join(PATIENCE)
    assert process.exitcode == 2, run.output
    refused = [f"the plugin 'own_scorer' ({run.plugin}) has changed", f"opd resume {NAME}"]
    assert all(text in run.output for text in refused), run.output
    made = {
        path.parent.name for path in run.root.glob("artifacts/*/*/manifest.json") if path.parent.parent.name in SIGNALS
    }
    assert made == set()

    for command in (("resume", NAME), ("run", str(run.folder / "config.yaml"), "--name", NAME)):
        code, output = run.call(*command, "--no-prefect")
        assert code == 2 and all(text in output for text in refused), output
    run.plugin.write_text(SCORER)
    assert run.call("resume", NAME, "--no-prefect")[0] == 0, run.output
    assert run.result() == whole.result()


@pytest.mark.promise(12, "a plugin edited, under a new name and in a fork: what depends on it")
def test_a_new_name_or_a_fork_makes_what_depends_on_the_edited_plugin(run: PluginRun) -> None:
    config = str(run.folder / "config.yaml")
    assert run.call("run", config, "--name", NAME, "--no-prefect")[0] == 0, run.output
    run.plugin.write_text(EDITED)

    code, output = run.call("run", config, "--name", "new", "--dry-run", "--json")
    plan = {(line["round"], line["stage"]): line["state"] for line in json.loads(output)["plan"]}
    assert (
        code == 0 and plan[1, "rollout"] == "cached" and plan[1, "supervise"] == "run" and plan[0, "evaluate"] == "run"
    )

    assert run.call("fork", f"{NAME}@1", "--name", "forked", "--no-prefect")[0] == 0, run.output
    assert run.call("run", config, "--name", "new", "--no-prefect")[0] == 0, run.output
    old, forked, new = (run.keys(name) for name in (NAME, "forked", "new"))
    assert {place for place in old if forked[place] != old[place]} == {(2, "supervise"), (2, "train"), (2, "evaluate")}
    assert new[1, "rollout"] == old[1, "rollout"]
    for place in ((0, "evaluate"), (1, "supervise"), (1, "train"), (2, "supervise")):
        assert not set(new[place].values()) & set(old[place].values()), place
    # what a fork shares is made with the plugin as it was, or not at all
    for path in run.root.glob(f"artifacts/teacher_topk/{old[1, 'supervise']['teacher_topk']}/*.parquet"):
        path.unlink()
    assert run.call("verify", "forked")[0] == 1
    code, output = run.call("resume", "forked", "--no-prefect")
    assert code == 2 and f"({run.plugin}) has changed, but teacher_topk/" in output, output
    run.plugin.write_text(SCORER)
    assert run.call("resume", NAME, "--no-prefect")[0] == 0, run.output
