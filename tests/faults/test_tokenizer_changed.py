"""A tokenizer that changes in mid-run is refused (row 8): the run stops with the file's name, or ends as if nothing had happened
because no stage read it any more; with the old file back it goes on to the undisturbed result."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from fault_trials import Trials, both_forms
from prefect_faults import ReportedRun
from scripted_run import EXPERIMENT, NAME
from stopping import PATIENCE
from two_tokenizers import model

from storage.runs import Run

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
STAGES = ("shard.", "manifest.", "builder.", "tree.")


class CheckpointRun(ReportedRun):
    """A run whose models are folders of the user's, which lie beside the store."""

    def write(self, role: str | None) -> None:
        models = {who: {"source": {"kind": "checkpoint", "path": str(self.folder / who)}} for who in WHO}
        prompts = EXPERIMENT["prompts"] | {"max_prompt_length": 64}
        experiment = EXPERIMENT | models | {"prompts": prompts, "policy": {"rounds": self.rounds}}
        (self.folder / "config.yaml").write_text(json.dumps(experiment))

    def opd(self, *arguments: str, **environment: str) -> Any:
        # torch, which tokenizers bring along, makes its cache in the folder for temporary files
        return super().opd(*arguments, TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"), **environment)

    def resume(self, *more: str) -> int:
        process = self.opd("resume", NAME, "--no-prefect", *more)
        process.join(PATIENCE)
        assert process.exitcode is not None, self.output
        return process.exitcode


WHO = ("student", "teacher")


class World:
    """Two checkpoints, and a store in which their prompts are prepared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "store").mkdir(parents=True)
        for who in WHO:
            model(folder / who, teacher=False)
        whole = self.run(folder / "whole")
        process = whole.begin()
        process.join(PATIENCE)
        assert process.exitcode == 0, whole.output
        self.result = self.outcome(whole)
        shutil.copytree(whole.root / "artifacts" / "prepare", folder / "store" / "artifacts" / "prepare")

    @cached_property
    def moments(self) -> list[str]:
        """Those of a run that finds its prompts prepared, from when both models are recorded."""
        run = self.run(self.folder / "moments")
        process = run.begin(OPD_FAILPOINTS_LOG=str(run.folder / "hits"))
        process.join(PATIENCE)
        assert process.exitcode == 0, run.output
        seen: Counter[str] = Counter()
        found = []
        for name in run.hits():
            if seen["manifest.after_sync"] >= len(WHO) and name.startswith(STAGES):
                found.append(f"{name}@{seen[name] + 1}")
            seen[name] += 1
        return found

    def run(self, folder: Path) -> CheckpointRun:
        run = CheckpointRun.of(self.folder / "store", folder)
        for who in WHO:
            shutil.copytree(self.folder / who, folder / who)
        run.write(None)
        return run

    @staticmethod
    def outcome(run: CheckpointRun) -> dict:
        """But for keys of `model`, in which the folder's place is."""
        found = run.result()
        found["contents"] = {name: digests for name, digests in found["contents"].items() if "model/" not in name}
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tokenizers") / "world")


def change(path: Path, name: str) -> bytes:
    """Another tokenizer that loads just as well: two ids exchanged, another end, another template. Returns the old file."""
    before = path.read_bytes()
    data = before.decode()
    if path.name == "tokenizer.json":
        content = json.loads(data)
        vocabulary = content["model"]["vocab"]
        one, other = random.Random(name).sample(sorted(vocabulary), 2)
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        data = json.dumps(content)
    else:
        data = data.replace("<|end|>", "<|pad|>")
    assert data.encode() != before
    path.write_text(data)
    return before


def refused(run: CheckpointRun, path: Path, code: int) -> None:
    assert code not in (0, None), run.output
    assert str(path) in run.output and "Traceback" not in run.output, run.output
    assert Run.open(run.root, NAME).state.status == "failed"
    assert run.leftovers() == [] and run.orphans() == []


@both_forms(short=1, full=60)
def test_changed_at_a_random_moment(world: World, trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        who, file, _ = name.split()
        run = world.run(tmp_path / name.replace(" ", "-"))
        moment = "shard.after_rename@2" if count == 1 else random.Random(name).choice(world.moments)
        process = run.begin_until(moment, prefect=False)
        path = run.folder / who / file
        before = change(path, name)
        run.go_on()
        process.join(PATIENCE)
        assert process.exitcode is not None, run.output
        if process.exitcode != 0:
            refused(run, path, process.exitcode)
            assert count == 1 or run.resume() != 0  # no way round it
            path.write_bytes(before)
            assert run.resume() == 0, run.output
        else:
            assert count > 1  # nothing was left to be read: of the student after round 1, of the teacher at the end
            path.write_bytes(before)  # the folder itself must verify again
        assert world.outcome(run) == world.result
        run.remove()

    names = [f"{who} {file} {number}" for number in range(10) for file in FILES for who in reversed(WHO)]
    trials(8, "a checkpoint's tokenizer is changed at a random moment of the run", names[:count], attempt)


@both_forms(short=1, full=30)
def test_changed_between_run_and_resume(world: World, trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        who, file, _ = name.split()
        run = world.run(tmp_path / name.replace(" ", "-"))
        process = run.begin("--set", "policy.rounds=1")
        process.join(PATIENCE)
        assert process.exitcode == 0, run.output
        path = run.folder / who / file
        before = change(path, name)
        for _ in range(min(count, 2)):
            refused(run, path, run.resume("--set", "policy.rounds=2"))
        path.write_bytes(before)
        assert run.resume("--set", "policy.rounds=2") == 0, run.output
        assert world.outcome(run) == world.result
        run.remove()

    names = [f"{who} {file} {number}" for number in range(5) for file in FILES for who in WHO]
    trials(8, "a checkpoint's tokenizer is changed between run and resume", names[:count], attempt)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_changed_in_the_store(world: World, trials: Trials, tmp_path: Path) -> None:
    """The students of the rounds bring theirs along: a changed one is damage, and is made again."""

    def attempt(name: str) -> None:
        run = world.run(tmp_path / name.replace(" ", "-"))
        process = run.begin("--set", "policy.rounds=1")
        process.join(PATIENCE)
        assert process.exitcode == 0, run.output
        (path,) = run.root.glob("artifacts/student/*/model-*/tokenizer.json")
        change(path, name)
        code = run.resume("--set", "policy.rounds=2")
        assert code == 0 or (str(path) in run.output and run.resume("--set", "policy.rounds=2") == 0), run.output
        assert world.outcome(run) == world.result
        assert any((run.root / "quarantine").iterdir())
        run.remove()

    trials(8, "the tokenizer of a student in the store is changed", [f"store {n}" for n in range(10)], attempt)
