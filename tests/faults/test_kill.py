"""SIGKILL at any moment, then the same command again: the undisturbed result, no temporary files, no orphans (row 1), and
every sample used exactly once (row 3)."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import in_process
import pytest
from fault_trials import FULL_SECONDS, Trials, both_forms
from registries import plugin_path
from scripted_run import ROUNDS, Trial, experiment, prepare_root

from storage.artifacts.artifact import MANIFEST
from storage.artifacts.shards import SIDECAR
from storage.disk.failpoints import NAMES
from storage.runs import Run
from storage.store import Store

OUTPUTS = 3
"""Artifacts of a training: student, trainer state, steps."""
OF_A_RUN = tuple(name for name in NAMES if not name.startswith(("push.", "pull.")))
"""Failpoints that a run can meet; `test_store_killed.py` meets all."""
REPAIR = {"quarantine.before_move", "quarantine.after_move"}
"""Failpoints that a run meets only when it finds damage."""


class Undisturbed:
    """What a run ends with when nothing happens to it, and which failpoints it meets on the way."""

    def __init__(self, template: Path, folder: Path, damage: bool = False, variant: str = "plain") -> None:
        self.template, self.damage, self.variant = template, damage, variant
        trial = self.trial(folder)
        started = time.monotonic()
        assert trial.run(log=True) == 0, trial.output
        self.seconds = time.monotonic() - started
        self.result, self.order = trial.result(), trial.hits()
        self.hits = Counter(self.order)
        self.whole = trial.root
        trial.temporary.rmdir()
        assert self.result["status"] == "finished"
        exactly_once(self.result["used"], trial.rounds)

    def trial(self, folder: Path) -> Trial:
        trial = Trial.of(self.template, folder, variant=self.variant)
        if self.damage:
            truncate_a_shard(trial.root)
        return trial


def truncate_a_shard(root: Path) -> None:
    (artifact, *_) = Store(root).list("rollout")
    path = next((root / "artifacts" / "rollout" / artifact.key).glob("*-00001-*.parquet"))
    path.write_bytes(path.read_bytes()[:-7])


@pytest.fixture(scope="module")
def plain(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(template, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def damaged(plain: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same run, begun again with a damaged rollout: most of it is cached, one shard must be rebuilt."""
    return Undisturbed(plain.whole, tmp_path_factory.mktemp("damaged") / "run", damage=True)


def exactly_once(used: list[list], rounds: int) -> None:
    """Every sample of every round was in exactly one training batch of that round."""
    counts = Counter((number, sample) for number, batch in used for sample in batch)
    assert len(counts) == rounds * 8
    assert set(counts.values()) == {1}
    assert all(sample.split("/")[1] == str(number) for number, sample in counts)


def check_after_resume(trial: Trial, expected: dict) -> None:
    """Resumes until the end and compares."""
    assert trial.orphans() == []
    if trial.run() != 0:
        raise AssertionError(f"the resumed run failed\n{trial.output}")
    found = trial.result()
    exactly_once(found["used"], trial.rounds)
    for part in expected:
        assert found[part] == expected[part], part
    store = Store(trial.root)
    for artifact in store.list("rollout"):
        ids = store.read_table(artifact, "rollouts", ["sample_id"])["sample_id"].to_pylist()
        assert len(set(ids)) == len(ids) == 8
    assert trial.leftovers() == []
    assert trial.orphans() == []
    trial.remove()


def killed_at_random(world: Undisturbed, folder: Path, seed: str) -> Callable[[str], None]:
    """A trial by its name: the tree is killed at a moment that `seed` and name decide, and the run is resumed."""

    def attempt(name: str) -> None:
        trial = world.trial(folder / name)
        process = trial.start()
        time.sleep(random.Random(f"{seed} {name}").uniform(0.05, world.seconds))
        trial.kill(process)
        check_after_resume(trial, world.result)

    return attempt


@both_forms(short=2, full=200)
def test_killed_at_a_random_moment(plain: Undisturbed, trials: Trials, tmp_path: Path, count: int) -> None:
    attempt = killed_at_random(plain, tmp_path, "moment")
    trials(1, "SIGKILL of the tree at a random moment, scripted engines", map(str, range(count)), attempt, parallel=2)


