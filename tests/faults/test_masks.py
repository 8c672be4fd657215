"""Masks are exact: conversations through two tokenizers that differ, against an oracle that decodes every token by itself."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from small_models import Bench
from tokenizers import Tokenizer
from two_tokenizers import STUDENT_ROWS, TEACHER_ROWS, conversation, model, rendered, text
from whole_round import from_rollouts

from storage.errors import InputError
from storage.schemas import MaskReason, schema_for
from storage.store import Artifact, Store
from tasks.inputs.models import CheckpointModel, model_work
from tasks.inputs.prompts import PrepareConfig
from tasks.losses.needs import Needs, SignalNeed, StudentRequest
from tasks.prepare import prepare_work
from tasks.signals.mask import SpecialTokens, mask_rules, mask_table
from tasks.trainer.data import forward_batch, loss_denominators

pytestmark = pytest.mark.promise(8, "conversations through two tokenizers; a tokenizer changed in mid-run")

SHORT, FULL = 500, 10_000
MARKS = (
    SpecialTokens(),
    SpecialTokens(mark="all"),
    SpecialTokens(mark="all", tokens=("<think>", "th"), occurrence="first"),
)
POLICIES = (("special_token", "teacher_prefix", "unmapped"), ("unmapped",), ("truncated", "special_token"), ())
WHO = ("student", "teacher")
ODD = (math.nan, math.inf, -math.inf)


@dataclass
class Made:
    """One completion as the sampler might have written it, and what was done to its values."""

    ids: list[int]
    prefix: int
    finish: str
    sampling: list[float]
    values: dict[str, list[float]]


class Oracle:
    """Reads tokenizer.json with the tokenizers library alone and decides by what it decodes."""

    def __init__(self, student: Path, teacher: Path) -> None:
        self.sides = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (student, teacher)]
        configs = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (student, teacher)]
        self.ends = [config["eos_token"] for config in configs]
        added = [json.loads((folder / "tokenizer.json").read_text())["added_tokens"] for folder in (student, teacher)]
        self.special = {token["id"] for side in added for token in side if token["special"]}

    def strange(self, token: int) -> bool:
        """The teacher reads this id otherwise, or not at all, or one of them ends with it and the other does not."""
        ours, theirs = (side.id_to_token(token) for side in self.sides)
        if ours != theirs or token >= TEACHER_ROWS:
            return True
        return self.ends[0] != self.ends[1] and ours in self.ends

    def reasons(self, made: Made, marks: SpecialTokens) -> list[set[str]]:
        found: list[set[str]] = []
        seen: set[int] = set()
        for place, token in enumerate(made.ids):
            why = set()
            name = self.sides[0].id_to_token(token)
            marked = token in self.special and (marks.mark == "all" or (self.strange(token) and token < TEACHER_ROWS))
            marked = marked or name in marks.tokens
            if marked and not (marks.occurrence == "first" and token in seen):
                why.add("special_token")
            seen.add(token)
            if self.strange(token):
                why.add("unmapped")
            if made.finish == "length":
                why.add("truncated")
            if place < made.prefix:
                why.add("teacher_prefix")
            probabilities = [made.sampling[place]] + [made.values[f"{who}_logprobs"][place] for who in WHO]
            entropies = [made.values[f"{who}_entropy"][place] for who in WHO]
            if not all(-math.inf < v <= 0 for v in probabilities) or not all(0 <= v < math.inf for v in entropies):
                why.add("invalid_value")
            found.append(why)
        return found


def completion(number: int, student: Tokenizer) -> Made:
    """Text, special tokens, ids of padding rows, ids that the teacher lacks; sometimes cut off, or with bad values."""
    draw = random.Random(f"completion {number}")
    ids = student.encode(text(draw), add_special_tokens=False).ids
    for _ in range(draw.choice((0, 0, 1, 3))):
        ids.insert(draw.randint(0, len(ids)), draw.choice((draw.randrange(400, STUDENT_ROWS), draw.randrange(256))))
    finish = draw.choice(("stop", "stop", "length"))
    ids += [student.token_to_id("<|end|>")] if finish == "stop" else []
    sampling = [-draw.random() for _ in ids]
    names = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
    values = {name: [draw.random() * (1 if "entropy" in name else -1) for _ in ids] for name in names}
    if draw.random() < 0.3:
        where = draw.randrange(len(ids))
        name = draw.choice(("sampling", *names))
        wrong_side = -0.5 if "entropy" in name else 0.5
        {"sampling": sampling, **values}[name][where] = draw.choice((wrong_side, *ODD))
    return Made(ids, draw.choice((0, 0, 0, min(2, len(ids)))), finish, sampling, values)


def tables(made: dict[str, Made], prompt_ids: dict[str, list[int]]) -> tuple[pa.Table, pa.Table]:
    rollouts = [
        {
            "sample_id": f"{name}/1/0", "prompt_id": name, "sample_index": 0, "prompt_token_ids": prompt_ids[name],
            "completion_token_ids": m.ids, "sampling_logprobs": m.sampling, "behaviour": "student",
            "prefix_length": m.prefix, "finish_reason": m.finish, "seed": 0, "completion_text": "", "reward": None,
        }
        for name, m in made.items()
    ]  # fmt: skip
    sampled = [{"sample_id": f"{name}/1/0", "behaviour_logprobs": None, **m.values} for name, m in made.items()]
    return (
        pa.Table.from_pylist(rollouts, schema_for("rollouts")),
        pa.Table.from_pylist(sampled, schema_for("sampled")),
    )


class World:
    """The two models and `count` conversations, prepared by the stage itself."""

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count = root, count
        self.student, self.teacher = model(root / "student", False), model(root / "teacher", True)
        self.bench = Bench(Store(root / "store"))
        self.oracle = Oracle(self.student, self.teacher)
        lines = [json.dumps({"messages": conversation(n), "id": str(n)}) for n in range(count)]
        (root / "train.jsonl").write_text("\n".join(lines))

    def artifacts(self) -> tuple[Artifact, Artifact]:
        folders = (self.student, self.teacher)
        student, teacher = (self.bench.build(model_work(CheckpointModel(path=folder), 0)) for folder in folders)
        return student, teacher

    def prepared(self, renders: str) -> Artifact:
        policy = {"on_mismatch": "mask", "on_template_mismatch": renders}
        source = {"kind": "file", "path": str(self.root / "train.jsonl")}
        config = PrepareConfig(train=source, tokenizers=policy, max_prompt_length=4096)
        return self.bench.build(prepare_work(config, *self.artifacts()))


@pytest.fixture(scope="module", params=[SHORT, pytest.param(FULL, marks=pytest.mark.faults)])
def world(request, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("masks"), request.param)


def test_prompts_reach_both_models_token_for_token(world):
    for renders in ("student", "teacher"):
        prompts = world.bench.store.read_table(world.prepared(renders), "prompts").to_pylist()
        assert len(prompts) == world.count
        other = 0
        for row in prompts:
            messages = conversation(int(row["prompt_id"]))
            ours = rendered(messages, teacher=False)
            theirs = rendered(messages, teacher=renders == "teacher")
            expected = [
                side.encode(said, add_special_tokens=False).ids
                for side, said in zip(world.oracle.sides, (ours, theirs), strict=True)
            ]
            assert row["token_ids"] == expected[0]
            assert (row["teacher_token_ids"] or row["token_ids"]) == expected[1]
            assert world.oracle.sides[0].decode(row["token_ids"], skip_special_tokens=False) == ours
            assert world.oracle.sides[1].decode(expected[1], skip_special_tokens=False) == theirs
            other += row["teacher_token_ids"] is not None
        assert other > world.count / 2


def test_reasons_and_loss_masks_are_the_oracles(world):
    prompts = world.prepared("student")
    rows = world.bench.store.read_table(prompts, "prompts", columns=["prompt_id", "token_ids"]).to_pylist()
    prompt_ids = {row["prompt_id"]: row["token_ids"] for row in rows}
    made = {name: completion(int(name), world.oracle.sides[0]) for name in prompt_ids}
    rollouts, sampled = tables(made, prompt_ids)
    seen: set[str] = set()
    for marks in MARKS:
        mask = mask_table(rollouts, sampled, mask_rules(world.bench.store, prompts, marks))
        expected = [world.oracle.reasons(m, marks) for m in made.values()]
        for name, got, want in zip(made, mask["mask_reasons"].to_pylist(), expected, strict=True):
            assert [{r.name.lower() for r in MaskReason if bits & r} for bits in got] == want, name
        seen |= {reason for tokens in expected for token in tokens for reason in token}
        for policy in POLICIES:
            trained = [[not (why & {*policy, "invalid_value"}) for why in tokens] for tokens in expected]
            check_batches(rollouts, mask, policy, list(made.values()), list(prompt_ids.values()), trained)
    assert seen == {reason.name.lower() for reason in MaskReason}


def check_batches(
    rollouts: pa.Table,
    mask: pa.Table,
    policy: Any,
    made: list[Made],
    prompts: list[list[int]],
    trained: list[list[bool]],
) -> None:
    """What the trainer packs: exactly the oracle's tokens, each where the model predicts it, the others nowhere."""
    needs = Needs((SignalNeed("mask"),), StudentRequest(), StudentRequest())
    samples = from_rollouts(rollouts, {"mask": mask}, needs, [MaskReason[name.upper()] for name in policy])
    assert samples.keep.tolist() == [keep for tokens in trained for keep in tokens]
    for start in range(0, len(samples), 64):
        rows = list(range(start, min(start + 64, len(samples))))
        weights = loss_denominators(samples, rows, "token", None)
        batch = forward_batch(samples, rows, weights, list(range(len(rows))), False, torch.device("cpu"))
        inputs, length = batch.input_ids_BT.numpy(), batch.input_ids_BT.shape[1]
        got = set()
        for token, index, line, weight in zip(
            batch.tokens.token_ids_N.tolist(), batch.hidden_index_N.tolist(), batch.tokens.sample_N.tolist(),
            batch.weight_N.tolist(), strict=True,
        ):  # fmt: skip
            row, at = rows[line], index - line * length + 1
            whole = prompts[row] + made[row].ids
            assert inputs[line, :at].tolist() == whole[:at] and whole[at] == token
            if weight > 0:
                got.add((row, at - len(prompts[row])))
        want = {(row, place) for row in rows for place, keep in enumerate(trained[row]) if keep}
        assert got == want
        assert np.isclose(batch.weight_N.sum().item(), 1.0 if want else 0.0, atol=1e-4)


