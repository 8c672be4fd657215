"""A run whose teacher is its own student: which weights score which round, and what collection, restore and replay keep of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scripted_run
from in_process import go, gone
from key_walk import Keys

from flows.cli.export import export
from flows.distill import distill
from flows.experiment import Experiment
from flows.run.executor import Planner
from flows.run.runner import fork_experiment, resume_experiment
from storage.errors import ConfigError, InputError
from storage.runs import RoundState, Run
from storage.store import Artifact, Store
from storage.upkeep.retention import best_round

CONTEXT = "{solution} {prompt}"
KINDS = ({"kind": "initial"}, {"kind": "previous_round"}, {"kind": "ema"}, {"kind": "ema", "per": "step", "decay": 0.5})


def experiment(source: dict[str, Any], rounds: int, **policy: Any) -> Experiment:
    teacher = {"source": source, "context": CONTEXT}
    return Experiment.model_validate(
        scripted_run.EXPERIMENT | {"teacher": teacher, "policy": {"rounds": rounds} | policy}
    )


def made(root: Path, round: int, label: str, name: str) -> Artifact:
    state = next(r for r in Run.open(root, "one").state.rounds if r.round == round)
    artifact = Store(root).get(name, state.stages[label].artifacts[name])
    assert artifact is not None
    return artifact


def root_of(tmp_path: Path, source: dict[str, Any]) -> Path:
    return scripted_run.prepare_root(tmp_path / "store", experiment(source, 1))


@pytest.mark.parametrize("source", KINDS, ids=lambda source: "-".join(map(str, source.values())))
def test_a_round_is_scored_by_the_teacher_after_the_one_before(tmp_path: Path, source: dict[str, Any]) -> None:
    root = root_of(tmp_path, source)
    go(root, experiment(source, 3))
    initial = made(root, 0, "model", "model").content["weights"]
    assert "model_teacher" not in Run.open(root, "one").state.rounds[0].stages
    for number in (1, 2, 3):
        holds = initial
        if number > 1 and source["kind"] == "previous_round":
            holds = made(root, number - 1, "train", "student").content["weights"]
        if number > 1 and source["kind"] == "ema":
            holds = made(root, number - 1, "train", "teacher_ema").content["weights"]
        signal, evaluation = made(root, number, "supervise", "teacher_topk"), made(root, number, "evaluate", "evaluate")
        assert signal.inputs["teacher:weights"] == holds
        assert evaluation.inputs["teacher:weights"] == holds
        if source["kind"] == "previous_round":
            assert made(root, number, "supervise", "sampled").inputs["student:weights"] == holds
    assert go(root, experiment(source, 3)) == []
    assert ("teacher_ema" in Run.open(root, "one").state.rounds[1].stages["train"].artifacts) == (
        source["kind"] == "ema"
    )


class Given(Keys):
    """What the stages were given as teacher and drafts: (round, label) -> place of the artifact, "round/label/output"."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.given: dict[tuple[int, str], dict[str, str]] = {}

    def __call__(self, label: str, make: Any, *args: Any, **inputs: Any) -> dict[str, Artifact]:
        places = {key: place for place, key in reversed(self.found.items())}  # the first place of a key
        found = {name: places[inputs[name].key] for name in ("teacher", "drafts") if inputs.get(name) is not None}
        self.given[self._round, label] = found
        return super().__call__(label, make, *args, **inputs)

    stored = __call__


def given(store: Path, source: dict[str, Any], behaviour: dict[str, Any]) -> dict[tuple[int, str], dict[str, str]]:
    e = experiment(source, 2)
    data = e.model_dump(mode="json")
    data["rollout"] |= {"behaviour": behaviour}
    stages = Given(Store(store))
    distill(Experiment.model_validate(data), stages, 2)
    return stages.given


@pytest.mark.parametrize(
    ("source", "second"),
    [
        ({"kind": "initial"}, "0/model/model"),
        ({"kind": "previous_round"}, "1/train/student"),
        ({"kind": "ema"}, "1/train/teacher_ema"),
    ],
)
def test_a_blend_is_with_the_teacher_that_scores_the_round(tmp_path: Path, source: dict[str, Any], second: str) -> None:
    found = given(tmp_path, source, {"kind": "trb", "epsilon": 0.01})
    for label in ("rollout", "supervise"):
        assert found[1, label]["teacher"] == "0/model/model"
        assert found[2, label]["teacher"] == second
    assert found[2, "evaluate"]["teacher"] == second


def test_the_initial_student_writes_its_drafts_once(tmp_path: Path) -> None:
    found = given(tmp_path, {"kind": "initial"}, {"kind": "teacher_prefix", "cap": 3})
    for number in (1, 2):
        assert found[number, "draft"] == {"teacher": "0/model/model"}
        assert found[number, "rollout"] == {"drafts": "1/draft/draft"}


