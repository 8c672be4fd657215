"""Repairs a run's damaged files: its identity and state are rebuilt from the experiment and the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flows.distill import distill, set_label
from flows.experiment import Experiment, as_stored, experiment_of, refuse_other_plugins
from flows.run.executor import Made, P, Planner, metrics_of, round_metrics, rows_of
from storage.artifacts.artifact import artifact_directory
from storage.errors import CorruptArtifact
from storage.runs import RECORDS, RoundState, Run, RunState, StageState
from storage.store import Artifact, Store
from tasks.stage import Work


def stands_for(run: Run, experiment: Experiment) -> bool:
    """True if every readable record of the run describes this experiment; fields missing from old records get today's defaults.

    Raises CorruptArtifact when no record is readable, IdentityMismatch when only a plugin differs."""
    records, problems = list[dict[str, Any]](), list[str]()
    for record in ("experiment", "identity"):
        try:
            records.append(getattr(run, record))
        except CorruptArtifact as error:
            problems.append(str(error))
    if not records:
        raise CorruptArtifact(
            "\n".join(problems)
            + f"\nno readable record of {run.name!r} is left: use another --name (finished stages are found in the store and"
            f" not run again), and remove {run.directory}"
        )
    for data in records:
        held = experiment_of(as_stored(data), f"run {run.name}")
        if held.identity() != experiment.identity():
            if held.plugins == experiment.plugins:
                refuse_other_plugins(held.plugin_sources, experiment.plugin_sources, run.name)
            return False
    return True


def mend(run: Run, experiment: Experiment, store: Store) -> tuple[RunState, list[str]]:
    """Saves the current experiment, and quarantines and rebuilds the run's damaged files.

    Returns the state and messages for the user. Call with the run's lock held, after `stands_for`."""
    messages: list[str] = []
    damage = _damage(run)
    state = rebuilt_state(run.name, experiment, store) if "state.json" in damage else run.state
    for file, problem in damage.items():  # a missing file counts as damage: nothing is collected until it is rebuilt
        store.quarantine(run.directory / file, problem)
        messages.append(f"{problem.partition('. ')[0]}; moved to quarantine and rebuilt")
    run.save_experiment(experiment.model_dump(mode="json"))
    if "identity.json" in damage:
        run.save_identity(experiment.identity())
    if "state.json" in damage:
        last = state.last_trained
        messages.append(f"the store has {'no round' if last is None else f'rounds 0 to {last.round}'} of this run")
        run.save(state)
    return state, messages


def _damage(run: Run) -> dict[str, str]:
    """File of the run -> its damage."""
    found = {}
    for file in RECORDS:
        try:
            getattr(run, file.partition(".")[0])
        except CorruptArtifact as error:
            found[file] = str(error)
    return found


def rebuilt_state(name: str, experiment: Experiment, store: Store) -> RunState:
    """The state of a run of this experiment, from the store: every stage up to and including the first that must run, so that
    its finished shards are kept. Starts nothing."""
    rounds = experiment.policy.rounds
    while True:
        recorder = _Recorder(store)
        distill(experiment, recorder, rounds)
        # an evaluation that is not there hinders no later round
        if any(line.state in ("run", "pending") for line in recorder.lines if not _only_measures(line.stage)):
            return RunState(name=name, status="stopped", rounds=recorder.rounds)
        rounds = 2 * rounds + 1  # everything is there: it may have run more rounds than its config asks for now


def _only_measures(label: str) -> bool:
    return label == "evaluate" or label.startswith(
        tuple(set_label(stage, "") for stage in ("evaluate", "prepare", "harness"))
    )


class _Recorder(Planner):
    """A planner that records what it resolves as a run's state."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.rounds: list[RoundState] = []
        self._now = RoundState(round=0)

    def __call__(self, label: str, make: Callable[P, Work], *args: P.args, **inputs: P.kwargs) -> Made:
        works: list[Work] = []

        def noted(*args: P.args, **inputs: P.kwargs) -> Work:
            works.append(make(*args, **inputs))
            return works[-1]

        made = super().__call__(label, noted, *args, **inputs)
        for work in works:  # empty for a pending stage, which has no key yet
            keys = {name: work.shared.get(name, spec.key) for name, spec in work.outputs.items()}
            stage = StageState(key=next(iter(keys.values())), artifacts=keys)
            if isinstance(made, dict):
                stage.state, stage.seconds, stage.rows = "cached", 0.0, rows_of(made)
                self._now.metrics |= round_metrics(label, metrics_of(made, self.store))
            elif not any(artifact_directory(self.store.root, *name).is_dir() for name in keys.items()):
                continue  # not started
            self._now.stages[label] = stage
        return made

    @contextmanager
    def round(self, number: int) -> Iterator[_Recorder]:
        with super().round(number):
            self._now = RoundState(round=number)
            yield self
            if self._now.stages:
                self.rounds.append(self._now)

    def ends_with(self, student: Artifact) -> None:
        if isinstance(student, Artifact):
            self._now.student_sha256 = student.content["weights"]
