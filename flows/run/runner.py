"""One run from start to finish: name and lock, workers, Prefect, and the state after an error or interruption."""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from flows.cross_checks import dtype_warning, refuse_changed_fork, without_effect
from flows.distill import Further, distill
from flows.experiment import (
    CHANGEABLE,
    Begun,
    Experiment,
    as_stored,
    experiment_of,
    import_plugins,
    load_experiment,
    not_begun,
    overridden,
    refuse_without_effect,
    with_plugins,
)
from flows.run.dates import with_date
from flows.run.executor import Maker, PlanLine, Planner, Reporter
from flows.run.hints import described
from flows.run.hooks import after_failure, after_round
from flows.run.progress import OnlyWork, SilentReporter
from flows.run.recovery import mend, stands_for
from flows.run.stopping import terminating
from flows.run.tracking import tracking
from flows.trackers import require_trackers
from storage.artifacts.checkpoints import KEPT
from storage.disk.files import explain_full_disk
from storage.disk.redact import redact
from storage.errors import ConfigError, CorruptArtifact, OpdError
from storage.runs import Run, RunState
from storage.store import Store
from storage.text import counted, size_text
from storage.upkeep.gc import Collector, unrepeatable_note
from storage.upkeep.retention import Retention, evicted_of, rebuild_cost
from tasks.inputs.models import CheckpointModel, parameter_count
from tasks.stage import Context
from tasks.trainer.dispatch import training_bytes
from tasks.workers.cluster import LocalCluster
from tasks.workers.cluster import require as require_cluster
from tasks.workers.metrics import StageProgress
from tasks.workers.one_machine import refuse_launchers
from tasks.workers.pool import WorkerPool


def plan(experiment: Experiment, root: str | Path, rounds: int | None = None, name: str = "") -> list[PlanLine]:
    """The stages that are in the store, would run, or are pending, for the run `name`. Starts nothing."""
    planner = Planner(Store(root))
    experiment = with_policy_of(name, root, experiment)
    dtype_warning(experiment)
    experiment = with_date(with_plugins(experiment), name, root)
    distill(experiment, planner, experiment.policy.rounds if rounds is None else rounds)
    return planner.lines


def nothing_to_do(
    experiment: Experiment,
    store: Store,
    rounds: int,
    evaluated: Callable[[int], bool] | None = None,
    on_set: Further | None = None,
) -> bool:
    """Whether every stage up to a round is in the store, undamaged: then there is nothing that Prefect could show."""
    planner = Planner(store)
    distill(experiment, planner, rounds, evaluated, on_set)
    return all(line.state == "cached" for line in planner.lines)


def existing_run(name: str, root: str | Path) -> Run | None:
    """The run of that name, if there is one."""
    return next((run for run in Run.list(root) if run.name == name), None) if Path(root).is_dir() else None


def standing(experiment: Experiment, name: str, root: str | Path) -> Run | None:
    """The run of that name, if it is this experiment's. Raises as `stands_for`."""
    existing = existing_run(name, root)
    return existing if existing is not None and stands_for(existing, experiment) else None


def has_begun(name: str, root: str | Path) -> Begun:
    """Asks of an experiment as a file has it whether the run `name` is in the store and is the experiment's. Raises as
    `with_plugins` and `stands_for`."""

    def there(experiment: Experiment) -> bool:
        if existing_run(name, root) is None:
            return False
        return standing(with_date(with_plugins(experiment, name), name, root), name, root) is not None

    return there


def open_run(experiment: Experiment, name: str, root: str | Path) -> Run:
    """The run of that name, created if new.

    Raises IdentityMismatch when the name belongs to another experiment or a plugin changed, CorruptArtifact when both of the
    run's records of the experiment are damaged, ConfigError for a new fork that changes what round 0 of its parent made."""
    existing = standing(experiment, name, root)
    if existing is not None:
        return existing
    refuse_changed_fork(experiment)
    return Run.create(root, name, experiment.model_dump(mode="json"), experiment.identity())


def require_machines(experiment: Experiment, root: str | Path) -> None:
    """ConfigError where this machine, or the cluster of `runtime.cluster`, cannot run the experiment's workers."""
    refuse_launchers(os.environ, not isinstance(experiment.runtime.cluster, LocalCluster))
    experiment.runtime.require_gpus()
    require_cluster(experiment.runtime, root)


