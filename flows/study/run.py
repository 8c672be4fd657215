"""Runs a study: its runs are ordinary ones in one store, so that they share warm-ups and first rollouts by identity; they
share their workers too, so that engines start once. Running it again continues where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from flows.run.executor import Reporter
from flows.run.runner import run_experiment
from flows.run.stopping import terminating
from flows.study.results import best_lrs, read_rows
from flows.study.spec import StudyPlan, StudyRun
from storage.errors import ConfigError, IdentityMismatch, NotEnoughSpace, OpdError, RunBusy, StoreError
from tasks.workers.pool import WorkerPool

STOPPING = (ConfigError, IdentityMismatch, NotEnoughSpace, RunBusy, StoreError)
"""Errors that every further run would meet too. Others are a result: that run failed, the study goes on."""


def run_study(
    plan: StudyPlan,
    root: str | Path,
    *,
    reporter: Reporter | None = None,
    say: Callable[[str], None] = lambda line: None,
    changed: Callable[[], None] = lambda: None,
) -> int:
    """Bring every run of the study to its end and return how many stages had to be built.

    `say` gets a line per run, `changed` is called after each that did something. A run that fails is recorded as failed
    in its own state, and tried again by the next call. Raises what stops a study: KeyboardInterrupt, and the errors of
    `STOPPING`. Prefect has no part: the order is here, and every run says in the store what became of it."""
    built, total = 0, len(plan.sweep_runs()) + len(plan.method_runs())
    with terminating(), WorkerPool(plan.runtime, Path(root), plan.plugins) as workers:
        for number, run in enumerate(_in_order(plan, root, say), 1):
            say(f"[{number}/{total}] {run}")
            try:
                _, made = run_experiment(
                    plan.experiment(run.method, run.seed, run.lr),
                    name=run.name,
                    root=root,
                    rounds=run.rounds,
                    prefect=False,
                    reporter=reporter,
                    workers=workers,
                )
            except IdentityMismatch as error:
                raise IdentityMismatch(
                    f"{error}\nthe study, or the learning rate that its sweep chose, has changed since: give it another"
                    " `name`; what stayed the same is found in the store"
                ) from error
            except STOPPING:
                raise
            except OpdError as error:
                made = 1
                say(f"  failed, going on with the next: {str(error).strip().splitlines()[0]}")
            built += made
            if made:
                changed()
            else:
                say("  in the store already")
    return built


def _in_order(plan: StudyPlan, root: str | Path, say: Callable[[str], None]) -> Iterator[StudyRun]:
    """The sweep's runs, then, with what came out, the methods'."""
    yield from plan.sweep_runs()
    lrs = best_lrs(plan, read_rows(plan, root))
    for name, lr in lrs.items():
        say(f"group {name}: lr {lr:g}")
    for name in plan.study.sweep.groups if plan.study.sweep else ():
        if name not in lrs:
            say(f"group {name}: every learning rate failed; its methods are left out")
    yield from plan.method_runs(lrs)
