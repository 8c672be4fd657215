"""A full disk is a clean stop that can be resumed (row 11): a clear error, committed data intact, and after space is freed
the undisturbed result. The disk is a small tmpfs of the process's own; where the kernel refuses one, ENOSPC is raised at
failpoints of the same run instead, and the fault's name says so."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import forked
import in_process
import pytest
import small_disk
from fault_trials import Trials, both_forms
from full_disk import BETWEEN, FREED, SERVER, START, fill, measure
from places import PLUGINS
from scripted_run import NAME, ROUNDS, Trial, experiment

from flows.run.runner import bytes_per_round, refuse_full_disk
from storage.errors import NotEnoughSpace
from storage.store import Store
from tasks.inputs.models import CheckpointModel
from tasks.trainer import dispatch

ROUND = ("rollout", "supervise", "train", "evaluate")
STAGES = ("0 evaluate", *(f"{number} {stage}" for number in range(1, ROUNDS + 1) for stage in ROUND))
"""All that write: the models and prompts are there."""
SHARES = (0, 20, 40, 60, 80, 95)
FIRST = ("1 train at 60 %", "2 supervise at 40 %")
FULL = [
    *FIRST,
    *(name for stage in (START, *STAGES) for share in SHARES if (name := f"{stage} at {share} %") not in FIRST),
    *(f"{number} train, refused by its estimate" for number in range(1, ROUNDS + 1)),
]


class Undisturbed:
    def __init__(self, template: Path, folder: Path) -> None:
        self.template = template
        trial = Trial.of(template, folder / "run")
        assert trial.run(log=True) == 0, trial.output
        self.result, self.hits = trial.result(), Counter(trial.hits())
        trial.temporary.rmdir()
        self.mounted, self.growth = small_disk.possible(folder / "probe"), dict[str, int]()
        if self.mounted:
            output = folder / "output"
            assert forked.exit_code(forked.start(measure, template, folder, output=output)) == 0, output.read_text()
            self.growth = json.loads((folder / "growth.json").read_text())
            assert [stage for stage, pages in self.growth.items() if pages > 0 and stage != BETWEEN] == [START, *STAGES]


@pytest.fixture(scope="module")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(template, tmp_path_factory.mktemp("roomy"))


def moment(name: str, growth: dict[str, int]) -> dict[str, Any]:
    """When the trial's disk fills up: the stage that it is named for has so much of what it needs. A training would be
    refused by its estimate, which is larger: another program takes the space just after it was found to do."""
    if name.endswith("estimate"):
        stage = name.partition(",")[0]
        return {"full": stage, "share": 0.6, "growth": growth[stage]}
    stage, _, percent = name.partition(" at ")
    share = int(percent.removesuffix(" %")) / 100
    return {"full": stage, "share": share, "growth": growth[stage], "late": stage.endswith("train")}


def stopped_and_resumed(undisturbed: Undisturbed, folder: Path, where: dict[str, Any], **more: Any) -> str:
    """The stage that met the full disk stopped cleanly; what was committed is kept, and the end is the undisturbed one.
    Returns what was said."""
    folder.mkdir()
    process = forked.start(partial(fill, **more), undisturbed.template, folder, where, output=folder / "output")
    code = forked.exit_code(process)
    output = (folder / "output").read_text()
    assert code == 0, f"{where}: exit {code}\n{output}"
    said = json.loads((folder / "said.json").read_text())
    assert said["error"] is not None, f"{where} was enough"
    check_error(said["error"] + output)
    assert said["damaged"] == []
    contents = undisturbed.result["contents"]
    assert all(contents[key] == content for key, content in said["committed"].items())
    assert said["result"] == json.loads(json.dumps(undisturbed.result))
    assert (said["leftovers"], said["processes"]) == ([], [])
    assert "warning" not in output.partition(FREED)[2], output  # Prefect has a record again
    if where["full"] in undisturbed.growth:
        assert said["stage"] == where["full"]
    shutil.rmtree(folder)
    return f"{said['error']}\n{output}"


@both_forms(short=2, full=len(FULL))
def test_a_disk_that_fills_up(undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        said = stopped_and_resumed(undisturbed, tmp_path / name, moment(name, undisturbed.growth))
        assert ("needed for train" in said) == name.endswith("estimate"), said

    def without_mount(name: str) -> None:
        full_at(undisturbed, tmp_path / name, name)

    mounted = undisturbed.mounted
    how = "a tmpfs fills up in every stage" if mounted else "ENOSPC at failpoints (no tmpfs may be mounted here)"
    trials(11, how, FULL[:count], attempt if mounted else without_mount, parallel=2)


WITH_PREFECT = [
    "1 train at 60 %",
    "0 evaluate at 0 %",
    "1 rollout at 40 %",
    "2 supervise at 80 %",
    "2 evaluate at 20 %",
]


@both_forms(short=1, full=len(WITH_PREFECT) + 1)
def test_prefects_database_is_on_the_disk_that_fills_up(
    undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int, migrated: Path
) -> None:
    """As every run without `--no-prefect` has it: the store's own server, with its database beside the artifacts."""

    def attempt(name: str) -> None:
        if name == SERVER:  # it cannot make its database; the run goes on without it, to the next stage
            said = stopped_and_resumed(undisturbed, tmp_path / name, {"full": SERVER}, prefect=True)
            assert "running without Prefect" in said, said
        else:
            where = moment(name, undisturbed.growth)
            stopped_and_resumed(undisturbed, tmp_path / name, where, prefect=True, home=migrated)

    def without_mount(name: str) -> None:
        full_at(undisturbed, tmp_path / name, f"Prefect {name}")

    names = [*WITH_PREFECT, SERVER][:count]
    how = "the same with Prefect's database on it" if undisturbed.mounted else "ENOSPC at failpoints, more of them"
    trials(11, how, names, attempt if undisturbed.mounted else without_mount)