def refuse_early(experiment: Experiment, name: str, root: str | Path) -> RunState | None:
    """Raises what `run_experiment` raises before it starts anything, for a caller that starts something else first.

    Returns the state of the run `name`; None where there is none, or it is damaged."""
    require_machines(experiment, root)
    require_trackers(experiment.trackers)
    run = existing_run(name, root)
    if run is None:
        refuse_changed_fork(experiment)
        return None
    experiment = with_policy_of(name, root, experiment)
    open_run(with_date(with_plugins(experiment, name), name, root), name, root)
    with suppress(CorruptArtifact):
        return run.state
    return None


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
    evaluated: Callable[[int], bool] | None = None,
    on_set: Further | None = None,
) -> tuple[RunState, int]:
    """Run until `rounds` rounds are done (default: policy.rounds), or `further` more than are done now.

    `workers`: a pool that the caller shares among runs and ends; without one the run starts and ends its own.
    `restore`: a round whose evicted artifacts are rebuilt. `evaluated`: which rounds are evaluated, instead of those of
    policy.evaluate_every and the last one of this call (with `further`: of the run). `on_set`: another evaluation set,
    or tasks of lm-eval, without Prefect.
    Returns the state and the number of stages built.
    Raises RunBusy when another process holds the name, IdentityMismatch when the name belongs to another experiment, and
    any error of a stage."""
    require_machines(experiment, root)
    experiment.runtime.tell_libraries()
    require_trackers(experiment.trackers)
    experiment = with_policy_of(name, root, experiment)
    notes = [line for line in [dtype_warning(experiment)] if line]
    notes += [f"{line} in a new run; this one has it and goes on" for line in without_effect(experiment)]
    experiment = with_date(with_plugins(experiment, name), name, root)
    store = Store(root)
    run = open_run(experiment, name, root)
    reporter = reporter or SilentReporter()
    with run.lock(), terminating(), without_leftovers(store):
        log = logger(run.log_path("run"))
        state: RunState | None = None
        try:
            state, messages = mend(run, experiment, store)
            for line in [*messages, *(f"warning: {line}" for line in notes)]:
                log(line)
                reporter.note(0, "run", line)
            state.forked_from = f"{experiment.fork.run}@{experiment.fork.round}" if experiment.fork else None
            goal = experiment.policy.rounds if rounds is None else rounds
            if further is not None:
                goal = min(goal, state.rounds_done + further)
                evaluated = evaluated or partial(experiment.policy.evaluates, last=experiment.policy.rounds)
            refuse_full_disk(store, experiment)
            idle = restore is None and nothing_to_do(experiment, store, goal, evaluated, on_set)
            if not (idle and state.status == "finished"):  # that one stays finished also where this call is killed
                state.status, state.error, state.ended = "running", None, None
                run.save(state)
            reporter.begins(state, goal)
            with ExitStack() as stack:
                pool = stack.enter_context(workers_for(experiment, run.log_path("run").parent, workers))

                def context(progress: StageProgress) -> Context:
                    return Context(store, experiment.runtime, pool, progress, log, experiment.plugins)

                def collect(round: int) -> None:
                    for line in collected(store, run, state):
                        log(line)
                        reporter.note(round, "collect", line)

                def after(round: int) -> None:
                    if experiment.policy.collect:
                        collect(round)
                    if (line := after_round(experiment.hooks, run, state, round, store.root)) is not None:
                        log(line)
                        reporter.note(round, "run", line)

                # what a restore has just rebuilt must stay, and is no round's news
                then = after if restore is None else None
                stop = experiment.policy.stop if restore is None else None
                maker = Maker(store, run, state, context, reporter, restore=restore, after_round=then, stop=stop)
                pool.say = lambda text: reporter.note(maker.number, "start", text)
                maker.reporter = stack.enter_context(
                    tracking(experiment, store, run, OnlyWork(reporter) if idle else reporter, log)
                )
                if idle:
                    distill(experiment, maker, goal, evaluated, on_set)
                elif prefect and on_set is None:
                    from flows.prefect_.tasks import distill_in_prefect

                    distill_in_prefect(experiment, maker, goal, evaluated)
                else:
                    distill(experiment, maker, goal, evaluated, on_set)
                over = state.ended is not None or state.rounds_done >= experiment.policy.rounds
                state.status = "finished" if over else "stopped"
                run.save(state)  # before workers and trackers end: what is done is done
        except BaseException as error:
            with suppress(OpdError, OSError):  # the first error is the one to report, also on a full disk
                record_failure(run, state, error, log)
                if state is not None and state.status == "failed":
                    warned = after_failure(experiment.hooks, run, state, store.root)
                    if warned is not None:
                        log(warned)
                        reporter.note(0, "run", warned)
            raise
        return state, maker.built


