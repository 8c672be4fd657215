"""A run whose own files are damaged goes on: what they said follows from the experiment and from what the store has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flows.distill import distill
from flows.experiment import Experiment, experiment_of, refuse_other_plugins
from flows.run.executor import Planner, Result, round_metrics, rows_of
from storage.artifacts.artifact import artifact_directory
from storage.errors import CorruptArtifact
from storage.runs import RECORDS, RoundState, Run, RunState, StageState
from storage.store import Artifact, Store
from tasks.stage import Work


def stands_for(run: Run, experiment: Experiment) -> bool:
    """Whether a run is of this experiment, by both of its records (as this version reads them, whatever fields the version
    that wrote them did not have), or by the one that is whole. CorruptArtifact when neither is, IdentityMismatch when only
    a plugin is another."""
    found, problems = list[dict[str, Any]](), list[str]()
    for record in ("experiment", "identity"):
        try:
            found.append(getattr(run, record))
        except CorruptArtifact as error:
            problems.append(str(error))
    if not found:
        raise CorruptArtifact(
            "\n".join(problems)
            + f"\nnothing says any more what {run.name!r} is: give another --name (finished stages are"
            f" found in the store and not made again), and remove {run.directory}"
        )
    for data in found:
        held = experiment_of(data, f"run {run.name}")
        if held.identity() != experiment.identity():
            if held.plugins == experiment.plugins:
                refuse_other_plugins(held.plugin_sources, experiment.plugin_sources, run.name)
            return False
    return True


def mend(run: Run, experiment: Experiment, store: Store) -> tuple[RunState, list[str]]:
    """Writes the experiment as it is now, sets the run's damaged files aside and makes them again; returns the state and what
    there is to say. The run stands for the experiment, its lock is held."""
    said: list[str] = []
    damage = _damage(run)
    state = rebuilt_state(run.name, experiment, store) if "state.json" in damage else run.state
    for file, problem in damage.items():  # until the new one is there it counts as damaged: nothing is collected
        store.quarantine(run.directory / file, problem)
        said.append(f"{problem.partition('. ')[0]}; set aside and made again")
    run.save_experiment(experiment.model_dump(mode="json"))
    if "identity.json" in damage:
        run.save_identity(experiment.identity())
    if "state.json" in damage:
        rounds = max((r.round for r in state.rounds if r.student_sha256), default=None)
        said.append(f"the store has {'no round' if rounds is None else f'rounds 0 to {rounds}'} of this run")
        run.save(state)
    return state, said


def _damage(run: Run) -> dict[str, str]:
    """File of the run -> what is wrong with it."""
    found = {}
    for file in RECORDS:
        try:
            getattr(run, file.partition(".")[0])
        except CorruptArtifact as error:
            found[file] = str(error)
    return found


def rebuilt_state(name: str, experiment: Experiment, store: Store) -> RunState:
    """What a run of this experiment has in the store: every stage up to the first that must be made, and that one, so that
    what is finished of it is kept. Starts nothing."""
    rounds = experiment.policy.rounds
    while True:
        recorder = _Recorder(store)
        distill(experiment, recorder, rounds)
        if any(line.state in ("run", "pending") for line in recorder.lines):
            return RunState(name=name, status="stopped", rounds=recorder.rounds)
        rounds = 2 * rounds + 1  # it had gone further than its config says now


class _Recorder(Planner):
    """A plan, written down as a run's state."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.rounds: list[RoundState] = []
        self._now = RoundState(round=0)

    def __call__(self, label: str, make: Callable[..., Work], *inputs: Any) -> Result:
        works: list[Work] = []

        def noted(*values: Any) -> Work:
            works.append(make(*values))
            return works[-1]

        made = super().__call__(label, noted, *inputs)
        for work in works:  # none for a stage that waits for what is not made yet: it has no key
            keys = {name: work.shared.get(name, spec.key) for name, spec in work.outputs.items()}
            stage = StageState(key=next(iter(keys.values())), artifacts=keys)
            if isinstance(made, dict):
                stage.state, stage.seconds, stage.rows = "cached", 0.0, rows_of(made)
                self._now.metrics |= round_metrics(label, made)
            elif not any(artifact_directory(self.store.root, *name).is_dir() for name in keys.items()):
                continue  # nobody has begun it
            self._now.stages[label] = stage
        return made

    @contextmanager
    def round(self, number: int) -> Iterator[_Recorder]:
        with super().round(number):
            self._now = RoundState(round=number)
            yield self
            if self._now.stages:
                self.rounds.append(self._now)

    def ends_with(self, student: Result) -> None:
        if isinstance(student, Artifact):
            self._now.student_sha256 = student.content["weights"]
