"""Runs a study. Its runs are ordinary runs in one store, so they share warm-ups and first rollouts by their keys; they also
share workers, so engines start once. Calling it again continues an interrupted study."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from flows.run.dates import with_date
from flows.run.executor import Reporter
from flows.run.runner import run_experiment
from flows.run.stopping import terminating
from flows.study.results import best_lrs, read_rows, undecided
from flows.study.spec import StudyPlan, StudyRun
from storage.errors import ConfigError, IdentityMismatch, NotEnoughSpace, OpdError, RunBusy, StoreError
from tasks.workers.pool import WorkerPool

STOPPING = (ConfigError, IdentityMismatch, NotEnoughSpace, RunBusy, StoreError)
"""Errors that would also stop the other runs. After any other error the run counts as failed and the study continues."""


def run_study(
    plan: StudyPlan,
    root: str | Path,
    *,
    reporter: Reporter | None = None,
    say: Callable[[str], None] = lambda line: None,
    changed: Callable[[], None] = lambda: None,
) -> int:
    """Run every run of the study to its end; returns the number of stages built.

    `say` gets a line per run; `changed` is called after each run that built something. A failed run is recorded in its own
    state and tried again by the next call. Raises KeyboardInterrupt and the errors in `STOPPING`. Runs without Prefect: the
    order is a loop, and every run records its state in the store."""
    names = [run.name for run in (*plan.sweep_runs(), *plan.method_runs())]
    built, total = 0, len(names)
    with terminating(), WorkerPool(plan.runtime, Path(root), plan.plugins) as workers:
        for number, run in enumerate(_in_order(plan, root, say), 1):
            say(f"[{number}/{total}] {run}")
            try:
                experiment = plan.experiment(run.method, run.seed, run.lr)
                _, made = run_experiment(
                    with_date(experiment, run.name, root, names),  # methods are compared on the same prompts
                    name=run.name,
                    root=root,
                    rounds=run.rounds,
                    prefect=False,
                    reporter=reporter,
                    workers=workers,
                )
            except IdentityMismatch as error:
                raise IdentityMismatch(
                    f"{error}\nthe study, or the learning rate chosen by its sweep, has changed: give the study another"
                    " `name`; unchanged stages are found in the store"
                ) from error
            except STOPPING:
                raise
            except OpdError as error:
                made = 1
                say(f"  failed, continuing with the next: {str(error).strip().splitlines()[0]}")
            built += made
            if made:
                changed()
            else:
                say("  already in the store")
    return built


def _in_order(plan: StudyPlan, root: str | Path, say: Callable[[str], None]) -> Iterator[StudyRun]:
    """The runs of the sweep, then those of the methods with the chosen rates."""
    yield from plan.sweep_runs()
    rows = read_rows(plan, root)
    lrs, close = best_lrs(plan, rows), undecided(plan, rows)
    for name, lr in lrs.items():
        others = ", ".join(f"{other:g}" for other in close[name])
        say(f"group {name}: lr {lr:g}" + (f" (not told apart from {others})" if others else ""))
    for name in plan.study.sweep.groups if plan.study.sweep else ():
        if name not in lrs:
            say(f"group {name}: every learning rate failed; its methods are left out")
    yield from plan.method_runs(lrs)
