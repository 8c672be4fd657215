"""Two processes never build one thing twice, nor share a run (row 6). Racers are real processes of the real command line,
forked from a warm one so that they meet within milliseconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import in_process
import pytest
from fault_trials import Trials, both_forms
from scripted_run import NAME, experiment, find_engines, prepare_root
from small_store import SHARDS, SPEC, rows

from flows.experiment import with_plugins
from storage.disk import failpoints
from storage.runs import Run
from storage.store import Store

RACERS = 8
PATIENCE = 60.0
PROMPT = 30.0
"""Seconds within which a loser must have ended."""


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited too long: {what}"
        time.sleep(0.005)


@dataclass
class Racer:
    """One process that waits for the start and then does `work(root, folder)`; what it says is in files of `folder`."""

    folder: Path
    process: Any

    @classmethod
    def ready(cls, work: Any, root: Path, folder: Path, go: Path, spec: str = "") -> Racer:
        folder.mkdir(parents=True)
        return cls(folder, forked.start(_race, work, root, folder, go, spec, output=folder / "output"))

    def is_ready(self) -> bool:
        return (self.folder / "ready").exists()

    def code(self) -> int:
        return forked.exit_code(self.process)

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def seconds(self) -> float:
        """From the start of the race to its end."""
        return float((self.folder / "seconds").read_text())


def _race(work: Any, root: Path, folder: Path, go: Path, spec: str) -> None:
    find_engines()
    os.environ[failpoints.SPEC] = spec
    failpoints.arm()
    (folder / "ready").touch()
    while not go.exists():
        time.sleep(0.001)
    started = time.monotonic()
    try:
        work(root, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "seconds").write_text(str(time.monotonic() - started))


# --- a run -----------------------------------------------------------------------------------------------------------


def resume(root: Path, folder: Path) -> None:
    """`opd resume trial`."""
    from flows.cli.app import main

    sys.argv = ["opd", "resume", NAME, "--no-prefect", "--root", str(root)]
    main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing left to do, so that the winner ends as soon as the others have."""
    root = prepare_root(tmp_path_factory.mktemp("finished") / "store")
    in_process.run(root, rounds=1)
    with Run.open(root, NAME).lock():
        Run.open(root, NAME).save_experiment(with_plugins(experiment(1)).model_dump(mode="json"))
    return root


