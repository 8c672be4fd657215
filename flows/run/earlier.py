"""What this version would make otherwise of a run that an earlier version made."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from storage.errors import OpdError
from storage.runs import Run, RunState
from storage.store import Artifact, Store


def outdated_prompts(state: RunState, root: Path) -> list[str]:
    """Why the prompts of a run are not those that this version makes, a sentence each; empty where they are.

    Prompts of this version, and of runs whose models are gone, are not compared. Loads transformers at most once per
    tokenizer: the store remembers the answer."""
    store = Store(root)
    made = _made(state, store, "prepare", "prepare")
    if not made or "changed_since_0_1" in made[0].meta:
        return []
    labels = [label for round in state.rounds if round.round == 0 for label in sorted(round.stages)]
    models = [
        artifact for label in labels if label.startswith("model") for artifact in _made(state, store, label, "model")
    ]
    folders = [store.folder(model) for model in models]
    with suppress(OpdError):  # an unreadable folder or experiment is reported by the command that needs it
        from flows.experiment import experiment_of
        from tasks.prepare import changed_since_0_1

        experiment = experiment_of(Run.open(root, state.name).experiment, f"run {state.name}")
        return [reason for _, reason in changed_since_0_1(experiment.at(0).prompts, folders, store.memo).values()]
    return []


def _made(state: RunState, store: Store, label: str, stage: str) -> list[Artifact]:
    """The artifact of a stage of round 0, if the run has made it."""
    found = []
    for round in state.rounds:
        if round.round == 0 and label in round.stages:
            key = round.stages[label].artifacts.get(stage)
            artifact = store.get(stage, key) if key is not None else None
            found += [artifact] if artifact is not None else []
    return found