def record_failure(run: Run, state: RunState | None, error: BaseException, log: Callable[[str], None]) -> None:
    """Writes why a call ended into the run's log and state. A finished run that is refused at its start stays finished."""
    interrupted = isinstance(error, KeyboardInterrupt)
    text = "stopped by the user or a signal" if interrupted else described(error)
    detail = "" if interrupted or isinstance(error, OpdError) else "\n" + "".join(traceback.format_exception(error))
    log(f"{'' if interrupted else 'failed: '}{text}{detail}")
    if state is not None and state.status != "finished":
        state.status = "stopped" if interrupted else "failed"
        state.error = None if interrupted else redact(text)
        run.save(state)


def with_policy_of(name: str, root: str | Path, experiment: Experiment) -> Experiment:
    """The experiment. Fields of `policy` that are younger than the run `name`, and that the config does not set, are as
    `as_stored` reads them."""
    run = existing_run(name, root)
    if run is None:
        return experiment
    try:
        stored = run.experiment
    except CorruptArtifact:  # when it began is unknown; the config is all there is
        return experiment
    policy, then = experiment.policy, as_stored(stored)["policy"]
    younger = then.keys() - (stored.get("policy") or {}).keys() - policy.model_fields_set
    changes = {field: then[field] for field in younger - {"retain"}}
    if "collect" in younger:  # it keeps what it kept, but for what the config says of it
        chosen = policy.retain.model_dump(include=policy.retain.model_fields_set)
        changes["retain"] = Retention.model_validate(then["retain"] | chosen)
    return experiment.model_copy(update={"policy": policy.model_copy(update=changes)})


def collected(store: Store, run: Run, state: RunState) -> list[str]:
    """Removes what the run's retention does not keep. Returns lines that say what went, and what a replay or a fork then costs. A
    collection that is not possible now is left to the next round."""
    collector = Collector(store, own=run.name)
    try:
        plan = collector.plan_of_run(run)
        removed = collector.apply(plan)
    except OpdError as error:
        return [f"warning: nothing was collected: {error}"]
    if not removed:
        return []
    gone = evicted_of(store, state)
    kinds: dict[str, list[int]] = {}
    for round in state.rounds:
        for record in round.stages.values():
            for name in record.artifacts.items():
                if name in {item.artifact for item in removed}:
                    kinds.setdefault(name[0], []).append(round.round)
    what = "; ".join(f"{stage} of round {', '.join(map(str, sorted(set(at))))}" for stage, at in sorted(kinds.items()))
    lines = [f"collected {size_text(sum(item.bytes for item in removed))}: {what} (policy.retain)"]
    last = max((number for at in kinds.values() for number in at), default=0)
    rounds, seconds = rebuild_cost(state, gone, last)
    if (note := unrepeatable_note(plan.unrepeatable)) is not None:
        lines.append(note)
    if rounds:
        cost = (
            f" (about {seconds:,.0f} s)" if seconds >= 0.5 else ""
        )  # stages found in the store have no time in this run
        which = f"rounds {rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"round {rounds[0]}"
        lines.append(
            f"a fork at round {last}, or a replay of the training of round {last + 1}, now repeats the training of {which}"
            f" first{cost}; policy.keep_rounds keeps a round"
        )
    return lines


@contextmanager
def without_leftovers(store: Store) -> Iterator[None]:
    """Removes temporary files of dead processes from the store, before the block and after an error in it; after an
    interruption also those of this process."""
    store.remove_leftovers()
    try:
        yield
    except BaseException as error:
        with suppress(OpdError, OSError):
            store.remove_leftovers(mine=isinstance(error, KeyboardInterrupt))
        raise


def workers_for(experiment: Experiment, logs: Path, lent: WorkerPool | None) -> AbstractContextManager[WorkerPool]:
    """A pool of the run's own, which ends with it, or the `lent` one, which stays warm for the next run."""
    if lent is None:
        return WorkerPool(experiment.runtime, logs, experiment.plugins)
    return lent.serving(experiment.runtime, logs, experiment.plugins)


def run_rounds(config_path: str, name: str, root: str, rounds: int, overrides: list[str]) -> RunState:
    """Runs the next `rounds` rounds of a run. Called by a schedule's tick."""
    experiment = load_experiment(config_path, overrides, begun=has_begun(name, root))
    return run_experiment(experiment, name=name, root=root, further=rounds)[0]


def logger(path: Path) -> Callable[[str], None]:
    """A function that appends lines to a log, with the time and with secrets removed."""

    def log(line: str) -> None:
        with explain_full_disk(path), path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {redact(line)}\n")

    return log


def stored_experiment(run: Run) -> Experiment:
    """A run's stored experiment, as this version reads it."""
    return experiment_of(as_stored(run.experiment), f"run {run.name}")


