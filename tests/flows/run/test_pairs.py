"""A run whose objective compares pairs (PBSD), with scripted engines: who writes what below which prompt, in one step or apart,
and what a second call, a restoration and a longer run make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted_run
from in_process import go, gone
from registries import plugin_path

from flows.distill import distill
from flows.experiment import Experiment, with_plugins
from flows.run.executor import Planner
from storage.runs import Run
from storage.store import Artifact, Store


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


def experiment(rounds: int = 2, **policy: Any) -> Experiment:
    e = scripted_run.experiment(rounds, "pairs")
    return e.model_copy(update={"policy": e.policy.model_copy(update=policy)})


def made(root: Path, round: int, label: str, name: str) -> Artifact:
    store = Store(root)
    found = store.get(name, Run.open(root, "one").state.rounds[round].stages[label].artifacts[name])
    assert found is not None
    return found


def rows(root: Path, round: int, label: str, name: str, table: str) -> list[dict[str, Any]]:
    return Store(root).read_table(made(root, round, label, name), table).to_pylist()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of four prompts with two pairs each, in steps of four samples."""
    found = scripted_run.prepare_root(tmp_path_factory.mktemp("pairs") / "store", experiment())
    go(found, experiment())
    return found


def test_the_teacher_writes_every_second_sample_below_its_context(root: Path) -> None:
    prompts = {
        row["prompt_id"]: row for row in rows(root, 0, "prepare", "prepare", "prompts") if row["split"] == "train"
    }
    drafts = {(row["prompt_id"], row["sample_index"]): row for row in rows(root, 1, "draft", "draft", "drafts")}
    assert len(drafts) == 2 * len(prompts)
    for row in prompts.values():
        student, teacher = (bytes(t for t in row[f"{who}token_ids"] if t < 256).decode() for who in ("", "teacher_"))
        assert teacher == f"{row['answer']} {student}", "privileged"
    assert made(root, 1, "draft", "draft").key == made(root, 2, "draft", "draft").key, "written once"
    indices = []
    for number in (1, 2):
        for row in rows(root, number, "rollout", "rollout", "rollouts"):
            index = row["sample_index"]
            draft = drafts[row["prompt_id"], index // 2 % 2]
            by_teacher = (row["behaviour"], row["prefix_length"]) == ("teacher", len(row["completion_token_ids"]))
            assert by_teacher == bool(index % 2) and (by_teacher or row["behaviour"] == "student")
            assert (row["completion_token_ids"] == draft["completion_token_ids"]) == by_teacher
            assert row["prompt_token_ids"] == prompts[row["prompt_id"]]["token_ids"], (
                "the student reads the prompt alone"
            )
            indices.append(index)
    assert sorted(indices) == sorted([0, 1, 2, 3] * 8)


def test_both_of_a_pair_are_in_one_step(root: Path) -> None:
    folder = Store(root).materialize(made(root, 2, "train", "trainer_state"), "state")
    used = json.loads((folder / "used.json").read_text())
    assert [number for number, _ in used] == [1] * 4 + [2] * 4
    for _, step in used:
        pairs = [(name.rpartition("/")[0], int(name.rpartition("/")[2]) // 2) for name in step]
        assert len(step) == 4 and pairs[::2] == pairs[1::2]
    every = [name for _, step in used for name in step]
    assert len(set(every)) == len(every) == 32


def test_a_second_call_finds_all_of_it_and_another_beta_trains_anew_on_the_same_signals(root: Path) -> None:
    assert go(root, experiment()) == []
    distill(with_plugins(experiment()), planner := Planner(Store(root)), 2)
    assert {line.state for line in planner.lines} == {"cached"}
    data = experiment().model_dump(mode="json")
    data["objective"]["beta"] = 0.2
    distill(with_plugins(Experiment.model_validate(data)), planner := Planner(Store(root)), 1)
    states = {line.stage: line.state for line in planner.lines if line.round == 1}
    assert (states["draft"], states["rollout"], states["supervise"], states["train"]) == (
        "cached",
        "cached",
        "cached",
        "run",
    )


def test_what_is_evicted_is_made_again_equal(tmp_path: Path) -> None:
    root = scripted_run.prepare_root(tmp_path / "store", experiment())
    keep = experiment().policy.retain.model_copy(update={"signals": 1, "rollouts": 1})
    go(root, experiment(retain=keep))
    assert {"rollout", "sampled", "mask"} <= {name for name, rounds in gone(root).items() if 1 in rounds}
    contents = {
        name: made(root, 1, label, name).content for label, name in (("rollout", "rollout"), ("supervise", "sampled"))
    }
    go(root, experiment(retain=keep), restore=1)
    assert not {"rollout", "sampled", "mask"} & gone(root).keys()
    for label, name in (("rollout", "rollout"), ("supervise", "sampled")):
        again = made(root, 1, label, name)
        assert again.content == contents[name] and Store(root).verify(again, move=False) == []


def test_a_longer_run_goes_on_as_one_of_that_length(tmp_path: Path, root: Path) -> None:
    other = scripted_run.prepare_root(tmp_path / "store", experiment())
    go(other, experiment(1))
    go(other, experiment(2))
    students = [[round.student_sha256 for round in Run.open(at, "one").state.rounds] for at in (root, other)]
    assert students[0] == students[1] and len(students[0]) == 3
