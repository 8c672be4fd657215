"""Every recipe finishes two small rounds on the demo task and has in the store what it promises; and in two rounds of the demo's
size it brings the student nearer to its teacher, where that is another model than the student."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import CONFIGS
from recipe_rounds import check_run, small, table_row
from vllm_server import VllmServer

from flows.experiment import Experiment, load_experiment
from flows.run.runner import run_experiment
from storage.store import Store
from tasks.workers.pool import WorkerPool

RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))

ONE_THREAD = ["runtime.threads=1"]
"""The models are small, and a second thread waits more than it works where other programs run."""
OFF_ITS_LIST = "the paper's loss pushes student mass off its list, where nothing is compared"
KL_DOES_NOT_FALL = {"rethinking-opd": OFF_ITS_LIST, "trb": OFF_ITS_LIST}
KL_DOES_NOT_FALL["pbsd"] = (
    "the margin grows more by what the student's own completions lose than by what the teacher's gain"
)
"""Recipe -> why; docs/log.md has the metrics. One whose KL falls after all must leave this list."""


def away_from_itself(e: Experiment) -> bool:
    """Whether rewards, or a teacher that is the student, move it: it has no KL that falls (the rewards' study: docs/log.md)."""
    return e.objective.estimator == "credit" and e.self_teacher is not None


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, WorkerPool]]:
    """One store, so that the warm-ups are made once, and one set of workers, so that engines start once. OPD_RECIPES_DIR: a
    folder that keeps the store, so that the test can be stopped and goes on where it was."""
    base = load_experiment(CONFIGS / "quickstart.yaml", ONE_THREAD)
    root = Path(os.environ.get("OPD_RECIPES_DIR") or tmp_path_factory.mktemp("recipes"))
    with WorkerPool(base.runtime, root, base.plugins) as workers:
        yield root / "store", workers


@pytest.mark.timeout(3600)  # the first one warms the models up
@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_two_small_rounds_of_a_recipe(shared, recipe):
    """Small rounds show that a recipe runs, not that it learns. `pytest -m slow -s -k small` prints a row of a table for each."""
    root, workers = shared
    with ready(recipe, root, workers, small(load_experiment(recipe))) as (e, its):
        state, _ = run_experiment(e, name=f"small-{recipe.stem}", root=root, rounds=2, prefect=False, workers=its)
    check_run(Store(root), e, state)
    print(f"\n{table_row(recipe.stem, state)}")


NEARER = [path for path in RECIPES if not away_from_itself(load_experiment(path))]


@pytest.mark.parametrize("recipe", NEARER, ids=[path.stem for path in NEARER])
def test_two_rounds_of_a_recipe_bring_the_student_nearer(shared, recipe):
    root, workers = shared
    with ready(recipe, root, workers) as (experiment, its):
        state, _ = run_experiment(experiment, name=recipe.stem, root=root, rounds=2, prefect=False, workers=its)
    kl = [r.metrics["reverse_kl"] for r in state.rounds]
    reason = KL_DOES_NOT_FALL.get(recipe.stem)
    assert len(kl) == 3
    assert (kl[2] < kl[0]) == (reason is None), f"reverse KL by round: {kl}"


@contextmanager
def ready(
    recipe: Path, root: Path, workers: WorkerPool, changes: Sequence[str] = ()
) -> Iterator[tuple[Experiment, WorkerPool | None]]:
    """A recipe's experiment, and the workers if it can share them. That of a served teacher has another runtime, and a server of
    the demo's teacher, as docs/teachers.md starts one."""
    if recipe.stem != "served-teacher":
        yield load_experiment(recipe, [*ONE_THREAD, *changes]), workers
        return
    demo = load_experiment(CONFIGS / "quickstart.yaml", ONE_THREAD)
    state, _ = run_experiment(demo, name="the-demos-teacher", root=root, rounds=0, prefect=False, workers=workers)
    store = Store(root)
    teacher = store.require("student", state.rounds[0].stages["warmup_teacher"].artifacts["student"])
    server = VllmServer(store.materialize(teacher), root.parent / "server.log", "demo-teacher")
    try:
        yield load_experiment(recipe, [*ONE_THREAD, *changes, f"runtime.scorer.server.urls=[{server.url}]"]), None
    finally:
        server.kill()


def test_the_exceptions_name_recipes():
    assert set(KL_DOES_NOT_FALL) <= {path.stem for path in RECIPES}
