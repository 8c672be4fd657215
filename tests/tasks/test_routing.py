"""Prompts that name their teachers, with real models and tokenizers: what each teacher reads, which tokens are masked for it, and
that its signals are those that it would give as the only teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import two_tokenizers
from scoring import InProcess, ScoringBench
from whole_round import from_rollouts

from storage.errors import InputError
from storage.store import Artifact, Store
from tasks.inputs.prompts import PrepareConfig
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.prepare import prepare_work
from tasks.rollout_config import RolloutConfig
from tasks.signals.mask import SpecialTokens, mask_rules
from tasks.supervise import SuperviseConfig, supervise_work

SAMPLING = RolloutConfig(temperature=0.8, top_p=0.9, prompts_per_round=2, num_generations=2, max_completion_length=8)
POLICY = {"on_mismatch": "mask", "on_template_mismatch": "teacher"}


def needs(k: int) -> Any:
    return DirectConfig(support=TopkSupport(k=k)).needs()


def flat(values: list[Any]) -> np.ndarray:
    return np.array([entry for value in values for entry in value] if isinstance(values[0], list) else values)


class World:
    """A student, a teacher with its tokenizer (`same`) and one with another (`other`), and rollouts of both's prompts."""

    def __init__(self, root: Path) -> None:
        self.bench = ScoringBench(Store(root / "store"), InProcess())
        self.bench.max_invalid = 1.0  # a student of random weights writes ids that a teacher lacks
        self.folder = two_tokenizers.model(root / "student", teacher=False)
        paths = {"same": self._another(root), "other": two_tokenizers.model(root / "other", teacher=True)}
        self.student = self.bench.model(self.folder)
        self.teachers = {name: self.bench.model(path) for name, path in paths.items()}
        rows = [
            {"id": "a", "prompt": "then here", "teacher_id": "same"},
            {"id": "b", "prompt": "the antenna", "teacher_id": "other"},
        ]
        self.file = root / "train.jsonl"
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.prompts = self.prepared(self.teachers)
        self.rollouts = self.bench.rollouts(self.folder, self.prompts, [2, 2])

    def _another(self, root: Path) -> Path:
        """Other weights with the student's tokenizer."""
        from small_models import ARCHITECTURE

        from tasks.inputs.models import ArchitectureModel, initialise

        folder = root / "same"
        folder.mkdir()
        config = {**ARCHITECTURE, "vocab_size": two_tokenizers.STUDENT_ROWS, "max_position_embeddings": 4096}
        source = ArchitectureModel(config=config, tokenizer={"kind": "folder", "path": root / "student-tokenizer"})
        initialise(source, 7, folder)
        return folder

    def prepared(self, teacher: Any, **more: Any) -> Artifact:
        config = PrepareConfig(train={"kind": "file", "path": self.file}, tokenizers=POLICY)
        return self.bench.make(prepare_work(config, self.student, teacher, **more))["prepare"]

    def signals(self, teacher: Artifact, prompts: Artifact, k: int = 4, **more: Any) -> dict[str, Artifact]:
        parts = {"rollouts": self.rollouts, "student": self.student, "teacher": teacher, "prompts": prompts}
        work = supervise_work(SuperviseConfig(), **parts, needs=needs(k).signals, sampling=SAMPLING, **more)
        return self.bench.make(work)

    def rows(self, artifact: Artifact) -> dict[str, dict[str, Any]]:
        return {row["sample_id"]: row for row in self.bench.store.read_table(artifact, artifact.stage).to_pylist()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_each_teacher_reads_its_prompts_in_its_own_way(world: World) -> None:
    table = {row["prompt_id"]: row for row in world.bench.store.read_table(world.prompts, "prompts").to_pylist()}
    assert table["a"]["teacher_token_ids"] is None and table["a"]["teacher_id"] == "same"
    (alone,) = (
        row["teacher_token_ids"]
        for row in world.bench.store.read_table(world.prepared(world.teachers["other"]), "prompts").to_pylist()
        if row["prompt_id"] == "b"
    )
    assert table["b"]["teacher_token_ids"] == alone != table["b"]["token_ids"]
    assert {name: audit["verdict"] for name, audit in world.prompts.meta["audits"].items()} == {
        "same": "identical", "other": "masked",
    }  # fmt: skip


def test_each_teacher_has_mask_rules_of_its_own(world: World) -> None:
    store = world.bench.store
    rules = {name: mask_rules(store, world.prompts, SpecialTokens(), name) for name in world.teachers}
    assert rules["same"]["unmapped"] == [] and rules["same"]["teacher_rows"] == two_tokenizers.STUDENT_ROWS
    alone = mask_rules(store, world.prepared(world.teachers["other"]), SpecialTokens())
    assert rules["other"] == alone and alone["unmapped"]


@pytest.mark.parametrize("name", ["same", "other"])
def test_signals_are_those_of_the_only_teacher(world: World, name: str) -> None:
    teacher = world.teachers[name]
    routed = world.signals(teacher, world.prompts, names=[name])
    alone = world.signals(teacher, world.prepared(teacher))
    prompt = {"same": "a", "other": "b"}[name]
    for signal, artifact in routed.items():
        whole, own = world.rows(alone[signal]), world.rows(artifact)
        assert own.keys() == {sample for sample in whole if sample.startswith(f"{prompt}/")} and len(own) == 2
        for sample, row in own.items():
            for column, values in row.items():
                if column == "sample_id" or values is None:
                    continue
                np.testing.assert_allclose(flat(values), flat(whole[sample][column]), atol=2e-5, err_msg=column)


def test_a_longer_list_of_one_teacher_serves_beside_a_shorter_one_of_another(world: World) -> None:
    long = world.signals(world.teachers["same"], world.prompts, 8, names=["same"])
    shared = {"store": world.bench.store}
    found = {
        name: world.signals(world.teachers[name], world.prompts, 5, names=[name], **shared) for name in world.teachers
    }
    fresh = World.signals(world, world.teachers["same"], world.prompts, 5, names=["same"])
    assert found["same"]["teacher_topk"].key == long["teacher_topk"].key != fresh["teacher_topk"].key
    store = world.bench.store
    rollouts = store.read_table(world.rollouts, "rollouts")

    def support(same: dict[str, Artifact]) -> Any:
        import pyarrow as pa

        parts = [same, found["other"]]
        tables = {name: pa.concat_tables([store.read_table(part[name], name) for part in parts]) for name in same}
        samples = from_rollouts(rollouts, tables, needs(5), [])
        assert samples.support is not None
        return samples.support.rows(np.arange(len(samples.completions.values)))

    longer, equal = support(long), support(fresh)
    np.testing.assert_array_equal(longer.ids_NK, equal.ids_NK)
    np.testing.assert_allclose(longer.teacher_tail_N, equal.teacher_tail_N, atol=1e-5)
    assert (longer.valid_N == equal.valid_N).all()


def test_teachers_of_a_mixture_have_one_tokenizer(world: World) -> None:
    with pytest.raises(InputError, match=r"teachers\.same: its tokenizer files differ"):
        world.prepared(world.teachers, mixed=True)


def test_what_enters_keys_is_apart_for_each_teacher(world: World) -> None:
    """Prompts that another teacher gets change neither what the first reads nor the rollouts."""
    before = world.prompts.content
    third = {**world.teachers, "third": world.teachers["same"]}
    text = world.file.read_text()
    try:
        world.file.write_text(text.replace('"other"', '"third"'))
        after = world.prepared(third).content
    finally:
        world.file.write_text(text)
    assert {
        name: before[name] for name in ("prompts:train", "teacher:same:train", "audit:same", "vocabulary:same")
    } == {name: after[name] for name in ("prompts:train", "teacher:same:train", "audit:same", "vocabulary:same")}
    assert (
        before["teachers:train"] != after["teachers:train"]
        and before["teacher:other:train"] != after["teacher:other:train"]
    )