@both_forms(short=2, full=5 * len(OF_A_RUN))
def test_killed_at_every_failpoint(
    plain: Undisturbed, damaged: Undisturbed, trials: Trials, tmp_path: Path, count: int
) -> None:
    assert set(plain.hits) | REPAIR == set(OF_A_RUN)
    assert set(damaged.hits) >= REPAIR
    names = [f"{name} {attempt}" for attempt in range(5) for name in OF_A_RUN]
    random.Random("which").shuffle(names)

    def attempt(name: str) -> None:
        point, number = name.split()
        world = damaged if point in REPAIR else plain
        # spread over the run; the last time only the process that is there dies, and its supervisor copes or reports
        draw = random.Random(f"hit {name}")
        hit = draw.randint(1, world.hits[point])
        action = "kill" if number == "4" else "killtree"
        trial = world.trial(tmp_path / name.replace(" ", "-"))
        trial.run(f"{point}={action}@{hit}")
        assert Counter(trial.hits())[point] >= hit
        check_after_resume(trial, world.result)

    trials(1, "SIGKILL at every failpoint x 5, scripted engines", names[:count], attempt, parallel=2)


def commits_of_trainings(order: list[str]) -> list[int]:
    """Which manifests, counted from 1, are those of what a training made: the three after its last checkpoint."""
    found, manifests, since = list[int](), 0, OUTPUTS
    for point in order:
        if point.startswith("checkpoint."):
            since = 0
        elif point == "manifest.after_link":
            manifests, since = manifests + 1, since + 1
            if since <= OUTPUTS:
                found.append(manifests)
    return found


@both_forms(short=1, full=12)
def test_killed_when_a_training_is_committed_and_its_checkpoints_are_still_there(
    plain: Undisturbed, trials: Trials, tmp_path: Path, count: int
) -> None:
    numbers = commits_of_trainings(plain.order)
    assert len(numbers) == ROUNDS * OUTPUTS
    names = [f"{point} {number}" for point in ("manifest.after_link", "manifest.after_sync") for number in numbers]
    names.insert(0, names.pop(OUTPUTS - 1))  # the state, which has the checkpoints beside it, is committed last
    beside: list[Path] = []

    def attempt(name: str) -> None:
        point, number = name.split()
        trial = plain.trial(tmp_path / name.replace(" ", "-"))
        trial.run(f"{point}=killtree@{number}")
        found = trial.root.glob("artifacts/*/*/checkpoint-*")
        beside.extend(path for path in found if (path.parent / MANIFEST).exists())
        check_after_resume(trial, plain.result)

    trials(1, "SIGKILL just after the manifests of a training", names[:count], attempt, parallel=2)
    assert beside or trials.record is not None, "no checkpoint was left beside a manifest: this shows nothing"


@both_forms(short=1, full=40)
def test_a_shard_whose_worker_dies_is_made_again_and_counts_once(
    plain: Undisturbed, trials: Trials, tmp_path: Path, count: int
) -> None:
    """A worker dies between a shard and its sidecar: the supervisor gives the shard to another, within one run."""

    def attempt(name: str) -> None:
        trial = plain.trial(tmp_path / name)
        hit = random.Random(f"shard {name}").randint(1, plain.hits["shard.before_sidecar"])
        code = trial.run(f"shard.before_sidecar=kill@{hit}")
        assert Counter(trial.hits())["shard.before_sidecar"] >= hit
        if code == 0:
            assert Run.open(trial.root, "trial").state.status == "finished"
            exactly_once(trial.result()["used"], ROUNDS)
        check_after_resume(trial, plain.result)

    trials(3, "killed between a shard and its sidecar, shard retried", map(str, range(count)), attempt, parallel=2)


# --- drafts, blends and averages -------------------------------------------------------------------------------------

FIRST = {
    "drafts": (("draft",), "rollout"),
    "blended": (("rollout", "blending"), "mask"),
    "judged": (("judge",), "mask"),
    "contexts": (("context",), "mask"),
}
"""Variant of the scripted run -> what the first stage makes that its run has yet to do, and something that the stage after that
makes."""
WORDS = {
    "drafts": "drafts of a teacher",
    "blended": "blended rollouts (two artifacts), teacher an average",
    "judged": "rewards",
    "contexts": "contexts of samples",
}
SHARDS = {"drafts": 4, "blended": 4, "judged": 2, "contexts": 2}
"""Shards that this stage writes: four of drafts; two each of rollouts and of the blending; two of rewards and
of contexts."""
MOMENTS = {
    "drafts": ("shard.before_sidecar killtree 2", "manifest.before_link killtree 1"),
    "blended": ("shard.before_sidecar killtree 2", "manifest.after_link killtree 1"),
    "judged": ("shard.before_sidecar killtree 2", "shard.after_rename kill 1"),
    "contexts": ("shard.before_sidecar killtree 2", "manifest.before_link killtree 1"),
}
"""In `make test`: a shard without its sidecar; before the manifest of the drafts; one of the two artifacts is committed; a
judge's worker dies and another one goes on."""


