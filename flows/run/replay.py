"""Replay: repeats a round's stages from their recorded inputs in a scratch store, and compares bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.config_file import validate
from flows.distill import distill
from flows.experiment import Experiment, overridden, with_plugins
from flows.run.executor import Planner
from flows.run.hints import opd_command
from flows.run.lineage import Origin, Rebuild, rebuild
from flows.run.runner import logger, require_machines, stored_experiment
from flows.run.stopping import terminating
from storage.artifacts.artifact import provenance
from storage.artifacts.numerics import NUMERICS, several
from storage.artifacts.verify import Verified, move_damaged, verify_artifact
from storage.disk.files import temporary_name, unique
from storage.disk.locks import locked
from storage.errors import ConfigError, CorruptArtifact, Evicted, InputError
from storage.identity import canonical_json
from storage.runs import Run, StageState
from storage.store import Artifact, Store
from storage.upkeep.compare import Differences, differences
from storage.upkeep.gc import HELD, KEPT_REPLAY
from storage.upkeep.transfer import lend
from tasks.stage import Context
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

STAGES = ("rollout", "judge", "context", "supervise", "train", "evaluate")

NOT_IN_EVERY_ROUND = {
    "judge": "nothing in it reads rewards",
    "context": "its samples have no contexts of their own",
}


@dataclass(frozen=True)
class Replayed:
    """Result for one artifact; without differences it equals the recorded one, bit for bit."""

    stage: str
    artifact: str
    differences: tuple[str, ...]
    seconds: float
    largest_difference: float | None = None
    """The largest absolute difference of two numbers, where nothing but numbers differs."""
    other_processor: str | None = None
    """The processor that made the recorded one, where it is not that of this machine."""
    unrepeatable: str | None = None
    """Why it was not repeated: its shards were made at different numerics (a stage continued with another runtime); lists
    them"""

    def as_json(self) -> dict[str, Any]:
        """Plain values; `identical` is null if the artifact was not repeated."""
        return asdict(self) | {"identical": None if self.unrepeatable else not self.differences}


def replay_round(
    run: Run,
    root: Path,
    round: int,
    stages: tuple[str, ...],
    overrides: list[str],
    keep: bool,
    tell: Callable[[str], None],
) -> list[Replayed]:
    """Repeats each stage from its recorded inputs, at the recorded numerics changed by `overrides` (runtime.*).

    Raises InputError for an unfinished round or an unknown stage, Evicted or CorruptArtifact if an input is missing or
    damaged, ConfigError where this machine or the cluster cannot run the workers."""
    unknown = sorted(set(stages) - set(STAGES))
    if unknown or not stages:
        raise InputError(f"--stages {','.join(stages)!r}: choose of {', '.join(STAGES)}")
    if round > (last := run.state.rounds_done):
        raise InputError(f"run {run.name!r}: round {round} is not finished; the last finished one is {last}")
    experiment = with_plugins(stored_experiment(run), run.name)
    experiment.runtime.tell_libraries()
    store = Store(root)
    lineage = _recall(run, store, experiment, round, [stage for stage in STAGES if stage in stages])
    results: list[Replayed] = []
    with _scratch(store, keep, tell) as folder, terminating():
        at: dict[str, Experiment] = {}
        for numerics in (numerics for origin in lineage for numerics in _by_numerics(origin)):
            if numerics not in at:
                (place := folder / f"numerics-{len(at)}").mkdir()
                runtime = _runtime(json.loads(numerics), experiment.runtime, overrides, place)
                at[numerics] = experiment.model_copy(update={"runtime": runtime})
        for known in at.values():  # all before the first stage, which may take hours
            require_machines(known, store.root)
        for origin in lineage:
            results += _replay(origin, at, run, store, folder / origin.label, tell)
    return results


def _by_numerics(origin: Origin) -> dict[str, dict[str, Artifact]]:
    """What can be repeated of what a stage made, by the recorded numerics as JSON: signals may have been made at different
    ones. By name."""
    sets = dict[str, dict[str, Artifact]]()
    for name, artifact in sorted(origin.made.items()):
        if not several(artifact.provenance):
            sets.setdefault(canonical_json(artifact.provenance.get(NUMERICS) or {}), {})[name] = artifact
    return sets


def _recall(run: Run, store: Store, experiment: Experiment, round: int, stages: list[str]) -> list[Origin]:
    """The stages as the main path calls them; their inputs must be in the store."""
    planner = Planner(store)
    distill(experiment, planner, round)
    states = next(r.stages for r in run.state.rounds if r.round == round)
    found = []
    if "evaluate" in stages and "evaluate" not in states:
        raise InputError(
            f"run {run.name!r}: round {round} was not evaluated (policy.evaluate_every); to do it now:"
            f" {opd_command(store.root, 'evaluate', run.name, '--round', str(round))}"
        )
    for stage, why in NOT_IN_EVERY_ROUND.items():
        if stage in stages and stage not in states:
            raise InputError(
                f"run {run.name!r}: round {round} has no stage {stage}, because {why}; leave it out of --stages"
            )
    planned = {line.stage for line in planner.lines}  # not what `opd evaluate --prompts` measured beside
    of_round = [label for stage in stages for label in _labels(stage, states) if label == stage or label in planned]
    for stage in of_round:
        origin = planner.lineage.find(round, stage)
        keys = {name: artifact.key for name, artifact in origin.made.items()} if origin else {}
        if origin is None or keys != states[stage].artifacts:
            raise CorruptArtifact(
                f"run {run.name!r} round {round}: {stage} or one of its inputs is damaged, or this version of the program"
                f" gives it another key; check with `opd verify {run.name}`, rebuild with `opd resume {run.name}`"
            )
        _require_inputs(run, origin, planner.lineage.to_restore(origin.inputs))
        found.append(origin)
    return found


def _labels(stage: str, states: Mapping[str, StageState]) -> list[str]:
    """What the stage is called in a round: `supervise`, or with several teachers once for each, `supervise_NAME`."""
    return [label for label in states if label == stage or label.startswith(f"{stage}_")] or [stage]


def _require_inputs(run: Run, origin: Origin, lost: list[Rebuild]) -> None:
    """Raises Evicted, with the commands that rebuild it, if an input's data was removed."""
    inputs = {(artifact.stage, artifact.key) for artifact in origin.inputs}
    direct = [
        (again.origin.round, a.stage) for again in lost for a in again.lost.values() if (a.stage, a.key) in inputs
    ]
    if direct:
        names = ", ".join(f"{stage} of round {number}" for number, stage in direct)
        commands = [f"opd restore {run.name} --round {number}" for number in sorted({number for number, _ in direct})]
        raise Evicted(
            f"a replay of {origin.label} of round {origin.round} needs {names}, which policy.retain or `opd gc` removed.\n"
            f"rebuild with: {' && '.join(commands)}\n"
            "to keep replays possible, policy.retain must keep rollouts and signals of the round, and trainer_state and"
            " students of the round before"
        )


