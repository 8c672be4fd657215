"""A run from start to finish: its name and lock, its workers, Prefect around it, and what happens when it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.distill import distill
from flows.experiment import Experiment, experiment_of, load_experiment, with_plugins
from flows.run.executor import Maker, PlanLine, Planner, Reporter
from flows.run.progress import SilentReporter
from flows.run.recovery import mend, stands_for
from flows.run.stopping import terminating
from storage.artifacts.checkpoints import KEPT
from storage.disk.files import explain_full_disk
from storage.disk.redact import redact
from storage.errors import ConfigError, OpdError
from storage.runs import Run, RunState
from storage.store import Store
from tasks.inputs.models import CheckpointModel, parameter_count
from tasks.stage import Context
from tasks.trainer.dispatch import training_bytes
from tasks.workers.metrics import StageProgress
from tasks.workers.pool import WorkerPool


def plan(experiment: Experiment, root: str | Path, rounds: int | None = None) -> list[PlanLine]:
    """What is in the store, what would run, and what waits for that; starts nothing."""
    planner = Planner(Store(root))
    experiment = with_plugins(experiment)
    distill(experiment, planner, experiment.policy.rounds if rounds is None else rounds)
    return planner.lines


def open_run(experiment: Experiment, name: str, root: str | Path) -> Run:
    """The run of that name, made if new; IdentityMismatch when the name holds another experiment, or its plugins changed. One
    of its two records of that may be damaged, not both (CorruptArtifact)."""
    existing = next((run for run in Run.list(root) if run.name == name), None)
    if existing is not None and stands_for(existing, experiment):
        return existing
    return Run.create(root, name, experiment.model_dump(mode="json"), experiment.identity())


def run_experiment(
    experiment: Experiment,
    *,
    name: str,
    root: str | Path,
    rounds: int | None = None,
    further: int | None = None,
    prefect: bool = True,
    reporter: Reporter | None = None,
    workers: WorkerPool | None = None,
    restore: int | None = None,
) -> tuple[RunState, int]:
    """Bring a run to `rounds` rounds (default: the config's), or `further` ones past where it stands.

    `workers` are the caller's, who shares them among several runs and ends them; without any the run has its own.
    `restore`: a round whose evicted artifacts are made again. Returns the state and how many stages had to be built.
    Raises RunBusy when another process holds the name, IdentityMismatch when the name holds another experiment, and
    whatever a stage raises."""
    experiment.runtime.tell_libraries()
    experiment = with_plugins(experiment, name)
    store = Store(root)
    run = open_run(experiment, name, root)
    reporter = reporter or SilentReporter()
    with run.lock(), terminating(), without_leftovers(store):
        log = logger(run.log_path("run"))
        state, said = mend(run, experiment, store)
        for line in said:
            log(line)
            reporter.note(0, "run", line)
        state.forked_from = f"{experiment.fork.run}@{experiment.fork.round}" if experiment.fork else None
        goal = experiment.policy.rounds if rounds is None else rounds
        if further is not None:
            goal = min(goal, rounds_done(state) + further)
        refuse_full_disk(store, experiment)
        state.status = "running"
        run.save(state)
        try:
            with ExitStack() as stack:
                pool = stack.enter_context(workers_for(experiment, run.log_path("run").parent, workers))

                def context(progress: StageProgress) -> Context:
                    return Context(store, experiment.runtime, pool, progress, log, experiment.plugins)

                maker = Maker(store, run, state, context, reporter, restore=restore)
                if prefect:
                    from flows.prefect_.tasks import distill_in_prefect

                    distill_in_prefect(experiment, maker, goal)
                else:
                    distill(experiment, maker, goal)
        except BaseException as error:
            state.status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OpdError, OSError):  # on a full disk, say: the first error is what there is to say
                run.save(state)
            raise
        state.status = "finished" if rounds_done(state) >= experiment.policy.rounds else "stopped"
        run.save(state)
        return state, maker.built


@contextmanager
def without_leftovers(store: Store) -> Iterator[None]:
    """No temporary files of dead processes in the store, before and, should something break, after; nor of this one, when
    it is interrupted."""
    store.remove_leftovers()
    try:
        yield
    except BaseException as error:
        with suppress(OpdError, OSError):
            store.remove_leftovers(mine=isinstance(error, KeyboardInterrupt))
        raise


def workers_for(experiment: Experiment, logs: Path, lent: WorkerPool | None) -> AbstractContextManager[WorkerPool]:
    """A run's own workers, which end with it; or those lent to it, which stay warm for the next run."""
    if lent is None:
        return WorkerPool(experiment.runtime, logs, experiment.plugins)
    return lent.serving(experiment.runtime, logs, experiment.plugins)


def run_rounds(config_path: str, name: str, root: str, rounds: int, overrides: list[str]) -> RunState:
    """The next `rounds` rounds of a run: what a schedule's tick calls."""
    return run_experiment(load_experiment(config_path, overrides), name=name, root=root, further=rounds)[0]


def logger(path: Path) -> Callable[[str], None]:
    """Appends lines with their time to the run's own log, without secrets."""

    def log(line: str) -> None:
        with explain_full_disk(path), path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {redact(line)}\n")

    return log


def rounds_done(state: RunState) -> int:
    """Distillation rounds whose last stage is committed."""
    done = [r.round for r in state.rounds if r.student_sha256 and r.stages.get("evaluate") is not None]
    return max(done, default=0)


def stored_experiment(run: Run) -> Experiment:
    """The experiment that a run holds, as this version reads it."""
    return experiment_of(run.experiment, f"run {run.name}")


def resume_experiment(name: str, root: str | Path, overrides: list[str]) -> Experiment:
    """The experiment that a run holds, with overrides of `runtime` and `policy` alone."""
    from flows.config_file import merge, parse_override

    run = Run.open(root, name)
    data = run.experiment
    for text in overrides:
        if text.split(".")[0] not in ("runtime", "policy"):
            raise ConfigError(
                f"--set {text}: a run's identity is fixed, only runtime.* and policy.* can change; to try something"
                f" else from here: opd fork {name}@ROUND --name NEW --set {text}"
            )
        data = merge(data, parse_override(text))
    return experiment_of(data, f"run {name}")


def fork_experiment(name: str, round: int, root: str | Path, overrides: list[str]) -> Experiment:
    """The experiment of a run that shares rounds up to `round` with the run `name` and differs after it."""
    from flows.config_file import merge, parse_override

    run = Run.open(root, name)
    done = rounds_done(run.state)
    if round > done:
        raise ConfigError(f"run {name!r} has finished {done} round(s); it cannot be forked at round {round}")
    # its own rounds are made with the plugins of now, the shared ones keep theirs
    data: dict[str, Any] = run.experiment | {"plugin_sources": {}}
    for text in overrides:
        data = merge(data, parse_override(text))
    data["fork"] = {"run": name, "round": round, "experiment": run.experiment}
    return experiment_of(data, f"fork of {name}@{round}")


def refuse_full_disk(store: Store, experiment: Experiment) -> None:
    """Refuse to start when one round would not fit: its rollouts and signals, and where the student's size is known
    already its training."""
    needed, source = bytes_per_round(experiment), experiment.student.source
    if isinstance(source, CheckpointModel):
        states = 1 if experiment.runtime.trainer.checkpoint_minutes is None else KEPT + 2
        needed += training_bytes(parameter_count(source.path), experiment.train, states)
    store.require_space(needed, "one round")


def bytes_per_round(e: Experiment) -> int:
    """Upper estimate of a round's rollouts and signals in bytes, uncompressed, every completion at full length."""
    tokens = e.rollout.prompts_per_round * e.rollout.num_generations * e.rollout.max_completion_length
    per_token = 4 + 4 + 6 * 4 + sum(8 * (need.k or 0) for need in e.objective.needs().signals)
    return tokens * per_token
