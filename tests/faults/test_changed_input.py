"""A changed input recomputes exactly what depends on it (row 12): one field of a finished run's config changed, and the run made
again in the same store by scripted engines. `tests/flows/test_keys.py` does the same to every field of every model, by keys."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from fault_trials import Trials, both_forms
from key_walk import SIGNALS, changed, expected, fields, other_values, validated
from registries import plugin_path

from flows.experiment import Experiment
from flows.run.runner import run_experiment
from storage.runs import Run

ORDER = ("rollout", "judge", "context", "supervise", "train", "evaluate")
OURS = {
    "plain": (("rollout",), ("supervise",), ("train",), ("evaluate",), ("objective",), ("runtime",), ("policy",)),
    "judged": (("judge",),),
    "contexts": (("judge",), ("teacher", "context"), ("teacher", "sibling")),
}
"""Variant of the scripted run -> parts of its config whose stages the scripted engines make; models and prompts are given."""
ENGINES = {"sampled", "mask", "teacher_topk"}
"""Signals that the scripted scorer has."""
GIVEN = {
    ("supervise", "special_tokens", "tokens"): ("b7",),
    ("judge", "verifiers", 0, "target"): "judges:struck",
    ("judge", "verifiers", 1, "target"): "judges:longer",
}
"""Values that only this run's data admits: a token of its vocabulary, functions that are there."""
LEFT_OUT = {("policy", "rounds"), ("runtime", "device"), ("runtime", "cluster")}
"""Fields whose other values end the run earlier, or need another machine."""


def variations(variant: str) -> Iterator[tuple[tuple[str, ...], tuple[Experiment, Experiment]]]:
    """(variant and field, (the variant's experiment, the one with another value of the field)), one for every field that has one
    which can be run."""
    base = scripted_run.experiment(variant=variant)
    data = base.model_dump(mode="json")
    for path, model, name in fields(base):
        if path[:2] in LEFT_OUT or not any(path[: len(part)] == part for part in OURS[variant]):
            continue
        for value in [GIVEN[path]] if path in GIVEN else other_values(model, name):
            other = validated(changed(data, path, value))
            if other is None or other == base or {need.name for need in other.objective.needs().signals} - ENGINES:
                continue
            yield (variant, ".".join(map(str, path))), (base, other)
            break


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


def all_variations() -> dict[str, tuple[Experiment, Experiment]]:
    with plugin_path():
        found = [pair for variant in OURS for pair in variations(variant)]
    return {" ".join(names): pair for names, pair in found}


VARIATIONS = all_variations()
SHORT = (
    "plain supervise.encoding",
    "plain runtime.threads",
    "contexts judge.success_threshold",
    "judged judge.verifiers.1.weight",
)


def make(e: Experiment, root: Path, name: str) -> tuple[dict[int, dict[str, dict[str, str]]], list[Any], list[str]]:
    """The keys by round, stage and output; the jobs that the engines did; the students."""
    pool = in_process.InProcess()
    run_experiment(e, name=name, root=root, prefect=False, workers=pool)  # type: ignore[arg-type]
    state = Run.open(root, name).state
    assert state.status == "finished"
    keys = {r.round: {label: dict(stage.artifacts) for label, stage in r.stages.items()} for r in state.rounds}
    return keys, pool.jobs, [str(r.student_sha256) for r in state.rounds]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Variant -> a store with its finished run, and one with its models and prompts alone."""
    found = {}
    for variant in OURS:
        base, folder = scripted_run.experiment(variant=variant), tmp_path_factory.mktemp(variant)
        empty = scripted_run.prepare_root(folder / "empty", base)
        shutil.copytree(empty, folder / "finished")
        make(base, folder / "finished", "base")
        found[variant] = (folder / "finished", empty)
    return found


@both_forms(short=len(SHORT), full=len(VARIATIONS))
def test_one_field_changed(stores: dict[str, tuple[Path, Path]], trials: Trials, tmp_path: Path, count: int) -> None:
    names = list(VARIATIONS)
    random.Random(0).shuffle(names)

    def attempt(name: str) -> None:
        variant, field = name.split()
        roots = [tmp_path / f"{name} {kind}" for kind in ("again", "anew")]
        for source, root in zip(stores[variant], roots, strict=True):
            shutil.copytree(source, root)
        base, e = VARIATIONS[name]
        before, nothing, _ = make(base, roots[0], "base")
        assert nothing == []
        after, jobs, students = make(e, roots[0], "changed")
        assert students == make(e, roots[1], "changed")[2]  # as if nothing had been there
        due = due_of(field, base, e)
        for number, stages in after.items():
            for label, outputs in stages.items():
                if label not in before[number]:
                    continue  # a stage that the other behaviour has, such as the teacher's drafts
                new = {output for output, key in outputs.items() if key != before[number][label].get(output)}
                own = due & ({label} if label != "supervise" else set(outputs))
                if label in ORDER and (number > 0 or label == "evaluate"):
                    assert bool(new & own if label == "supervise" else new) or not own, (
                        f"{label} of round {number} stayed"
                    )
                if number == 0 or (
                    number == 1 and all(ORDER.index(label) < ORDER.index(first) for first in stages_of(due))
                ):
                    assert not new or own, f"{label} of round {number} was made again"
        if not due:
            assert jobs == [] and after == before
        assert make(e, roots[0], "changed-again")[1] == [] and make(base, roots[0], "back")[1] == []
        for root in roots:
            shutil.rmtree(root)

    trials(12, "one field changed in a whole run", SHORT if count == len(SHORT) else names, attempt)


def due_of(name: str, base: Experiment, e: Experiment) -> set[str]:
    """Stages (of supervise: signals) whose own key must change."""
    path = name.split(".")
    if path[0] in ("runtime", "policy"):
        return set()
    due = expected(tuple(path))
    if path[0] == "objective":
        asked, asks = ({(need.name, need.k) for need in which.objective.needs().signals} for which in (base, e))
        due = due | {signal for signal, _ in asked ^ asks}
    return due


def stages_of(due: set[str]) -> set[str]:
    return {"supervise" if name in SIGNALS else name for name in due} & set(ORDER)
