"""How long the named questions of `opd query` take over one round of ten million tokens.

python benchmarks/questions.py FOLDER [TOKENS]     makes the store once (a minute), then prints a line per question

Two runs that share their two rounds: round 1 of a thousand tokens, round 2 of TOKENS. Completions of 256 tokens, on average, over
a byte-level vocabulary of 50,000, some of them parts of characters; teacher_topk lists of 8. Each question is asked REPEATS times
in this process with its default parameters: the median and the slowest wall time, the processor's time, the rows of the answer.
The last line is the page of `opd report`, made once.
On a machine that others use, the processor's time over the number of cores is what the wall time would be."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from record import record

from flows.experiment import load_experiment
from flows.page.build import page
from storage.artifacts.artifact import Artifact, ArtifactSpec
from storage.query.catalog import Catalog
from storage.query.questions import questions
from storage.runs import RoundState, Run, StageState
from storage.schemas import schema_for
from storage.store import Store

TOKENS, LENGTH, SHARD = 10_000_000, 256, 640
"""Tokens of the large round; mean tokens of a completion; completions of a shard."""
VOCABULARY, PROMPTS, HELD_OUT, K = 50_000, 4_000, 500, 8
REPEATS = 3
RUN, OTHER = "large", "other"
CONFIG = Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny.yaml"
"""What the runs' records say that they are; nothing is run."""


def words() -> list[bytes]:
    """The bytes of every token: words of one to three syllables, and at the end the 256 single bytes."""
    consonants, vowels = "bcdfghjklmnpqrstvwxyz", "aeiouéü"
    syllables = [c + v for c in consonants for v in vowels]
    found = [f" {a}{b}" for a in syllables for b in syllables] + [f"{a}{b}" for a in syllables for b in syllables]
    found += [f" {a}{b}{c}" for a in syllables[:20] for b in syllables[:20] for c in syllables[:20]]
    return [word.encode() for word in found[: VOCABULARY - 256]] + [bytes([value]) for value in range(256)]