@both_forms(short=1, full=60)
def test_a_write_that_fails_anywhere(undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int) -> None:
    trials(
        11,
        "ENOSPC at failpoints of a whole run",
        [f"at {number}" for number in range(count)],
        lambda name: full_at(undisturbed, tmp_path / name, name),
        parallel=2,
    )


def full_at(undisturbed: Undisturbed, folder: Path, name: str) -> None:
    """One write of the run, whichever, finds the disk full."""
    draw = random.Random(f"full {name}")
    point = draw.choice(["shard.before_rename", "file.before_fsync", "file.before_replace", "manifest.before_link",
                         "tree.before_fsync", "tree.before_rename"])  # fmt: skip
    trial = Trial.of(undisturbed.template, folder)
    hit = draw.randint(1, undisturbed.hits[point])
    assert trial.run(f"{point}=raise:OSError(ENOSPC)@{hit}") == 1
    check_error(trial.output)
    assert trial.run() == 0, trial.output
    assert trial.result() == undisturbed.result
    assert trial.leftovers() == []
    trial.remove()


def check_error(text: str) -> None:
    """Says what happened, what was kept and what to do; no traceback."""
    assert "the disk is full" in text or "needed for" in text, text
    assert "ree space" in text or "Free some space" in text, text
    assert "Traceback" not in text


@pytest.mark.promise(11, "space is estimated before a run starts")
def test_space_is_estimated_before_a_run_starts(tmp_path: Path, template: Path) -> None:
    """A round that would not fit is refused before an engine starts."""
    from flows.run.runner import run_experiment

    root = tmp_path / "store"
    shutil.copytree(template, root)
    e = experiment(ROUNDS)
    huge = e.model_copy(update={"rollout": e.rollout.model_copy(update={"max_completion_length": 10**15})})
    sys.path.insert(0, str(PLUGINS))
    with pytest.raises(NotEnoughSpace, match=r"needed for one round, .* free"):
        run_experiment(huge, name=NAME, root=root, prefect=False)
    (log,) = (root / "runs" / NAME / "logs").iterdir()  # the run's own, with the reason; no worker has one
    assert log.name == "run.log" and "needed for one round" in log.read_text()


def test_a_students_training_counts_before_the_run_and_before_its_stage(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bytes of the student, 12 of the state, three times 12 of checkpoints: 52 per float32 parameter; and the files of the
    round's tokens, which the trainer maps."""
    store = Store(template)
    folder = store.materialize(store.list("model")[0])
    e = experiment(ROUNDS)
    round_bytes = bytes_per_round(e)
    asked: list[int] = []
    monkeypatch.setattr(Store, "require_space", lambda self, needed, purpose="": asked.append(needed))
    refuse_full_disk(store, e)
    own = e.student.model_copy(update={"source": CheckpointModel(path=folder)})
    refuse_full_disk(store, e.model_copy(update={"student": own}))
    assert asked == [round_bytes, round_bytes + 52 * 2048]
    shutil.copytree(template, tmp_path / "store")
    tokens: list[int] = []
    mapped = dispatch.round_bytes
    monkeypatch.setattr(dispatch, "round_bytes", lambda *given: tokens.append(mapped(*given)) or tokens[-1])
    in_process.run(tmp_path / "store", rounds=1)
    assert tokens[-1] > 0 and asked[-1] == 52 * 2048 + tokens[-1]