class Interrupted:
    """In the place of a worker: the run ends before it."""

    def handle(self, job: object, link: object) -> None:
        raise KeyboardInterrupt

    def close(self) -> None:
        """Nothing is kept."""


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Undisturbed]:
    """Variant -> its run, begun where round 0 is done; of those with rewards and contexts, before the first of these."""
    found = {}
    for variant in FIRST:
        folder = tmp_path_factory.mktemp(variant)
        root = prepare_root(folder / "store", experiment(0, variant))
        in_process.run(root, 0, variant)
        if variant == "judged":
            with pytest.raises(KeyboardInterrupt):
                in_process.run(root, 1, variant, judge=Interrupted())
        if variant == "contexts":
            with pytest.raises(KeyboardInterrupt):
                in_process.run(root, 1, variant, scorer=Interrupted())
            for stage in ("context", "sampled", "mask", "teacher_topk"):  # signals were begun
                shutil.rmtree(root / "artifacts" / stage, ignore_errors=True)
        found[variant] = Undisturbed(root, folder / "run", variant=variant)
    return found


def moments(variant: str) -> list[str]:
    """Failpoint, action and number of its hit, of every moment of the first stage: all shards, all commits."""
    shards = [(point, hit) for point in NAMES if point.startswith("shard.") for hit in range(1, SHARDS[variant] + 1)]
    commits = ("builder.before_collect", "builder.before_publish", *(p for p in NAMES if p.startswith("manifest.")))
    made = len(FIRST[variant][0])
    names = [f"{point} killtree {hit}" for point in commits for hit in range(1, made + 1)]
    names += [f"{point} {action} {hit}" for point, hit in shards for action in ("killtree", "kill")]
    random.Random(variant).shuffle(names)
    return [*MOMENTS[variant], *(name for name in names if name not in MOMENTS[variant])]


def check_moment(root: Path, variant: str, point: str, hit: int) -> None:
    """The kill met the stage that it was for, at that moment."""
    makes, later = FIRST[variant]
    assert not list((root / "artifacts").glob(f"{later}/*")), "the kill came after the stage"
    made = {stage for stage in makes for _ in (root / "artifacts" / stage).glob(f"*/{MANIFEST}")}
    if not point.startswith("shard."):
        assert len(made) == hit - (point not in ("manifest.after_link", "manifest.after_sync"))
        return
    assert made == set()
    files = [path for stage in makes for path in (root / "artifacts" / stage).glob("*/[!.]*.parquet")]
    bare = [path for path in files if not path.with_name(path.name + SIDECAR).exists()]
    assert len(files) == hit - (point in ("shard.before_write", "shard.before_rename"))
    assert len(bare) == (point in ("shard.after_rename", "shard.before_sidecar"))


@pytest.mark.parametrize("variant", FIRST)
@both_forms(short=2, full=60)
def test_killed_while_what_comes_with_a_teacher_is_made(
    worlds: dict[str, Undisturbed], trials: Trials, tmp_path: Path, variant: str, count: int
) -> None:
    """A draft's shards and commit; the two artifacts of a blended rollout, of which each kill leaves another part; rewards;
    contexts."""
    world = worlds[variant]

    def attempt(name: str) -> None:
        point, action, hit = name.split()
        trial = world.trial(tmp_path / name.replace(" ", "-"))
        trial.run(f"{point}={action}@{hit}")
        assert Counter(trial.hits())[point] >= int(hit)
        if action == "killtree":
            check_moment(trial.root, variant, point, int(hit))
        check_after_resume(trial, world.result)

    fault = f"SIGKILL between shard and sidecar and at commits: {WORDS[variant]}"
    trials(1, fault, moments(variant)[:count], attempt, parallel=2)


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_killed_at_a_random_moment_of_such_a_run(
    worlds: dict[str, Undisturbed], trials: Trials, tmp_path: Path, variant: str
) -> None:
    attempt = killed_at_random(worlds[variant], tmp_path, variant)
    trials(1, f"SIGKILL at a random moment: {WORDS[variant]}", map(str, range(60)), attempt, parallel=2)
