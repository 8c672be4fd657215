"""A call that finds everything in the store: it starts no Prefect, writes the state at its end alone, and prints one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import scripted_run
from scripted_run import NAME
from stopping import PATIENCE, StoppedRun

from storage.disk import failpoints
from storage.runs import Run

NO_SERVER = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
"""A call that would report to Prefect warns that nothing answers there."""
WARNING = "running without Prefect"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StoppedRun:
    folder = tmp_path_factory.mktemp("finished")
    run = StoppedRun.of(scripted_run.prepare_root(folder / "template" / "store"), folder / "run", rounds=2)
    run.write(None)
    assert called(run, "run")[0] == 0
    return run


def called(run: StoppedRun, command: str, *more: str, prefect: bool = False) -> tuple[int, str]:
    """Exit code and output of `opd run` or `opd resume`."""
    before = len(run.output)
    what = str(run.folder / "config.yaml") if command == "run" else NAME
    more = (*more, "--name", NAME) if command == "run" else more
    more = more if prefect else (*more, "--no-prefect")
    environment = NO_SERVER | {failpoints.LOG: str(run.folder / "hits")}
    process = run.opd(command, what, *more, **environment)
    process.join(PATIENCE)
    return run.ended(process), run.output[before:]


def saves(run: StoppedRun) -> int:
    return run.hits().count("run.before_save")


@pytest.mark.parametrize("command", ["run", "resume"])
def test_one_line_and_no_prefect(finished: StoppedRun, command: str) -> None:
    before, state, count = finished.result(), Run.open(finished.root, NAME).state, saves(finished)
    code, output = called(finished, command, prefect=True)
    assert code == 0 and WARNING not in output
    assert "nothing to do: rounds 0 to 2 of 'trial' are in the store" in output
    assert "rollout " not in output.split("seconds per stage")[0], "no line of a stage before the report"
    after = Run.open(finished.root, NAME).state
    assert (after.rounds, after.status) == (state.rounds, "finished") and finished.result() == before
    assert saves(finished) - count == 1, "as finished: where such a call is killed, the run is finished still"


def test_one_that_is_interrupted_leaves_the_run_finished(finished: StoppedRun) -> None:
    before = len(finished.output)
    armed = NO_SERVER | {failpoints.SPEC: "run.before_save=raise:KeyboardInterrupt@1"}
    process = finished.opd("resume", NAME, "--no-prefect", **armed)
    process.join(PATIENCE)
    assert finished.ended(process) != 0, finished.output[before:]
    assert Run.open(finished.root, NAME).state.status == "finished"


def test_a_damaged_artifact_is_work(finished: StoppedRun) -> None:
    before = finished.result()
    key = Run.open(finished.root, NAME).state.rounds[1].stages["rollout"].artifacts["rollout"]
    shard = next(path for path in (finished.root / "artifacts" / "rollout" / key).glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, output = called(finished, "resume", "-v", prefect=True)
    assert code == 0 and WARNING in output and "nothing to do" not in output
    assert "round 1 rollout         done" in output
    lines = output.splitlines()
    assert sum(line.startswith("round 2") for line in lines) == 1, "its stages are in the store: one line"
    assert finished.result() == before


def test_another_round_is_work(finished: StoppedRun) -> None:
    code, output = called(finished, "resume", "-v", "--set", "policy.rounds=3", prefect=True)
    assert code == 0 and WARNING in output and "round 3 train           done" in output


def test_a_manifest_that_is_gone_is_work(finished: StoppedRun, tmp_path: Path) -> None:
    key = Run.open(finished.root, NAME).state.rounds[2].stages["evaluate"].artifacts["evaluate"]
    (finished.root / "artifacts" / "evaluate" / key / "manifest.json").rename(tmp_path / "manifest.json")
    code, output = called(finished, "resume", "-v", prefect=True)
    assert code == 0 and "round 2 evaluate        done" in output
