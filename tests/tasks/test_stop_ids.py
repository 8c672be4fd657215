"""Merged stop ids through the stages: what is scored, what is stored, which keys change, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scoring import SAMPLING, InProcess, ScoringBench, described, model_folder, nucleus_logprobs, plain_logits, tokens

from storage.errors import InputError
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.engines.scorer import Sample, Scorer
from tasks.evaluate import EvaluateConfig, evaluate_work
from tasks.inputs.prompts import PrepareConfig
from tasks.inputs.tokenizers import TokenizerPolicy
from tasks.losses.config import PolicyGradientConfig
from tasks.losses.needs import SignalNeed
from tasks.prepare import prepare_work
from tasks.rollout import rollout_work
from tasks.rollout_config import RolloutConfig
from tasks.signals import Wanted
from tasks.signals.stop_ids import merge_stop_ids
from tasks.stage import merged_stop_ids
from tasks.supervise import SuperviseConfig, supervise_work
from tasks.train import TrainConfig, train_work
from tasks.workers.jobs import ArtifactRef, KLJob

OWN, OTHER, FAR = 257, 258, 270
"""The student's end of sequence, the teacher's, and one that the teacher has past the student's 264 rows."""
NEEDS = (SignalNeed("sampled"), SignalNeed("mask"), SignalNeed("teacher_topk", 5), SignalNeed("student_topk", 4))
MERGE = {"on_mismatch": "mask", "stop_ids": "merge"}


def instruct(folder: Path) -> Path:
    """Lets a teacher end with <|system|> or an id that the student's model has no row for."""
    for name, fields in (
        ("tokenizer_config.json", {"eos_token": "<|system|>"}),
        ("generation_config.json", {"eos_token_id": [OTHER, FAR]}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))
    return folder