def resume_experiment(name: str, root: str | Path, overrides: list[str]) -> Experiment:
    """A run's stored experiment with `overrides` of `runtime` and `policy`. ConfigError for other fields."""
    run = Run.open(root, name)
    for text in overrides:
        if re.split("[.=]", text)[0] not in ("runtime", *CHANGEABLE):
            raise ConfigError(
                f"--set {text}: only runtime, {', '.join(CHANGEABLE)} of a run can change, its identity is fixed; to try"
                f" something else from this point: opd fork {name}@ROUND --name NEW --set {text}"
            )
    return experiment_of(overridden(as_stored(run.experiment), overrides), f"run {name}")


def fork_experiment(
    name: str, round: int, root: str | Path, overrides: list[str], begun: Begun = not_begun
) -> Experiment:
    """The experiment of a run that shares rounds up to `round` with the run `name`. ConfigError for a round that is not done, for
    a change of what round 0 made (models and prompts), and, unless the fork is `begun`, for fields without effect."""
    run = Run.open(root, name)
    done = run.state.rounds_done
    if round > done:
        raise ConfigError(f"run {name!r} has finished {counted(done, 'round')}; it cannot be forked at round {round}")
    # its own rounds use the current plugins, the shared rounds keep theirs
    own = as_stored(run.experiment)
    parent = {
        name: value for name, value in own.items() if name not in ("trackers", "hooks")
    }  # they determine no result
    stored: dict[str, Any] = own | {"plugin_sources": {}}
    import_plugins(stored, f"run {name}")
    data = overridden(stored, overrides)
    data["fork"] = {"run": name, "round": round, "experiment": parent}
    made = experiment_of(data, f"fork of {name}@{round}")
    refuse_changed_fork(made)
    refuse_without_effect(made, f"fork of {name}@{round}", begun)
    return made


def changed_fields(stored: dict[str, Any], experiment: Experiment) -> list[str]:
    """`policy.rounds 9 instead of 5` for each field of a run's changeable sections that a call changes."""
    now, then = experiment.model_dump(mode="json"), as_stored(stored)
    return [
        f"{section}.{field} {value} instead of {then[section].get(field)}"
        for section in ("runtime", "policy", "hooks")
        for field, value in now[section].items()
        if isinstance(then.get(section), dict) and then[section].get(field, value) != value
    ]


def refuse_full_disk(store: Store, experiment: Experiment) -> None:
    """Raises NotEnoughSpace when one round would not fit on the disk: its rollouts and signals, and its training where the
    student's size is known already."""
    needed, source = bytes_per_round(experiment), experiment.student.source
    if isinstance(source, CheckpointModel):
        states = 1 if experiment.runtime.trainer.checkpoint_minutes is None else KEPT + 2
        needed += training_bytes(
            parameter_count(source.path), experiment.train, states, experiment.averaged is not None
        )
    store.require_space(needed, "one round")


def bytes_per_round(e: Experiment) -> int:
    """Upper estimate of a round's rollouts and signals in bytes, uncompressed, every completion at full length."""
    return sum(_bytes_of_tables(e).values())


def _bytes_of_tables(e: Experiment) -> dict[str, int]:
    """The same, by the field of `policy.retain` that they fall under."""
    tokens = e.rollout.prompts_per_round * e.rollout.num_generations * e.rollout.max_completion_length
    signals = 6 * 4 + sum(8 * (need.k or 0) for need in e.objective.needs().signals)
    return {"rollouts": tokens * (4 + 4), "signals": tokens * signals}


def bytes_of_run(e: Experiment, parameters: int) -> dict[str, int]:
    """Upper estimate of what the store holds of a run after all its rounds, in bytes by field of `policy.retain`: of each what is
    kept, while the newest round is being made.

    `parameters`: of the student. With adapters every state has the frozen weights as hard links: they are counted once. An
    average of the weights counts with trainer_state, and so does its export."""
    rounds, parts = e.policy.rounds, _bytes_of_tables(e)
    student = parameters * (2 if e.train.dtype == "bfloat16" else 4)
    averaged = e.averaged is not None
    state = 0 if e.train.lora is not None else (16 if averaged else 12) * parameters
    parts |= {"students": student, "trainer_state": state + (student if averaged else 0)}
    found = {}
    for name, size in parts.items():
        keep = getattr(e.policy.retain, name) if e.policy.collect else None
        found[name] = size * (rounds if keep is None else min(rounds, keep + 1))
    if e.train.lora is not None and rounds:
        found["trainer_state"] += parts["students"]  # the frozen weights
    return found