@both_forms(short=1, full=50)
def test_of_racers_on_a_run_one_wins(finished: Path, trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        folder = tmp_path / name
        root, go, end = folder / "store", folder / "go", folder / "end"
        shutil.copytree(finished, root)
        spec = f"run.before_save=wait:{end}"  # the winner holds the run until all others have ended
        racers = [Racer.ready(resume, root, folder / str(number), go, spec) for number in range(RACERS)]
        until(lambda: all(racer.is_ready() for racer in racers), "the racers' start")
        go.touch()
        until(lambda: sum(racer.process.exitcode is not None for racer in racers) >= RACERS - 1, "the losers' end")
        (winner,) = [racer for racer in racers if racer.process.exitcode is None]
        held = Run.open(root, NAME).holder_info()
        end.touch()
        assert winner.code() == 0, winner.output()
        assert held is not None and held.pid == winner.process.pid
        for loser in racers:
            if loser is not winner:
                assert loser.code() == 75, loser.output()
                assert f"held by pid {winner.process.pid} on " in loser.output()
                assert loser.seconds() < PROMPT
        assert Run.open(root, NAME).holder() is None
        shutil.rmtree(folder)

    trials(6, "8 racers on a run: one wins, 7 exit 75 within 2 s naming it", map(str, range(count)), attempt)


@both_forms(short=1, full=20)
def test_a_killed_holder_holds_no_run(finished: Path, trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        folder = tmp_path / name
        root, go = folder / "store", folder / "go"
        go.parent.mkdir()
        go.touch()
        shutil.copytree(finished, root)
        holder = Racer.ready(resume, root, folder / "holder", go, f"run.before_save=wait:{folder / 'never'}")
        until(lambda: Run.open(root, NAME).holder_info(), "the holder")
        refused = Racer.ready(resume, root, folder / "refused", go)
        assert refused.code() == 75
        os.kill(holder.process.pid, signal.SIGKILL)
        assert holder.code() == -9
        next_one = Racer.ready(resume, root, folder / "next", go)
        assert next_one.code() == 0, next_one.output()
        assert next_one.seconds() < PROMPT * 5
        shutil.rmtree(folder)

    trials(6, "the holder of a run killed: the next one has it at once", map(str, range(count)), attempt)


# --- an artifact -----------------------------------------------------------------------------------------------------


def build(root: Path, folder: Path) -> None:
    """Builds the small table, slowly enough that the others must wait, and says what it did."""
    waited: list[str] = []
    written = []
    store = Store(root)
    with store.building(SPEC, waited.append) as builder:
        for shard in builder.missing("mask", SHARDS):
            time.sleep(0.02)
            store.shard_writer(SPEC.stage, SPEC.key).write_shard("mask", shard, rows(shard))
            written.append(shard)
        artifact = builder.commit(tables={"mask": SHARDS})
    said = {
        "written": written,
        "waited": waited,
        "content": artifact.content,
        "rows": len(store.read_table(artifact, "mask")),
    }
    (folder / "said").write_text(json.dumps(said))


@both_forms(short=1, full=50)
def test_of_racers_on_an_artifact_one_builds(trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        folder = tmp_path / name
        root, go = folder / "store", folder / "go"
        Store(root)
        racers = [Racer.ready(build, root, folder / str(number), go) for number in range(RACERS)]
        until(lambda: all(racer.is_ready() for racer in racers), "the racers' start")
        go.touch()
        assert [racer.code() for racer in racers] == [0] * RACERS, [racer.output() for racer in racers]
        said = [json.loads((racer.folder / "said").read_text()) for racer in racers]
        assert sorted(len(one["written"]) for one in said) == [0] * (RACERS - 1) + [SHARDS]
        assert all(len(one["waited"]) <= 1 for one in said)  # told once
        assert len({json.dumps(one["content"]) for one in said}) == 1
        assert {one["rows"] for one in said} == {40 * SHARDS}
        assert len(list(root.glob("artifacts/mask/*/*.parquet"))) == SHARDS
        shutil.rmtree(folder)

    trials(6, "8 racers on an artifact: one builds, the others reuse", map(str, range(count)), attempt)


@both_forms(short=1, full=20)
def test_a_killed_builder_is_followed_by_one_that_waits(trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        folder = tmp_path / name
        root, go = folder / "store", folder / "go"
        go.parent.mkdir()
        go.touch()
        Store(root)
        killed = 1 + int(name) % SHARDS
        first = Racer.ready(
            build, root, folder / "first", go, f"shard.after_sidecar=wait:{folder / 'now'}+kill@{killed}"
        )
        until(lambda: len(list(root.glob("artifacts/mask/*/*.sidecar.json"))) == killed, "the first shards")
        waiting = [Racer.ready(build, root, folder / str(number), go) for number in range(3)]
        until(lambda: all(racer.is_ready() for racer in waiting), "those who wait")
        time.sleep(0.2)
        (folder / "now").touch()
        assert first.code() == -9
        assert [racer.code() for racer in waiting] == [0, 0, 0], [racer.output() for racer in waiting]
        said = [json.loads((racer.folder / "said").read_text()) for racer in waiting]
        assert sorted(shard for one in said for shard in one["written"]) == list(range(killed, SHARDS))
        assert all(f"pid {first.process.pid} on " in one["waited"][0] for one in said if one["waited"])
        shutil.rmtree(folder)

    trials(6, "a builder killed: one who waits goes on with the rest", map(str, range(count)), attempt)
