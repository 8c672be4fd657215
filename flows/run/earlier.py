"""What this version would make otherwise of a run that an earlier version made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import OpdError
from storage.runs import Run, RunState
from storage.store import Artifact, Store

if TYPE_CHECKING:  # the commands that only read a store import no config
    from flows.experiment import Experiment


def outdated(state: RunState, root: Path) -> list[str]:
    """What of a run's results the next call makes again, because an earlier version made them otherwise: a sentence each.

    An identity has a field for each such change, only where the change matters (`prepare_work`, `train_work`). So what lacks
    the field, and would have it now, is outdated. Nothing is said of what cannot be read (a model or a prompt file that is
    gone). transformers is loaded at most once per tokenizer (the store remembers the answer), and for models with dropout."""
    from flows.experiment import as_stored, experiment_of

    store = Store(root)
    with suppress(OpdError):  # an unreadable experiment is reported by the command that needs it
        experiment = experiment_of(as_stored(Run.open(root, state.name).experiment), f"run {state.name}")
        return [*_prompts(experiment, state, store), *_trainings(experiment, state, store)]
    return []


def _prompts(experiment: Experiment, state: RunState, store: Store) -> Iterator[str]:
    from tasks.inputs.sources import READING, source_identity
    from tasks.prepare import CHECKED, changed_since_0_1
    from tasks.routing import teacher_label

    made, config = _made(state, store, 0, "prepare", "prepare"), experiment.at(0).prompts
    if made is None:
        return
    if CHECKED not in made.meta:
        labels = ("model", *(teacher_label("model_teacher", name) for name in experiment.at(0).taught_by))
        models = (_made(state, store, 0, label, "model") for label in labels)
        folders = [store.folder(model) for model in models if model is not None]
        with suppress(OpdError):
            yield from (f"prompts: {reason}" for _, reason in changed_since_0_1(config, folders, store.memo).values())
    for split, source in config.sources().items():
        with suppress(OpdError):
            then, now = made.identity.get(split), source_identity(source, store.memo)
            if READING in now and then == {name: value for name, value in now.items() if name != READING}:
                how = ", ".join(_READ[kind] for kind in now[READING])
                yield f"prompts.{split}: {getattr(source, 'path', split)} is read otherwise now: {how}"


_READ = {
    "columns": "a column that prompts.*.columns gives to another one is not read under its own name as well",
    "nulls": "nulls that Arrow adds to tool calls are left out",
    "numbers": "2.0 in a column of doubles is 2",
}


def _trainings(experiment: Experiment, state: RunState, store: Store) -> Iterator[str]:
    from tasks.inputs.models import DROPOUT, dropout_identity
    from tasks.routing import teacher_label
    from tasks.trainer.config import FORWARD, forward_identity

    found: dict[str, list[str]] = {}
    for round in state.rounds:
        now = experiment.at(round.round)
        for label, config, source in (
            *(
                (teacher_label("warmup_teacher", name), model.warmup, now.source_of(model))
                for name, model in now.taught_by.items()
            ),
            ("warmup", now.student.warmup, now.student.source),
            ("train", now.train, now.student.source),
        ):
            made = _made(state, store, round.round, label, "train" if label == "train" else "warmup")
            if made is None or config is None:
                continue
            where = label if label != "train" else f"train of round {round.round}"
            marks = forward_identity(config)
            with suppress(OpdError):
                marks |= dropout_identity(source, config.dropout)
            for name in marks.keys() - made.identity.keys():
                found.setdefault(name, []).append(where)
    texts = {
        FORWARD: "with LoRA in 16 bits the exported student was not the trained one (adapters were rounded into the weights after"
        " training, not in it)",
        DROPOUT: "the dropout in the model's config.json acted; it is off by default",
    }
    yield from (f"{', '.join(found[name])}: {text}" for name, text in texts.items() if name in found)


def _made(state: RunState, store: Store, number: int, label: str, stage: str) -> Artifact | None:
    """The artifact of a stage of a round, if the run has made it."""
    for round in state.rounds:
        if round.round == number and label in round.stages:
            key = round.stages[label].artifacts.get(stage)
            return store.get(stage, key) if key is not None else None
    return None
