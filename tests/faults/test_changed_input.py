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

from flows.experiment import Experiment
from flows.run.runner import run_experiment
from storage.runs import Run

BASE = scripted_run.experiment()
ORDER = ("rollout", "supervise", "train", "evaluate")
OURS = (*ORDER, "objective", "runtime", "policy")
"""Parts of a config whose stages the scripted engines make; models and prompts are given."""
ENGINES = {"sampled", "mask", "teacher_topk"}
"""Signals that the scripted scorer has."""
GIVEN = {("supervise", "special_tokens", "tokens"): ("b7",)}
"""Values that only this run's data admits: a token of its vocabulary."""


def variations() -> Iterator[tuple[str, Experiment]]:
    """(field, the experiment with another value of it), one for every field that has one which can be run."""
    data = BASE.model_dump(mode="json")
    for path, model, name in fields(BASE):
        if path[0] not in OURS or path == ("policy", "rounds") or path[:2] == ("runtime", "device"):
            continue
        for value in [GIVEN[path]] if path in GIVEN else other_values(model, name):
            other = validated(changed(data, path, value))
            if other is None or other == BASE or {need.name for need in other.objective.needs().signals} - ENGINES:
                continue
            yield ".".join(map(str, path)), other
            break


VARIATIONS = dict(variations())
SHORT = ("supervise.encoding", "runtime.threads")


def make(e: Experiment, root: Path, name: str) -> tuple[dict[int, dict[str, dict[str, str]]], list[Any], list[str]]:
    """The keys by round, stage and output; the jobs that the engines did; the students."""
    pool = in_process.InProcess()
    run_experiment(e, name=name, root=root, prefect=False, workers=pool)  # type: ignore[arg-type]
    state = Run.open(root, name).state
    assert state.status == "finished"
    keys = {r.round: {label: dict(stage.artifacts) for label, stage in r.stages.items()} for r in state.rounds}
    return keys, pool.jobs, [str(r.student_sha256) for r in state.rounds]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = scripted_run.prepare_root(tmp_path_factory.mktemp("finished") / "store")
    make(BASE, root, "base")
    return root


@both_forms(short=len(SHORT), full=len(VARIATIONS))
def test_one_field_changed(finished: Path, template: Path, trials: Trials, tmp_path: Path, count: int) -> None:
    names = list(VARIATIONS)
    random.Random(0).shuffle(names)

    def attempt(name: str) -> None:
        roots = [tmp_path / f"{name} {kind}" for kind in ("again", "anew")]
        for source, root in zip((finished, template), roots, strict=True):
            shutil.copytree(source, root)
        e = VARIATIONS[name]
        before, nothing, _ = make(BASE, roots[0], "base")
        assert nothing == []
        after, jobs, students = make(e, roots[0], "changed")
        assert students == make(e, roots[1], "changed")[2]  # as if nothing had been there
        due = due_of(name, e)
        for number, stages in after.items():
            for label, outputs in stages.items():
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
        assert make(e, roots[0], "changed-again")[1] == [] and make(BASE, roots[0], "back")[1] == []
        for root in roots:
            shutil.rmtree(root)

    trials(12, "one field changed in a whole run", SHORT if count == len(SHORT) else names, attempt)


def due_of(name: str, e: Experiment) -> set[str]:
    """Stages (of supervise: signals) whose own key must change."""
    path = name.split(".")
    if path[0] in ("runtime", "policy"):
        return set()
    due = expected(tuple(path))
    if path[0] == "objective":
        asked, asks = ({(need.name, need.k) for need in which.objective.needs().signals} for which in (BASE, e))
        due = due | {signal for signal, _ in asked ^ asks}
    return due


def stages_of(due: set[str]) -> set[str]:
    return {"supervise" if name in SIGNALS else name for name in due}