def test_a_teacher_that_is_the_student_is_exported_as_the_student(tmp_path: Path) -> None:
    e = experiment({"kind": "ema"}, 1)
    Run.create(Store(tmp_path).root, "one", e.model_dump(mode="json"), e.identity())
    with pytest.raises(InputError, match=r"the teacher of run 'one' is its own student \(ema\); export that"):
        export("one", tmp_path / "out", teacher=True, root=tmp_path)


def test_averages_are_kept_as_trainer_states_are_and_made_again_equal(tmp_path: Path) -> None:
    source = {"kind": "ema"}
    root = root_of(tmp_path, source)
    go(root, experiment(source, 5))
    best = best_round(Run.open(root, "one").state)
    old = [number for number in (1, 2, 3) if number != best]
    assert gone(root) == {"trainer_state": old, "teacher_ema": old}
    whole = made(root, old[0], "train", "teacher_ema").content
    go(root, resume_experiment("one", root, ["policy.rounds=6"]), restore=old[0])
    store, again = Store(root), made(root, old[0], "train", "teacher_ema")
    assert store.evicted(again) is None and again.content == whole and store.verify(again) == []
    kept = root_of(tmp_path / "named", source)
    go(kept, experiment(source, 5, keep_rounds=[1]))
    assert 1 not in gone(kept).get("teacher_ema", [])


def test_a_run_resumes_with_the_average_of_its_last_round(tmp_path: Path) -> None:
    source = {"kind": "ema"}
    once, twice = root_of(tmp_path / "once", source), root_of(tmp_path / "twice", source)
    go(once, experiment(source, 4))
    go(twice, experiment(source, 2))
    go(twice, resume_experiment("one", twice, ["policy.rounds=4"]))
    states = [Run.open(root, "one").state.rounds[4] for root in (once, twice)]
    assert states[0].student_sha256 == states[1].student_sha256
    assert states[0].stages["train"].artifacts == states[1].stages["train"].artifacts


def test_a_fork_keeps_the_teacher(tmp_path: Path) -> None:
    source = {"kind": "ema"}
    root = root_of(tmp_path, source)
    go(root, experiment(source, 2))
    for change in ("teacher.source.decay=0.5", "teacher.context='{answer} {prompt}'"):
        with pytest.raises(ConfigError, match="a fork keeps the teacher"):
            fork_experiment("one", 2, root, [change])
    go(root, fork_experiment("one", 2, root, ["train.lr=0.01", "policy.rounds=3"]), "fork")
    fork = Run.open(root, "fork").state.rounds[3]
    signal = Store(root).get("teacher_topk", fork.stages["supervise"].artifacts["teacher_topk"])
    assert signal is not None
    assert signal.inputs["teacher:weights"] == made(root, 2, "train", "teacher_ema").content["weights"]


def test_a_fork_measures_no_kl_to_a_teacher_that_lacks_its_context(tmp_path: Path) -> None:
    """Held-out prompts get the teacher's context only where the evaluation asks the teacher, and a fork takes its parent's."""
    root = tmp_path / "store"
    for name, kl, override in (("without", 0, None), ("with", None, 0)):
        e = experiment({"kind": "initial"}, 0)
        e = e.model_copy(update={"evaluate": e.evaluate.model_copy(update={"kl_prompts": kl})})
        run = Run.create(root, name, e.model_dump(mode="json"), e.identity())
        run.save(run.state.model_copy(update={"rounds": [RoundState(round=0, student_sha256="0")]}))
        change = [f"evaluate.kl_prompts={'null' if override is None else override}"]
        if kl is None:
            fork_experiment(name, 0, root, change)
        else:
            with pytest.raises(ConfigError, match=r"evaluate.kl_prompts: 'without' measured no KL.* prompts of eval"):
                fork_experiment(name, 0, root, change)
        fork_experiment(name, 0, root, ["train.lr=0.5"])


def test_the_plan_of_a_finished_run_finds_the_round_that_a_replay_repeats(tmp_path: Path) -> None:
    source = {"kind": "ema"}
    root = root_of(tmp_path, source)
    e = experiment(source, 3)
    go(root, e)
    planner = Planner(Store(root))
    stored = Experiment.model_validate(Run.open(root, "one").experiment)
    distill(stored, planner, 3)
    origin = planner.lineage.find(3, "train")
    assert origin is not None and set(origin.made) == {"student", "trainer_state", "train", "teacher_ema"}
    supervised = planner.lineage.find(3, "supervise")
    assert supervised is not None
    assert made(root, 2, "train", "teacher_ema") in supervised.inputs