CHANGES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_changed_in_mid_run_is_refused_by_the_stage_that_reads_it(name, tmp_path):
    """The folder of a checkpoint is the user's: after planning, a changed or added file is noticed before it is read."""
    folder, bench = model(tmp_path / "student", False), Bench(Store(tmp_path / "store"))
    artifact = bench.build(model_work(CheckpointModel(path=folder), 0))
    before = bench.store.materialize(artifact)
    path = folder / name
    added = {"special_tokens_map.json": '{"eos_token": "<|pad|>"}', "added_tokens.json": '{"<|new|>": 428}'}
    path.write_text((path.read_text() + " ") if path.exists() else added[name])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        bench.store.materialize(artifact)
    assert bench.build(model_work(CheckpointModel(path=folder), 0)).key != artifact.key
    assert before == folder


def test_a_tokenizer_of_a_student_in_the_store_is_restored_not_read(tmp_path):
    from storage.artifacts.artifact import ArtifactSpec
    from storage.errors import CorruptArtifact

    store = Store(tmp_path / "store")
    with store.building(ArtifactSpec.of("student", 1, {}, {})) as builder:
        shutil.copytree(model(tmp_path / "made", False), builder.directory("model"), dirs_exist_ok=True)
        artifact = builder.commit()
    path = store.materialize(artifact) / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|end|>", "<|pad|>"))
    assert store.get("student", artifact.key) is None
    with pytest.raises(CorruptArtifact, match="tokenizer_config"):
        store.materialize(artifact)
