"""Fixtures that tests of several folders share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import registries
from safetensors.numpy import save_file

from storage.runs import RoundState, Run, StageState
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.workers.pool import Worker

pytest_plugins = ["fault_trials", "pytester", "shared_prefect"]
# A background shell ignores SIGINT, nohup SIGHUP, and children inherit that; a handler of our own they do not inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
# Commands print tables at full width where neither a terminal nor these give one; a process of pytest-xdist has them.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

SHARED = {
    "a real run": ("tests/e2e/",),
    "a Prefect server": (
        "tests/flows/prefect_/",
        *(f"tests/faults/test_{n}.py" for n in ("full_disk", "prefect", "secrets")),
    ),
    "warm trainers": ("tests/tasks/trainer/", "tests/faults/test_checkpoint.py"),
}
"""Session fixtures that take long to make -> the tests that use them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Work for the two processes of `make test` (pytest-xdist): a process gets a whole file, or all files of a group of `SHARED`,
    so that what they share is made once. (pytest-xdist 3.8's own groups, `--dist loadgroup`, do not work with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((group for group, places in SHARED.items() if file.startswith(places)), file)

    config.option.loadscopereorder = False  # as collected: what takes longest comes first
    return ByFile(config, log)


WORDS = ["<end>", "one", "two", "three", "\ufffd"]
"""Texts of the token ids in `example_store`; the last is no valid text alone."""


def commit(store: Store, stage: str, number: int, meta: dict[str, Any] | None = None, **tables: list[dict]) -> Artifact:
    """A committed artifact with these rows, two shards per table."""
    spec = ArtifactSpec.of(stage, 1, {"number": number}, {})
    with store.building(spec) as builder:
        for table, rows in tables.items():
            half = (len(rows) + 1) // 2
            for shard, part in enumerate((rows[:half], rows[half:])):
                builder.write_shard(table, shard, pa.Table.from_pylist(part, schema_for(table)))
        return builder.commit(meta=meta or {}, tables=dict.fromkeys(tables, 2))


def commit_student(store: Store, number: int) -> Artifact:
    """A committed tree with the files of a tiny checkpoint."""
    with store.building(ArtifactSpec.of("student", 1, {"number": number}, {})) as builder:
        folder = builder.directory("model")
        save_file({"weight": np.full((2, 2), number, dtype="float32")}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "qwen3"}')
        (folder / "tokenizer.json").write_text("{}")
        return builder.commit()


def rollout(round: int, index: int) -> dict[str, Any]:
    """A sample of `index + 1` tokens with ids 1, 2, ... and log-probabilities -1, -2, ..."""
    length = index + 1
    return {
        "sample_id": f"p{index}/{round}/0",
        "prompt_id": f"p{index}",
        "sample_index": 0,
        "prompt_token_ids": [1],
        "completion_token_ids": [1 + t % 4 for t in range(length)],
        "sampling_logprobs": [-1.0 - t for t in range(length)],
        "behaviour": "student",
        "prefix_length": 0,
        "finish_reason": "stop",
        "seed": index,
        "completion_text": "".join(WORDS[1 + t % 4] for t in range(length)),
        "reward": None,
    }


def sampled(round: int, index: int) -> dict[str, Any]:
    length = index + 1
    values = {
        "student_logprobs": [-0.5 - t for t in range(length)],
        "teacher_logprobs": [-0.25 - t for t in range(length)],
        "student_entropy": [0.5] * length,
        "teacher_entropy": [0.25] * length,
    }
    return {"sample_id": f"p{index}/{round}/0", "behaviour_logprobs": None, **values}


def mask(round: int, index: int) -> dict[str, Any]:
    return {"sample_id": f"p{index}/{round}/0", "mask_reasons": [0] * index + [1]}


def step(number: int, round: int) -> dict[str, Any]:
    required = {
        "epoch": 0,
        "loss": 1.0 / number,
        "grad_norm": 1.0,
        "lr": 0.1,
        "samples": 4,
        "tokens": 9,
        "seconds": 0.5,
    }
    return {"step": number, "round": round, **required}


def evaluation(index: int, correct: bool) -> dict[str, Any]:
    return {
        "prompt_id": f"held{index}",
        "mode": "greedy",
        "sample_index": 0,
        "prompt_token_ids": [1],
        "completion_token_ids": [1, 2],
        "completion_text": "one two",
        "finish_reason": "stop",
        "verifier": "exact",
        "correct": correct,
        "reverse_kl_sum": None,
        "tokens": 2,
    }


def prompt(name: str, split: str) -> dict[str, Any]:
    return {"prompt_id": name, "split": split, "text": "one", "token_ids": [1]}


def word(number: int) -> dict[str, Any]:
    text = None if WORDS[number] == "\ufffd" else WORDS[number]
    return {"tokenizer": "student", "id": number, "token": f"w{number}", "text": text, "special": number == 0}


def done(**artifacts: Artifact) -> StageState:
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    rows = sum(sum(artifact.rows.values()) for artifact in artifacts.values())
    return StageState(key=next(iter(keys.values())), state="done", seconds=2.0, rows=rows, artifacts=keys)


EXAMPLE_CONFIG = {
    "seed": 0,
    "student": {"source": {"kind": "checkpoint", "path": "/models/small"}},
    "teacher": {"source": {"kind": "hub", "repo": "acme/large", "revision": "0123abc"}},
    "prompts": {"train": {"kind": "file", "path": "/data/train.jsonl"}, "eval": None},
}
"""What the example's runs have of a config."""


@pytest.fixture(scope="session")
def example_store_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `demo` with rounds 0 to 2, run `other` that shares its rounds 0 and 1, and one artifact that none uses."""
    root = tmp_path_factory.mktemp("store")
    store = Store(root)
    prepare = commit(
        store,
        "prepare",
        0,
        prompts=[prompt("p0", "train"), prompt("p1", "train"), prompt("held0", "eval")],
        vocabulary=[word(i) for i in range(len(WORDS))],
    )
    evaluations = [commit(store, "evaluate", r, evaluations=[evaluation(i, i < r) for i in range(4)]) for r in range(3)]
    students = [commit_student(store, r) for r in range(3)]
    warmup = commit(store, "warmup", 0, training_steps=[step(1, 0)])
    rounds = [
        RoundState(
            round=0,
            student_sha256=students[0].content["weights"],
            metrics={"accuracy_greedy": 0.25, "reverse_kl": 1.5, "mean_length": 7.0, "clipped_ratio": 0.0},
            stages={
                "prepare": done(prepare=prepare),
                "warmup": done(student=students[0], warmup=warmup),
                "evaluate": done(evaluate=evaluations[0]),
            },
        )
    ]
    for r in (1, 2):
        rollouts = commit(store, "rollout", r, rollouts=[rollout(r, i) for i in range(5)])
        signals = {
            "sampled": commit(store, "sampled", r, sampled=[sampled(r, i) for i in range(5)]),
            "mask": commit(store, "mask", r, mask=[mask(r, i) for i in range(5)]),
        }
        by_teacher = [{"step": 2 * r, "round": r, "teacher": "only", "samples": 4, "tokens": 9}]
        train = commit(store, "train", r, training_steps=[step(2 * r - 1, r), step(2 * r, r)], teacher_steps=by_teacher)
        stages = {
            "rollout": done(rollout=rollouts),
            "supervise": done(**signals),
            "train": done(student=students[r], train=train),
            "evaluate": done(evaluate=evaluations[r]),
        }
        metrics = {"accuracy_greedy": 0.25 + r / 4, "reverse_kl": 1.5 / (1 + r), "rollout_tokens": 15.0}
        digest = students[r].content["weights"]
        rounds.append(RoundState(round=r, student_sha256=digest, metrics=metrics, stages=stages))
    commit(store, "rollout", 99, rollouts=[rollout(9, 0)])
    for name, part in (("demo", rounds), ("other", rounds[:2])):
        run = Run.create(root, name, EXAMPLE_CONFIG, {"seed": 0})
        with run.lock():
            state = run.state
            state.status, state.rounds = "finished", part
            run.save(state)
        run.log_path("train").write_text("".join(f"line {i}\n" for i in range(3)))
    return root


@pytest.fixture
def example_store(example_store_once: Path, tmp_path: Path) -> Path:
    """A copy of the example that a test may change. Hard links would share damage, so files are copied."""
    root = tmp_path / "store"
    shutil.copytree(example_store_once, root)
    return root


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Worker]]:
    """Real trainers of one and of two ranks, launched once as the supervisor does, and kept warm for all tests."""
    from trainer_world import launch_trainer  # imports torch

    folder = tmp_path_factory.mktemp("trainers")
    temporary = tempfile.mkdtemp(prefix="opd t#m?%20-")  # characters that end a URL's path, or stand for others in it
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", temporary)
        one, two = pool.map(lambda ranks: launch_trainer(ranks, folder / f"{ranks}.log", ["extra_credits"]), (1, 2))
        yield {1: one, 2: two}
        list(pool.map(Worker.close, (one, two)))
    shutil.rmtree(temporary)


@pytest.fixture
def own_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker, launcher or pool of a plugin that an earlier test of this process has registered."""
    registries.own_workers(monkeypatch)