class World:
    """A base student, an instruct teacher, and completions that end with either's id, or are cut."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = {
            "student": model_folder(root, "student", 1),
            "teacher": instruct(model_folder(root, "teacher", 2, vocab_size=280)),
        }
        self.bench = ScoringBench(Store(root / "store"), InProcess({"batch_tokens": 64, "head_chunk_tokens": 8}))
        self.student, self.teacher = (self.bench.model(self.folders[name]) for name in ("student", "teacher"))
        self.prompts = self.prepared(MERGE, "data")
        self.completions = [[*tokens("c", n, length=3, below=256), end] for n, end in enumerate([OWN, OTHER, 65])]
        self.rollouts = self.committed(self.completions)

    def prepared(self, policy: dict[str, str], folder: str, **files: Any) -> Artifact:
        return self.bench.prompts(self.student, self.teacher, self.root / folder, tokenizers=policy)

    def committed(self, completions: list[list[int]]) -> Artifact:
        rows = [
            {
                "sample_id": f"a/1/{n}",
                "prompt_id": "a",
                "sample_index": n,
                "prompt_token_ids": [1, 2, 3],
                "completion_token_ids": ids,
                "sampling_logprobs": [-1.0] * len(ids),
                "behaviour": "student",
                "prefix_length": 0,
                "finish_reason": "stop" if ids[-1] > 255 else "length",
                "seed": n,
                "completion_text": "",
                "reward": None,
            }
            for n, ids in enumerate(completions)
        ]
        with self.bench.store.building(ArtifactSpec.of("rollout", 1, {"completions": completions}, {})) as builder:
            builder.write_shard("rollouts", 0, pa.Table.from_pylist(rows, schema_for("rollouts")))
            return builder.commit(meta={"metrics": {"tokens": 12}}, tables={"rollouts": 1})

    def work(self, **changed: Any) -> Any:
        inputs = {name: getattr(self, name) for name in ("rollouts", "student", "teacher", "prompts")} | changed
        return supervise_work(SuperviseConfig(), **inputs, needs=NEEDS, sampling=RolloutConfig(**SAMPLING))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def merged(logits_TV: torch.Tensor, stops: tuple[int, ...], rows: int) -> tuple[torch.Tensor, list[int]]:
    """(probabilities, ids): single ids below `rows`, and the category in the place of the first stop id."""
    kept = [*range(rows), *(index for index in stops if index >= rows and index < logits_TV.shape[1])]
    p = logits_TV[:, kept].softmax(-1)
    places = {index: place for place, index in enumerate(kept)}
    ids = [index for index in range(rows) if index not in stops[1:]]
    columns = [
        p[:, [places[stop] for stop in stops if stop in places]].sum(-1) if index == stops[0] else p[:, places[index]]
        for index in ids
    ]
    return torch.stack(columns, -1), ids


def test_every_signal_counts_the_category_once(world):
    stops = tuple(merged_stop_ids(world.prompts))
    assert stops == (OWN, OTHER, FAR)
    made = world.bench.make(world.work())
    tables = {name: world.bench.store.read_table(made[name], name).to_pylist() for name in made}
    for n, completion in enumerate(world.completions):
        logits = {who: plain_logits(world.folders[who], [1, 2, 3], completion) for who in ("student", "teacher")}
        (p, ids), (q, _) = (merged(logits[who], stops, 264) for who in ("student", "teacher"))
        place = {index: at for at, index in enumerate(ids)}
        y = torch.tensor([[place[OWN if token in stops else token]] for token in completion])
        row = tables["sampled"][n]
        for name, wanted in (
            ("student_logprobs", p.gather(1, y)[:, 0].log()),
            ("teacher_logprobs", q.gather(1, y)[:, 0].log()),
            ("student_entropy", -(p * p.log()).sum(-1)),
            ("teacher_entropy", -(q * q.log()).sum(-1)),
            # as the sampler draws and records it: of single ids
            (
                "behaviour_logprobs",
                nucleus_logprobs(logits["student"], **SAMPLING).gather(1, torch.tensor(completion)[:, None])[:, 0],
            ),
        ):
            found = np.array(row[name], np.float64)
            here = np.isfinite(wanted.numpy())  # a token outside of the nucleus is taken in
            np.testing.assert_allclose(found[here], wanted.numpy()[here], atol=3e-5, rtol=3e-5, err_msg=name)
        lists = tables["teacher_topk"][n]
        top = q.topk(5)
        assert lists["ids"] == [[ids[at] for at in places] for places in top.indices.tolist()]
        np.testing.assert_allclose(lists["logprobs"], top.values.log(), atol=3e-5, rtol=3e-5)
        np.testing.assert_allclose(np.exp(lists["tail_logmass"]), 1 - top.values.sum(-1), atol=3e-5)
        lists = tables["student_topk"][n]
        top = p.topk(4)
        assert lists["ids"] == [[ids[at] for at in places] for places in top.indices.tolist()]
        np.testing.assert_allclose(lists["teacher_logprobs"], q.gather(1, top.indices).log(), atol=3e-5, rtol=3e-5)
        assert tables["mask"][n]["mask_reasons"] == [2 if completion[-1] == 65 else 0] * 4  # only the cut one, as cut


def test_an_evaluation_s_kl_is_of_merged_distributions(world):
    unused = ArtifactRef("unused", "0")
    models = [described(world.folders[name]) for name in ("student", "teacher")]
    job = KLJob("", unused, unused, *models, "float32", stop_ids=[OWN, OTHER, FAR])
    samples = [Sample(f"s{n}", [1, 2, 3], ids) for n, ids in enumerate(world.completions)]
    values = Scorer({"threads": 1}).score(job, samples, Wanted(reverse_kl=True), lambda done: None)["reverse_kl"]
    whole = Scorer({"threads": 1}).score(
        KLJob("", unused, unused, *models, "float32"), samples, Wanted(reverse_kl=True), lambda done: None
    )["reverse_kl"]
    for n, completion in enumerate(world.completions):
        p, q = (
            merged(plain_logits(world.folders[who], [1, 2, 3], completion), (OWN, OTHER, FAR), 264)[0]
            for who in ("student", "teacher")
        )
        np.testing.assert_allclose(values[n], (p * (p / q).log()).sum(-1), rtol=1e-4)
        assert (np.abs(values[n] - whole[n]) > 1e-6).any()


def test_rollouts_keep_the_sampled_id_and_training_counts_the_category(world):
    table = world.bench.store.read_table(world.rollouts, "rollouts")
    assert [row[-1] for row in table["completion_token_ids"].to_pylist()] == [OWN, OTHER, 65]
    found = merge_stop_ids(table, [OWN, OTHER, FAR])
    assert [row[-1] for row in found["completion_token_ids"].to_pylist()] == [OWN, OWN, 65]
    assert found.schema == table.schema and found.drop(["completion_token_ids"]) == table.drop(["completion_token_ids"])
    assert merge_stop_ids(table, []) is table and merge_stop_ids(table, [OWN]) is table
    part = table.slice(1, 1)
    assert merge_stop_ids(part, [OWN, OTHER])["completion_token_ids"].to_pylist() == [[*world.completions[1][:-1], OWN]]


def test_a_stop_id_inside_of_a_completion_is_refused_by_sample(world):
    inside = world.committed([[5, 6, OWN], [5, OTHER, 7, OWN]])
    with pytest.raises(InputError, match=r"sample 'a/1/1', token 1: found 258.*before the completion's end"):
        world.bench.make(world.work(rollouts=inside))


def test_keys_change_with_the_merged_ids_and_only_then(world):
    def keys(prompts: Artifact) -> dict[str, str]:
        config = RolloutConfig(num_generations=1, prompts_per_round=2)
        objective = PolicyGradientConfig()
        train = TrainConfig(lr=1e-3, samples_per_step=1)
        works = [
            rollout_work(config, world.student, prompts, seed=0, round=1),
            evaluate_work(EvaluateConfig(), world.student, world.teacher, prompts, seed=0),
            world.work(prompts=prompts),
            train_work(train, objective, world.student, None, world.rollouts, signals, 0, 1, prompts=prompts),
        ]
        return {name: spec.key for work in works for name, spec in work.outputs.items()}

    signals = world.bench.make(world.work())
    plain = world.prepared({"on_mismatch": "mask"}, "data")
    assert merged_stop_ids(plain) == [] and "stop_ids" not in plain.content
    without = keys(plain.model_copy(update={"content": plain.content | {"audit": world.prompts.content["audit"]}}))
    merging = keys(world.prompts)
    other = keys(
        world.prompts.model_copy(update={"content": world.prompts.content | {"stop_ids": json.dumps([OWN, OTHER])}})
    )
    for name in without:
        assert len({without[name], merging[name], other[name]}) == 3, name


def test_a_warm_up_completion_with_an_inner_stop_id_is_refused(world):
    source = world.root / "warm.jsonl"
    source.write_text('{"prompt": "a", "completion": "one"}\n{"prompt": "b", "completion": "x<|system|>y"}\n')
    config = PrepareConfig(
        warmup={"kind": "file", "path": str(source)}, tokenizers=TokenizerPolicy.model_validate(MERGE)
    )
    with pytest.raises(InputError, match=r"warm\.jsonl.*token 1 of its completion is the stop id 258"):
        world.bench.make(prepare_work(config, world.student, world.teacher))


def test_masked_ends_are_said(world):
    world.bench.said.clear()
    world.prepared({"on_mismatch": "mask", "stop_ids": "mask"}, "other")
    assert any("nothing teaches the student when to stop" in line for line in world.bench.said)
