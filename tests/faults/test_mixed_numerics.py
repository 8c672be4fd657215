"""A stage that was killed and went on with another runtime (row 13): its shards are kept, the manifest says which were made at
which numerics, and a replay says that it cannot repeat them; every other stage replays at its own numerics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import CHECKOUT, PLUGINS
from prefect_faults import ReportedRun
from scripted_run import EXPERIMENT, NAME
from stopping import PATIENCE

from storage.disk.failpoints import LOG
from storage.runs import Run
from storage.store import Store

KILLED = {"rollout": (6, {"rollout"}), "supervise": (9, {"mask", "sampled"}), "evaluate": (17, {"evaluate"})}
"""Stage of round 1 -> (shard, counted over the run with the intermediate ones, after which everything is killed; the artifacts
that have one by then)."""


class Resumed(ReportedRun):
    def write(self, role: str | None = None) -> None:
        (self.folder / "config.yaml").write_text(json.dumps(EXPERIMENT | {"policy": {"rounds": 1}}))

    def replay(self) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, results and errors of replaying all stages of the round."""
        command = [
            sys.executable,
            "-m",
            "flows.cli.app",
            "replay",
            NAME,
            "--round",
            "1",
            "--json",
            "--root",
            str(self.root),
        ]
        ended = subprocess.run(
            [*command, "--stages", "rollout,supervise,train,evaluate"], capture_output=True, text=True, cwd=self.folder,
            env={"PATH": "", "PYTHONPATH": f"{CHECKOUT}:{PLUGINS}", "HOME": str(self.folder)}, timeout=PATIENCE,
        )  # fmt: skip
        return ended.returncode, json.loads(ended.stdout), ended.stderr


@pytest.mark.promise(13, "a stage begun and finished at different numerics: recorded, and told apart")
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "supervise" else pytest.mark.slow) for stage in KILLED]
)
def test_shards_of_two_runtimes(template: Path, tmp_path: Path, stage: str) -> None:
    shard, mixed = KILLED[stage]
    run = Resumed.of(template, tmp_path / "run", rounds=1)
    run.write()
    more = {"OPD_FAILPOINTS": f"shard.after_sidecar=killtree@{shard}", LOG: str(run.folder / "hits")}
    process = run.begin(**more)
    process.join(PATIENCE)
    assert process.exitcode == -9, run.output
    assert Run.open(run.root, NAME).state.rounds[-1].stages[stage].state == "running"
    process = run.opd("resume", NAME, "--no-prefect", "--set", "runtime.threads=2")
    process.join(PATIENCE)
    assert process.exitcode == 0, run.output
    assert "made with other settings (threads 1, 2)" in run.output
    assert not list(run.root.glob("artifacts/*/*/*made-at*"))

    store, (first, second) = Store(run.root), ({"threads": 1}, {"threads": 2})
    keys = Run.open(run.root, NAME).state.rounds[-1].stages[stage].artifacts
    for name, key in keys.items():
        artifact = store.get(name, key)
        assert artifact is not None
        groups = artifact.provenance.get("numerics_by_shard")
        assert (groups is not None) == (name in mixed), name
        if groups is not None:
            assert [group["shards"] for group in groups] == [[0], [1]]
            told = [{"threads": group["numerics"]["threads"]} for group in groups]
            assert told == [first, second] and "numerics" not in artifact.provenance

    code, results, errors = run.replay()
    assert code == 1
    for result in results:
        if result["artifact"].split("/")[0] in mixed and result["stage"] == stage:
            assert (
                result["identical"] is None and result["unrepeatable"] == "shards 0 at threads 1; shards 1 at threads 2"
            )
            assert f"{result['artifact']}: {result['unrepeatable']}" in " ".join(errors.split())
        else:
            assert result["identical"] is True, result
    assert "cannot be replayed" in errors and "was not reproduced" not in errors