def byte_names() -> list[str]:
    """The character of every byte in byte-level vocabularies (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(value) if value in shown else chr(next(others)) for value in range(256)]


def commit(store: Store, stage: str, number: int, tables: dict[str, list[pa.Table]]) -> Artifact:
    with store.building(ArtifactSpec.of(stage, 1, {"number": number}, {})) as builder:
        for table, shards in tables.items():
            for shard, rows in enumerate(shards):
                builder.write_shard(table, shard, rows)
        return builder.commit(tables={table: len(shards) for table, shards in tables.items()})


def prepared(store: Store, pieces: list[bytes]) -> Artifact:
    names, texts = byte_names(), list[str | None]()
    for piece in pieces:
        try:
            texts.append(piece.decode())
        except UnicodeDecodeError:
            texts.append(None)
    vocabulary = {
        "tokenizer": ["student"] * len(pieces),
        "id": list(range(len(pieces))),
        "token": ["".join(names[value] for value in piece) for piece in pieces],
        "text": texts,
        "special": [False] * len(pieces),
    }
    prompts = [
        {"prompt_id": f"{split}{n}", "split": split, "text": f"Question {n}?", "token_ids": [1, 2, 3]}
        for split, count in (("train", PROMPTS), ("eval", HELD_OUT))
        for n in range(count)
    ]
    tables = {
        "vocabulary": [pa.table(vocabulary, schema_for("vocabulary"))],
        "prompts": [pa.Table.from_pylist(prompts, schema_for("prompts"))],
    }
    return commit(store, "prepare", 0, tables)


def lists(offsets: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values.astype(kind.to_pandas_dtype())))


def shard(random: np.random.Generator, pieces: list[bytes], round: int, first: int, count: int) -> dict[str, pa.Table]:
    """The rows of four tables for `count` completions."""
    lengths = np.clip(random.lognormal(np.log(LENGTH * 0.85), 0.6, count).astype(int), 1, 1024)
    offsets, tokens = np.concatenate([[0], np.cumsum(lengths)]), int(lengths.sum())
    ids = np.minimum(random.zipf(1.2, tokens) - 1, VOCABULARY - 1)
    ids = np.where(ids >= VOCABULARY - 1, random.integers(0, VOCABULARY, tokens), ids)
    completions = [ids[a:b] for a, b in itertools.pairwise(offsets)]
    student, entropy = -random.exponential(0.7, tokens), random.gamma(1.0, 0.6, tokens)
    teacher = np.minimum(student + random.normal(-0.1, 0.8, tokens), -1e-4)
    clipped = np.where(lengths >= 700, "length", "stop")
    sample_ids = [f"train{(first + n) % PROMPTS}/{round}/{(first + n) // PROMPTS}" for n in range(count)]
    floats, ints = pa.float32(), pa.int32()
    rollouts = {
        "sample_id": sample_ids,
        "prompt_id": [name.partition("/")[0] for name in sample_ids],
        "sample_index": [(first + n) // PROMPTS for n in range(count)],
        "prompt_token_ids": [[1, 2, 3]] * count,
        "completion_token_ids": lists(offsets, ids, ints),
        "sampling_logprobs": lists(offsets, student, floats),
        "behaviour": ["student"] * count,
        "prefix_length": [0] * count,
        "finish_reason": clipped.tolist(),
        "seed": list(range(count)),
        "completion_text": [b"".join(pieces[i] for i in made).decode(errors="replace") for made in completions],
        "reward": pa.nulls(count, pa.float64()),
    }
    sampled = {
        "sample_id": sample_ids,
        "student_logprobs": lists(offsets, student, floats),
        "teacher_logprobs": lists(offsets, teacher, floats),
        "student_entropy": lists(offsets, entropy, floats),
        "teacher_entropy": lists(offsets, entropy * 0.8, floats),
        "behaviour_logprobs": lists(offsets, student, floats),
    }
    reasons = np.where(np.repeat(clipped == "length", lengths), 2, 0) + np.where(random.random(tokens) < 0.01, 1, 0)
    tail = np.log(random.beta(1, 30, tokens))
    topk = {
        "sample_id": sample_ids,
        "ids": nested(offsets, random.integers(0, VOCABULARY, tokens * K), ints),
        "logprobs": nested(offsets, -random.exponential(2.0, tokens * K), floats),
        "valid": lists(offsets, np.full(tokens, K), pa.int16()),
        "tail_logmass": lists(offsets, tail, floats),
    }
    mask = {"sample_id": sample_ids, "mask_reasons": lists(offsets, reasons, ints)}
    found = {"rollouts": rollouts, "sampled": sampled, "teacher_topk": topk, "mask": mask}
    return {name: pa.table(columns, schema_for(name)) for name, columns in found.items()}


def nested(offsets: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    inner = pa.array(np.arange(0, len(values) + 1, K), pa.int32())
    entries = pa.ListArray.from_arrays(inner, pa.array(values.astype(kind.to_pandas_dtype())))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), entries)


def evaluated(store: Store, random: np.random.Generator, round: int) -> Artifact:
    rows = [
        {
            "prompt_id": f"eval{n}", "mode": mode, "sample_index": 0, "prompt_token_ids": [1, 2, 3],
            "completion_token_ids": [5, 6], "completion_text": "so", "finish_reason": "stop", "verifier": "exact",
            "correct": bool(random.random() < 0.4 + 0.2 * round) if mode == "greedy" else None,
            "reverse_kl_sum": float(random.gamma(2.0, 0.5 / (1 + round))) if mode == "kl" else None, "tokens": 2,
        }
        for mode in ("greedy", "kl") for n in range(HELD_OUT)
    ]  # fmt: skip
    return commit(store, "evaluate", round, {"evaluations": [pa.Table.from_pylist(rows, schema_for("evaluations"))]})


def make_store(root: Path, tokens: int) -> None:
    """The store, with the run `large`."""
    store, random, pieces = Store(root), np.random.default_rng(0), words()
    prepare, rounds = prepared(store, pieces), []
    for round, wanted in ((0, 0), (1, 1000), (2, tokens)):
        evaluation = evaluated(store, random, round)
        stages = {"evaluate": stage(evaluate=evaluation)}
        if round == 0:
            stages = {"prepare": stage(prepare=prepare)} | stages
        else:
            tables: dict[str, list[pa.Table]] = {}
            samples = max(1, round_up(wanted / LENGTH))
            for first in range(0, samples, SHARD):
                made = shard(random, pieces, round, first, min(SHARD, samples - first))
                for name, rows in made.items():
                    tables.setdefault(name, []).append(rows)
            made = {"rollout": commit(store, "rollout", round, {"rollouts": tables.pop("rollouts")})}
            signals = {name: commit(store, name, round, {name: rows}) for name, rows in tables.items()}
            steps = [
                {"step": 100 * (round - 1) + n, "round": round, "epoch": 0, "loss": 1 / n, "grad_norm": 1.0, "lr": 1e-6,
                 "samples": 64, "tokens": 64 * LENGTH, "seconds": 1.0, "outlier_fraction": 0.1}
                for n in range(1, 101)
            ]  # fmt: skip
            train = commit(
                store, "train", round, {"training_steps": [pa.Table.from_pylist(steps, schema_for("training_steps"))]}
            )
            stages = {"rollout": stage(**made), "supervise": stage(**signals), "train": stage(train=train), **stages}
        metrics: dict[str, float | None] = {"rollout_tokens": float(wanted), "reverse_kl": 1 / (1 + round)}
        rounds.append(RoundState(round=round, student_sha256=f"{round:064x}", metrics=metrics, stages=stages))
    for name in (RUN, OTHER):
        run = Run.create(root, name, load_experiment(CONFIG).model_dump(mode="json"), {"seed": 0})
        with run.lock():
            state = run.state
            state.status, state.rounds = "finished", rounds
            run.save(state)


def round_up(value: float) -> int:
    return int(np.ceil(value))


def stage(**artifacts: Artifact) -> StageState:
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    return StageState(key=next(iter(keys.values())), state="done", seconds=10.0, rows=1, artifacts=keys)


def measure(root: Path, tokens: int) -> None:
    """One line per question: the median of REPEATS and the slowest, the processor's seconds, rows."""
    medians: dict[str, float] = {}
    runs = {name: Run.open(root, name) for name in (RUN, OTHER)}
    states = {name: run.state for name, run in runs.items()}
    print("question,median_s,slowest_s,cpu_s,rows")
    for name, question in questions().items():
        given = {"other": OTHER} if any(parameter.name == "other" for parameter in question.parameters) else {}
        sql = question.sql(states[RUN], given, states)
        asked = [runs[RUN], *(runs[other] for other in given.values())]
        walls, processor, rows = [], time.process_time(), 0
        for _ in range(REPEATS):
            began = time.perf_counter()
            rows = Catalog(Store(root), *asked).query(sql, limit_seconds=300).num_rows
            walls.append(time.perf_counter() - began)
        processor = (time.process_time() - processor) / REPEATS
        print(f"{name},{statistics.median(walls):.2f},{max(walls):.2f},{processor:.2f},{rows}", flush=True)
        medians[name] = statistics.median(walls)
    slowest = max(medians, key=lambda name: medians[name])
    record(f"slowest named question over {tokens:,} tokens ({slowest})", [medians[slowest]], "3 s for 10,000,000", "s")
    began, processor = time.perf_counter(), time.process_time()
    made = page(root, [RUN])
    wall, processor = time.perf_counter() - began, time.process_time() - processor
    print(f"page of opd report: {wall:.1f} s, {processor:.1f} s of the processor, {len(made.html):,} bytes")


if __name__ == "__main__":
    root, tokens = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else TOKENS
    if not (root / "runs" / RUN).is_dir():
        make_store(root, tokens)
    measure(root, tokens)