@contextmanager
def _scratch(store: Store, keep: bool, tell: Callable[[str], None]) -> Iterator[Path]:
    """A folder beside the artifacts, so that inputs can be hard links. `opd gc` skips it while its lock is held."""
    folder = store.root / temporary_name("replay")
    folder.mkdir()
    try:
        with locked(folder / HELD, lambda who: None):
            yield folder
    finally:
        if keep:
            # a name without a process id: the next run does not remove it
            kept = store.root / f"{KEPT_REPLAY}{unique()}"
            os.rename(folder, kept)
            tell(f"the scratch stores are in {kept} (`opd gc --apply` removes them, after an hour at the earliest)")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _replay(
    origin: Origin, at: Mapping[str, Experiment], run: Run, store: Store, folder: Path, tell: Callable[[str], None]
) -> list[Replayed]:
    """One stage again; `at` has the experiment at every set of numerics of `_by_numerics`."""
    scratch = Store(folder / "store")
    with store.using(origin.inputs):
        members = [store.require(*part[:2]) for a in origin.inputs for part in a.meta.get("members", ())]
        for artifact in (*origin.inputs, *members):  # of a mixture also the teachers that it names
            verified = Verified()
            verify_artifact(store.root, artifact.stage, artifact.key, verified)
            if verified.problems:
                move_damaged(store.root, verified.problems)
                raise CorruptArtifact(
                    "\n".join(map(str, verified.problems)) + f"\nto rebuild only this: opd resume {run.name}"
                )
            lend(store, artifact, scratch)
    results = []
    for artifact in (artifact for _, artifact in sorted(origin.made.items())):
        if why := several(artifact.provenance):
            tell(f"{origin.label} of round {origin.round}: {artifact.stage}/{artifact.key} cannot be replayed: {why}")
            results.append(Replayed(origin.label, f"{artifact.stage}/{artifact.key}", (), 0.0, unrepeatable=why))
    for number, (numerics, artifacts) in enumerate(_by_numerics(origin).items()):
        tell(f"{origin.label} of round {origin.round}: {_numerics(at[numerics].runtime)}")
        results += _make(origin, artifacts, at[numerics], (store, scratch), folder / f"logs-{number}")
    return results


def _make(
    origin: Origin,
    artifacts: Mapping[str, Artifact],
    experiment: Experiment,
    stores: tuple[Store, Store],
    logs: Path,
) -> list[Replayed]:
    store, scratch = stores
    started = time.monotonic()
    logs.mkdir()
    with WorkerPool(experiment.runtime, logs, experiment.plugins) as workers:
        recorded = {(artifact.stage, artifact.key): artifact.provenance for artifact in artifacts.values()}
        context = Context(
            scratch,
            experiment.runtime,
            workers,
            lambda *_, **__: None,
            logger(logs / "replay.log"),
            experiment.plugins,
            recorded=recorded,
        )
        made = rebuild(origin.work, artifacts, context)
    seconds = time.monotonic() - started
    compared = {name: differences(artifact, store, made[name], scratch) for name, artifact in artifacts.items()}
    return [_replayed(origin.label, artifact, compared[name], seconds) for name, artifact in artifacts.items()]


def _replayed(label: str, recorded: Artifact, found: Differences, seconds: float) -> Replayed:
    then, here = recorded.provenance.get("processor"), provenance()["processor"]
    other = f"{then}; this machine has {here}" if found and then not in (None, here) else None
    name = f"{recorded.stage}/{recorded.key}"
    return Replayed(label, name, found.lines, seconds, found.largest, other)


def _runtime(recorded: dict[str, Any], runtime: RuntimeConfig, overrides: list[str], folder: Path) -> RuntimeConfig:
    data: dict[str, Any] = {"runtime": runtime.with_numerics(recorded, folder)}
    for text in overrides:
        if text.split(".")[0] != "runtime":
            raise ConfigError(f"--set {text}: a replay repeats the recorded experiment; only runtime.* can be set")
    data = overridden(data, overrides)
    return validate(RuntimeConfig, data["runtime"], "--set")


def _numerics(runtime: RuntimeConfig) -> str:
    shown = {name: value for name, value in runtime.numerics().items() if name != "deepspeed_config"}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
