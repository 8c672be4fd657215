"""A full disk is a clean stop that can be resumed (row 11): a clear error, committed data intact, and after space is freed
the undisturbed result. The disk is a small tmpfs of the process's own; where the kernel refuses one, ENOSPC is raised at
failpoints of the same run instead, and the fault's name says so."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import in_process
import pytest
import small_disk
from fault_trials import Trials, both_forms
from scripted_run import NAME, PLUGINS, ROUNDS, Trial, experiment, find_engines

from flows.runner import bytes_per_round, refuse_full_disk
from storage.errors import NotEnoughSpace
from storage.runs import Run
from storage.store import Store
from tasks.models import CheckpointModel

LARGE = 1 << 30


class Undisturbed:
    def __init__(self, template: Path, folder: Path) -> None:
        self.template = template
        trial = Trial.of(template, folder)
        assert trial.run(log=True) == 0, trial.output
        self.result, self.hits = trial.result(), Counter(trial.hits())
        trial.temporary.rmdir()
        self.growth = pages(trial.root) - pages(template)


def pages(root: Path) -> int:
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    return sum(-(-size // small_disk.PAGE) * small_disk.PAGE for size in sizes)


@pytest.fixture(scope="module")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(template, tmp_path_factory.mktemp("roomy") / "run")


def fill(template: Path, folder: Path, free: int) -> None:
    """In a process of its own: a run on a disk with so many bytes free; then with enough. Writes down what happened."""
    disk = folder / "disk"
    small_disk.mount(disk, LARGE)
    root = disk / "store"
    shutil.copytree(template, root)
    small_disk.resize(disk, small_disk.used(disk) + free)
    find_engines()
    said: dict[str, Any] = {"error": None}
    try:
        go(root)
    except NotEnoughSpace as error:
        said["error"] = str(error)
    store = Store(root) if said["error"] is None else roomy(disk, root)
    said["damaged"] = [problem for artifact in store.list() for problem in store.verify(artifact, move=False)]
    said["committed"] = {f"{a.stage}/{a.key}": a.content for a in store.list()}
    said["stage"] = stage_of(root)
    go(root)
    said["result"] = Trial(disk, folder / "none").result()
    said["leftovers"] = [str(path) for path in root.rglob(".tmp-*")]
    (folder / "said.json").write_text(json.dumps(said))


def roomy(disk: Path, root: Path) -> Store:
    small_disk.resize(disk, LARGE)
    return Store(root)


def go(root: Path) -> None:
    from flows.runner import run_experiment

    run_experiment(experiment(), name=NAME, root=root, prefect=False)


def stage_of(root: Path) -> str:
    """The first stage that is not done."""
    runs = Run.list(root)
    for entry in runs[0].state.rounds if runs else []:
        for label, state in entry.stages.items():
            if state.state not in ("done", "cached"):
                return f"{entry.round} {label}"
    return "between stages"


@both_forms(short=2, full=60)
def test_a_disk_that_fills_up(undisturbed: Undisturbed, trials: Trials, tmp_path: Path, count: int) -> None:
    mounted = small_disk.possible(tmp_path / "probe")

    def attempt(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        # from the first to the last byte of what the run writes, so that every stage meets it
        free = round(undisturbed.growth * (int(name) + 0.5) / count * 0.95)
        code = forked.exit_code(forked.start(fill, undisturbed.template, folder, free, output=folder / "output"))
        assert code == 0, f"{free} bytes free: exit {code}\n{(folder / 'output').read_text()}"
        said = json.loads((folder / "said.json").read_text())
        assert said["error"] is not None, f"{free} of {undisturbed.growth} bytes were enough"
        check_error(said["error"])
        assert said["damaged"] == []
        contents = undisturbed.result["contents"]
        assert all(contents[key] == content for key, content in said["committed"].items())
        assert said["result"] == json.loads(json.dumps(undisturbed.result))
        assert said["leftovers"] == []
        shutil.rmtree(folder)

    def without_mount(name: str) -> None:
        full_at(undisturbed, tmp_path / name, name)

    how = "a tmpfs fills up at every stage" if mounted else "ENOSPC at failpoints (no tmpfs may be mounted here)"
    trials(11, how, map(str, range(count)), attempt if mounted else without_mount, parallel=2)


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
    from flows.runner import run_experiment

    root = tmp_path / "store"
    shutil.copytree(template, root)
    e = experiment(ROUNDS)
    huge = e.model_copy(update={"rollout": e.rollout.model_copy(update={"max_completion_length": 10**15})})
    sys.path.insert(0, str(PLUGINS))
    with pytest.raises(NotEnoughSpace, match=r"needed for one round, .* free"):
        run_experiment(huge, name=NAME, root=root, prefect=False)
    assert list((root / "runs" / NAME / "logs").iterdir()) == []


def test_a_students_training_counts_before_the_run_and_before_its_stage(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bytes of the student, 12 of the state, three times 12 of checkpoints: 52 per float32 parameter."""
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
    in_process.run(tmp_path / "store", rounds=1)
    assert asked[-1] == 52 * 2048
