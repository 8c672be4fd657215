"""A stored round of any size: rollouts, mask, `sampled` and teacher lists of K entries, made without Python objects per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.trainer.config import TrainConfig
from tasks.workers.jobs import ArtifactRef, TrainJob, TrainOutputs, config_json

VOCABULARY = 8192
PROMPT = 16


def make_round(
    root: Path, samples: int, length: int, k: int = 64, per_shard: int = 32, vocabulary: int = VOCABULARY
) -> tuple[Store, Artifact, dict[str, Artifact]]:
    """(store, rollouts, signals) of `samples` completions of `length` tokens. All numbers are valid, the ids random."""
    store = Store(root)
    random = np.random.Generator(np.random.PCG64(samples))
    logprobs = np.log(0.9 / np.arange(1, k + 1) / (1 / np.arange(1, k + 1)).sum()).astype(np.float32)
    names = ("rollouts", "sampled", "mask", "teacher_topk")
    builders = {
        name: ArtifactSpec.of(
            "rollout" if name == "rollouts" else name, 1, {"k": k} if name == "teacher_topk" else {}, {}
        )
        for name in names
    }
    made = {}
    for name in names:
        with store.building(builders[name]) as builder:
            for shard, start in enumerate(range(0, samples, per_shard)):
                count = min(per_shard, samples - start)
                builder.write_shard(name, shard, _table(name, start, count, length, k, logprobs, random, vocabulary))
            made[name] = builder.commit(
                meta={"metrics": {"mean_length": length}}, tables={name: -(-samples // per_shard)}
            )
    return store, made.pop("rollouts"), made


def _table(
    name: str,
    start: int,
    count: int,
    length: int,
    k: int,
    logprobs: np.ndarray,
    random: np.random.Generator,
    vocabulary: int,
) -> pa.Table:
    tokens = count * length
    ids = [f"p{row}/1/0" for row in range(start, start + count)]

    def lists(values: np.ndarray, size: int = length) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * size), pa.array(values))

    def nested(values: np.ndarray) -> pa.Array:
        inner = pa.ListArray.from_arrays(pa.array(np.arange(tokens + 1, dtype=np.int32) * k), pa.array(values))
        return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * length), inner)

    if name == "rollouts":
        columns = {
            "sample_id": ids,
            "prompt_id": [row.partition("/")[0] for row in ids],
            "sample_index": [0] * count,
            "prompt_token_ids": lists(random.integers(0, vocabulary, count * PROMPT, np.int32), PROMPT),
            "completion_token_ids": lists(random.integers(0, vocabulary, tokens, np.int32)),
            "sampling_logprobs": lists(np.full(tokens, -1.0, np.float32)),
            "behaviour": ["student"] * count,
            "prefix_length": [0] * count,
            "finish_reason": ["stop"] * count,
            "seed": list(range(start, start + count)),
            "completion_text": [""] * count,
        }
    elif name == "sampled":
        columns = {"sample_id": ids}
        for column in ("student_logprobs", "teacher_logprobs", "behaviour_logprobs"):
            columns[column] = lists(-random.random(tokens, np.float32))
        for column in ("student_entropy", "teacher_entropy"):
            columns[column] = lists(random.random(tokens, np.float32))
    elif name == "mask":
        columns = {"sample_id": ids, "mask_reasons": lists((random.random(tokens) < 0.1).astype(np.int32))}
    else:
        first = random.integers(0, vocabulary, tokens)[:, None]
        columns = {
            "sample_id": ids,
            "ids": nested(((first + 97 * np.arange(k)) % vocabulary).astype(np.int32).ravel()),
            "logprobs": nested(np.tile(logprobs, tokens)),
            "valid": lists(np.full(tokens, k, np.int16)),
            "tail_logmass": lists(np.full(tokens, np.log(0.1), np.float32)),
        }
    schema = schema_for(name)
    given = [columns.get(field.name, pa.nulls(count, field.type)) for field in schema]
    arrays = [
        pa.array(v, f.type) if isinstance(v, list) else v.cast(f.type) for v, f in zip(given, schema, strict=True)
    ]
    return pa.table(arrays, schema=schema)


def train_job(
    root: Path,
    rollouts: ArtifactRef,
    signals: dict[str, list[ArtifactRef]],
    objective: Any,
    judged: ArtifactRef | None = None,
) -> TrainJob:
    """The job of a training that writes nothing."""
    return TrainJob(
        store=str(root),
        model="",
        state=None,
        rollouts=rollouts,
        signals=signals,
        prompts=None,
        config=config_json(TrainConfig(lr=1e-3, samples_per_step=8)),
        objective=config_json(objective),
        seed=0,
        round=1,
        outputs=TrainOutputs(),
        judged=judged,
    )
