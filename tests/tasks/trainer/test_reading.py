"""A round read shard by shard and mapped from files: the same numbers as whole tables in memory, and bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import clean_round
import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import TypeAdapter
from synthetic_round import make_round, train_job
from whole_round import from_rollouts

from storage.errors import InputError
from storage.schemas import MaskReason, schema_for, validate_table
from storage.store import ArtifactSpec, Store
from tasks.losses.config import DirectConfig, ObjectiveConfig
from tasks.losses.needs import CreditNeeds, Needs
from tasks.trainer.batching import plan_steps, split_step
from tasks.trainer.data import Samples, forward_batch, loss_denominators
from tasks.trainer.dispatch import round_bytes
from tasks.trainer.reading import collect_round
from tasks.workers.jobs import ArtifactRef
from tasks.workers.pool import CHECKOUT

LENGTHS = (3, 1, 2, 5, 4, 1, 7)
REASONS = [MaskReason.SPECIAL_TOKEN]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bucket": {"estimator": "direct", "support": {"kind": "teacher_topk", "k": 3, "outside": "bucket"}},
    "union": {"estimator": "direct", "support": {"kind": "union", "k": 4, "outside": "bucket"}},
    "sampled": {"estimator": "policy_gradient", "ppo_clip": 0.2},
    "draws": {"estimator": "policy_gradient", "trust_region": {"kind": "tropd", "outliers": "mask"}},
}
NEEDS = {name: TypeAdapter(ObjectiveConfig).validate_python(given).needs() for name, given in OBJECTIVES.items()}
NEEDS["rewards"] = replace(NEEDS["sampled"], credit=CreditNeeds(reward=True, groups=True, segment_ends=(0, 5)))


def tables(spoil: bool = False) -> dict[str, pa.Table]:
    made = clean_round.rows(lengths=LENGTHS)
    for number, row in enumerate(made["rollouts"]):
        row |= {"prompt_id": f"p{number // 2}"}
    made["rewards"] = [
        {"sample_id": row["sample_id"], "reward": None if number == 4 else number % 3 / 2}
        for number, row in enumerate(made["rollouts"])
    ]
    made["mask"][0]["mask_reasons"] = [1, 0, 16]
    made["mask"][3]["mask_reasons"] = [16] * 5  # a shard whose lists are all empty, below
    for table in ("teacher_topk", "student_topk"):
        made[table][3]["valid"] = [0] * 5
    made["sampled"][5]["behaviour_logprobs"] = None  # one of two teachers tells none
    if spoil:
        made["sampled"][6]["teacher_logprobs"][2] = float("nan")
    return {name: pa.Table.from_pylist(found, schema_for(name)) for name, found in made.items()}


def stored(root: Path, name: str, parts: Sequence[pa.Table], number: int = 0) -> ArtifactRef:
    """An artifact whose shards are `parts`."""
    stage = {"rollouts": "rollout", "contexts": "context"}.get(name, name)
    with Store(root).building(ArtifactSpec.of(stage, 1, {"number": number}, {})) as builder:
        for shard, rows in enumerate(parts):
            builder.write_shard(name, shard, rows)
        return ArtifactRef.of(builder.commit(tables={name: len(parts)}))


def read(
    root: Path,
    whole: dict[str, pa.Table],
    cuts: Sequence[int],
    needs: Needs,
    of: Sequence[int],
    contexts: Sequence[bool] | None = None,
    **more: Any,
) -> Samples:
    """The round of a store whose tables are cut at the rows `cuts`; `of`: which of two teachers each sample has.
    `contexts`: whether each sample has one of its own."""
    edges = list(zip([0, *cuts], [*cuts, len(of)], strict=True))
    rollouts = stored(root, "rollouts", [whole["rollouts"].slice(a, b - a) for a, b in edges])
    signals = {}
    for name in (need.name for need in needs.signals):
        places = [[[row for row in range(a, b) if of[row] == teacher] for a, b in edges] for teacher in sorted(set(of))]
        signals[name] = [
            stored(root, name, [whole[name].take(np.array(rows[::-1], np.int64)) for rows in shards], number)
            for number, shards in enumerate(places)
        ]
    judged = (
        stored(root, "rewards", [whole["rewards"].slice(a, b - a) for a, b in edges]) if needs.credit.reward else None
    )
    job = train_job(root, rollouts, signals, DirectConfig(), judged)
    if contexts is not None:
        columns = {
            "sample_id": whole["rollouts"]["sample_id"],
            "prompt_token_ids": [[1, 2] if there else None for there in contexts],
            "source": ["sibling" if there else "none" for there in contexts],
        }
        table = validate_table("contexts", pa.table(columns))
        where = stored(root, "contexts", [table.slice(a, b - a) for a, b in edges])
        job = msgspec.structs.replace(job, contexts=where)
    folder = root / "columns"
    folder.mkdir()
    return collect_round(job, needs, REASONS, clean_round.ROWS, Store(root), folder, **more).mapped()


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize(("cuts", "of"), [((), [0] * 7), ((3, 4), [0] * 7), ((2, 4, 5), [0, 1, 1, 0, 0, 1, 0])])
def test_every_batch_is_that_of_whole_tables(tmp_path: Path, name: str, cuts: tuple, of: list[int]) -> None:
    needs = NEEDS[name]
    made = tables()
    wanted = [need.name for need in needs.signals]
    signals = {name: made[name] for name in wanted}
    whole = from_rollouts(made["rollouts"], signals, needs, REASONS, 0, clean_round.ROWS, rewards=made["rewards"])
    mapped = read(tmp_path, made, cuts, needs, of)
    assert mapped.ids == whole.ids and mapped.invalid == whole.invalid
    for column in ("lost", "kept", "forward_lengths"):
        assert np.array_equal(getattr(mapped, column), getattr(whole, column))
    assert "behaviour_logprobs" not in mapped.floats and mapped.floats.keys() == whole.floats.keys()
    for step in plan_steps(0, 1, len(whole), 3, 14):
        weights = loss_denominators(whole, step.rows, "token", None)
        assert np.array_equal(weights, loss_denominators(mapped, step.rows, "token", None))
        for micro in split_step(whole.forward_lengths[list(step.rows)].tolist(), 2, 8)[1]:
            ours, theirs = (
                forward_batch(each, step.rows, weights, micro.places, micro.filler, torch.device("cpu"))
                for each in (mapped, whole)
            )
            assert_same(ours, theirs)
        mapped.drop_pages()


def test_samples_without_a_context_are_left_out_unless_the_objective_tells_them_apart(tmp_path: Path) -> None:
    made, there = tables(), [True, False, True, False, False, True, True]
    of = [0] * len(there)
    plain, out, apart = (
        read(tmp_path / name, made, (3, 4), NEEDS["bucket"], of, **more)
        for name, more in (
            ("plain", {}),
            ("out", {"contexts": there}),
            ("apart", {"contexts": there, "every_context": True}),
        )
    )
    assert plain.contexts is None
    assert out.contexts.tolist() == apart.contexts.tolist() == there
    assert np.array_equal(out.kept, np.where(there, plain.kept, 0)) and out.kept.sum() < plain.kept.sum()
    assert np.array_equal(apart.kept, plain.kept) and np.array_equal(apart.lost, plain.lost)
    assert plain.lost[3] == 5 and out.lost[3] == 0, "no context leaves them out, not the invalid values"
    assert np.array_equal(out.floats["student_logprobs"], plain.floats["student_logprobs"])


def test_contexts_of_other_samples_are_refused(tmp_path: Path) -> None:
    made = tables()
    rollouts = stored(tmp_path, "rollouts", [made["rollouts"]])
    columns = {"sample_id": made["rollouts"]["sample_id"][1:], "source": ["none"] * 6}
    where = stored(tmp_path, "contexts", [validate_table("contexts", pa.table(columns))])
    job = msgspec.structs.replace(train_job(tmp_path, rollouts, {}, DirectConfig()), contexts=where)
    with pytest.raises(InputError, match=r"signal contexts: 6 rows for 7 rollouts"):
        collect_round(job, NEEDS["bucket"], REASONS, clean_round.ROWS, Store(tmp_path), tmp_path)


def assert_same(ours: Any, theirs: Any) -> None:
    for entry in fields(theirs):
        mine, other = getattr(ours, entry.name), getattr(theirs, entry.name)
        if isinstance(other, torch.Tensor):
            assert (mine.dtype == other.dtype and torch.equal(mine, other)) or torch.equal(mine.isnan(), other.isnan())
            assert torch.equal(mine.nan_to_num(), other.nan_to_num()), entry.name
        elif entry.name == "tokens":
            assert_same(mine, other)
        else:
            assert mine == other, entry.name


def test_a_bad_value_of_any_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sampled.teacher_logprobs: sample 'p6/1/0', token 2: found nan"):
        read(tmp_path, tables(spoil=True), (2, 4, 5), NEEDS["sampled"], [0] * 7)


def test_a_sample_that_two_shards_have_is_refused(tmp_path: Path) -> None:
    made = tables()
    made["rollouts"] = pa.concat_tables([made["rollouts"].slice(0, 6), made["rollouts"].slice(0, 1)])
    with pytest.raises(InputError, match="rollouts: sample 'p0/1/0' is there 2 times"):
        read(tmp_path, made, (2, 4), NEEDS["sampled"], [0] * 7)


def test_the_space_for_the_files_is_known_before(tmp_path: Path) -> None:
    store, rollouts, signals = make_round(tmp_path, 40, 50, k=16)
    needs = NEEDS["bucket"]
    needed = {need.name: [ArtifactRef.of(signals[need.name])] for need in needs.signals}
    job = train_job(tmp_path, ArtifactRef.of(rollouts), needed, DirectConfig())
    (folder := tmp_path / "columns").mkdir()
    collect_round(job, needs, [], 8192, store, folder)
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert 0.9 * written < round_bytes(job, store) < 1.2 * written


def test_memory_is_bounded_by_the_shard_and_the_batch(tmp_path: Path) -> None:
    """184,000 more tokens with lists of 64: 100 MB of ids and log-probabilities, of which nothing stays."""
    for name, samples in (("small", 160), ("large", 1600)):
        make_round(tmp_path / name, samples, 128)
    command = [sys.executable, str(CHECKOUT / "tests" / "support" / "round_memory.py")]
    paths = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support")])
    found = subprocess.run(
        [*command, str(tmp_path / "small"), str(tmp_path / "large")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 40
