"""A small store to train on, and jobs for a trainer that is already running."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from overriding_jobs import overriding
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from storage.schemas import MaskReason, schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.stage import Context, Work
from tasks.trainer.launch import launch_command
from tasks.workers.actor import free_port
from tasks.workers.jobs import TrainJob, TrainResult, WarmupJob
from tasks.workers.metrics import Metrics
from tasks.workers.pool import CHECKOUT, Worker
from tasks.workers.runtime import RuntimeConfig

SAMPLES, K, VOCABULARY = 12, 8, 264


def tiny_model(seed: int, hidden: int = 64, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config).eval()


def commit_model(store: Store, number: int, model: PreTrainedModel) -> Artifact:
    with store.building(ArtifactSpec.of("model", 1, {"number": number}, {})) as builder:
        folder = builder.directory("model")
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
        return builder.commit()


def commit_table(store: Store, stage: str, table: str, rows: list[dict[str, Any]], **content: str) -> Artifact:
    with store.building(ArtifactSpec.of(stage, 1, {"table": table, "rows": len(rows)}, {})) as builder:
        builder.write_shard(table, 0, pa.Table.from_pylist(rows, schema_for(table)))
        return builder.commit(content=content, tables={table: 1})


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary at every completion token."""
    logits = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@dataclass
class World:
    """A store with a student, rollouts and signals."""

    store: Store
    student: Artifact
    rollouts: Artifact
    signals: dict[str, Artifact]
    prompts: Artifact
    samples: list[dict[str, Any]] = field(default_factory=list)


def make_world(root: Path) -> World:
    store = Store(root)
    student, teacher = tiny_model(1), tiny_model(2, hidden=96)
    random = np.random.Generator(np.random.PCG64(0))
    rollouts, sampled, topk, own, masks = [], [], [], [], []
    for index in range(SAMPLES):
        prompt = random.integers(8, VOCABULARY, size=int(random.integers(3, 9))).tolist()
        completion = random.integers(8, VOCABULARY, size=int(random.integers(2, 21))).tolist()
        ids = torch.tensor(completion)[:, None]
        of_student, of_teacher = (logprobs_of(model, prompt, completion) for model in (student, teacher))
        behaviour = of_student.gather(1, ids)[:, 0]
        top = of_teacher.topk(K, dim=-1)
        tail = of_teacher.scatter(1, top.indices, -torch.inf).logsumexp(-1)
        name = f"p{index}/1/0"
        rollouts.append(
            {
                "sample_id": name,
                "prompt_id": f"p{index}",
                "sample_index": 0,
                "prompt_token_ids": prompt,
                "completion_token_ids": completion,
                "sampling_logprobs": (behaviour - 0.1 * torch.tensor(random.standard_normal(len(ids)))).tolist(),
                "behaviour": "student",
                "prefix_length": 0,
                "finish_reason": "stop",
                "seed": index,
                "completion_text": "",
            }
        )
        sampled.append(
            {
                "sample_id": name,
                "student_logprobs": behaviour.tolist(),
                "teacher_logprobs": of_teacher.gather(1, ids)[:, 0].tolist(),
                "student_entropy": (-(of_student.exp() * of_student).sum(-1)).tolist(),
                "teacher_entropy": (-(of_teacher.exp() * of_teacher).sum(-1)).tolist(),
                "behaviour_logprobs": behaviour.tolist(),
            }
        )
        topk.append(
            {
                "sample_id": name,
                "ids": top.indices.tolist(),
                "logprobs": top.values.tolist(),
                "valid": [K] * len(completion),
                "tail_logmass": tail.tolist(),
            }
        )
        mine = of_student.topk(K, dim=-1)
        own.append(
            {
                "sample_id": name,
                "ids": mine.indices.tolist(),
                "student_logprobs": mine.values.tolist(),
                "teacher_logprobs": of_teacher.gather(1, mine.indices).tolist(),
                "valid": [K] * len(completion),
                "student_tail_logmass": of_student.scatter(1, mine.indices, -torch.inf).logsumexp(-1).tolist(),
                "teacher_tail_logmass": of_teacher.scatter(1, mine.indices, -torch.inf).logsumexp(-1).tolist(),
            }
        )
        # one sample has nothing left to learn from; elsewhere a token is now and then masked
        reasons = np.ones(len(completion), int) if index == 3 else (random.random(len(completion)) < 0.15).astype(int)
        masks.append({"sample_id": name, "mask_reasons": reasons.tolist()})
    texts = [
        {
            "prompt_id": f"w{index}",
            "split": "warmup",
            "text": "",
            "token_ids": row["prompt_token_ids"],
            "completion": "",
            "completion_token_ids": row["completion_token_ids"],
        }
        for index, row in enumerate(rollouts)
    ]
    return World(
        store=store,
        student=commit_model(store, 1, student),
        rollouts=commit_table(store, "rollout", "rollouts", rollouts),
        signals={
            "sampled": commit_table(store, "sampled", "sampled", list(reversed(sampled))),
            "teacher_topk": commit_table(store, "teacher_topk", "teacher_topk", topk),
            "student_topk": commit_table(store, "student_topk", "student_topk", own),
            "mask": commit_table(store, "mask", "mask", masks),
        },
        prompts=commit_table(store, "prepare", "prompts", texts, **{"prompts:warmup": "some"}),
        samples=rollouts,
    )


REWARDS = [1, 0, 1, 0, 0, None, 1, 1, 1, 0, 0, 0]
"""Of samples in groups of three: right and wrong, one without a verdict, all right, all wrong."""


@dataclass
class Judged:
    """The world's samples in groups of three, with rewards, spans and contexts; every fourth sample has no context."""

    world: World
    rollouts: Artifact
    rewards: Artifact
    contexts: Artifact


def make_judged(world: World) -> Judged:
    samples = [row | {"prompt_id": f"p{number // 3}"} for number, row in enumerate(world.samples)]
    rewards = [
        {"sample_id": row["sample_id"], "reward": reward, "segment_ends": [1]}
        | ({"span_starts": [0], "span_ends": [1], "span_kinds": ["key"]} if reward else {})
        for row, reward in zip(samples, REWARDS, strict=True)
    ]
    contexts = [
        {"sample_id": row["sample_id"], "source": "sibling", "prompt_token_ids": [9, 9] if number % 4 else None}
        for number, row in enumerate(samples)
    ]
    return Judged(
        world,
        commit_table(world.store, "grouped", "rollouts", samples),
        commit_table(world.store, "judge", "rewards", rewards),
        commit_table(world.store, "context", "contexts", contexts),
    )


@dataclass
class Paired:
    """The world's samples as pairs: of each two the first is the student's, the second the teacher's."""

    rollouts: Artifact
    signals: dict[str, Artifact]
    masks: list[list[int]]
    """The reasons of each sample's tokens."""


def make_paired(world: World) -> Paired:
    rows, masks = [], []
    table = world.store.read_table(world.signals["mask"], "mask").to_pylist()
    reasons = {row["sample_id"]: row["mask_reasons"] for row in table}
    for number, row in enumerate(world.samples):
        teachers = number % 2 == 1
        own = {"prompt_id": f"p{number // 2}", "sample_index": number % 2}
        own |= {"behaviour": "teacher" if teachers else "student"}
        rows.append(row | own | {"prefix_length": len(row["completion_token_ids"]) if teachers else 0})
        prefix = int(MaskReason.TEACHER_PREFIX) if teachers else 0
        masks.append([reason | prefix for reason in reasons[row["sample_id"]]])
    marked = [{"sample_id": row["sample_id"], "mask_reasons": mask} for row, mask in zip(rows, masks, strict=True)]
    signals = world.signals | {"mask": commit_table(world.store, "paired_mask", "mask", marked)}
    return Paired(commit_table(world.store, "paired_rollout", "rollouts", rows), signals, masks)


def launch_trainer(processes: int, log: Path, plugins: Sequence[str] = (), **environment: str) -> Worker:
    """A trainer of that many ranks, launched as the supervisor does. It takes settings and failpoints per job."""
    settings = {
        "device": "cpu",
        "threads": 1,
        "micro_batch_tokens": 64,
        "head_chunk_tokens": 16,
        "deepspeed": None,
        "activation_checkpointing": False,
        "checkpoint_minutes": None,
        "max_export_error": 0.01,
        "plugins": ["trainer_with_overrides", *plugins],
        "plugin_path": str(CHECKOUT / "tests" / "plugins"),
    }
    argv, more = launch_command(processes, "cpu", free_port())
    env = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OPD_WORKER_SETTINGS": json.dumps(settings),
    }
    return Worker("trainer", argv, env | more | environment, log, processes)


@dataclass
class Made:
    """What a job made, read back."""

    artifacts: dict[str, Artifact]
    store: Store
    metrics: Metrics
    """What progress told last."""
    said: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        name = "train" if "train" in self.artifacts else "warmup"
        return self.store.read_table(self.artifacts[name], "training_steps").to_pylist()

    @property
    def losses(self) -> np.ndarray:
        return np.array([row["loss"] for row in self.rows])

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """Of the trainer's state, by parameter name: master, exp_avg or exp_avg_sq."""
        folder = self.store.materialize(self.artifacts["trainer_state"], "state")
        return {
            name.removeprefix(f"{kind}/"): value for name, value in load_file(folder / f"{kind}.safetensors").items()
        }

    def student(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.store.materialize(self.artifacts["student"]), dtype="auto")


class Pool:
    """Stands in for `WorkerPool`: jobs go to one warm trainer, with the runtime settings that a test wants."""

    def __init__(self, worker: Worker, runtime: dict[str, Any]) -> None:
        self.worker, self.runtime = worker, runtime
        self.seen: list[tuple[int, int, Metrics]] = []

    def run(self, role: str, job: TrainJob | WarmupJob, on_progress: Any) -> TrainResult:
        assert role == "trainer"

        def report(done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
            self.seen.append((done, total, metrics or {}))
            on_progress(done, total, metrics, note)

        return self.worker.run(overriding(job, **self.runtime), report, timeout=120)


def make(
    work: Work,
    store: Store,
    worker: Worker,
    tag: str | None,
    said: list[str] | None = None,
    config: RuntimeConfig | None = None,
    **runtime: Any,
) -> Made:
    """Builds the outputs of `work` that are missing. `tag` keeps artifacts apart that differ in runtime only, which no key
    shows. What is logged is added to `said`; `config` is what is recorded as the runtime, whatever the trainer does."""
    pool, said = Pool(worker, runtime), [] if said is None else said
    context = Context(
        store=store,
        runtime=config or RuntimeConfig(device="cpu"),
        workers=pool,  # type: ignore[arg-type]
        progress=lambda done, total, unit, metrics=None: None,
        log=said.append,
    )
    tagged = {} if tag is None else {"tag": tag}
    other = {
        name: ArtifactSpec.of(spec.stage, spec.version, spec.identity | tagged, spec.inputs)
        for name, spec in work.outputs.items()
    }
    with ExitStack() as stack:
        builders = {name: stack.enter_context(store.building(other[name])) for name in sorted(other)}
        work.build({name: builder for name, builder in builders.items() if builder.committed is None}, context)
    made = {name: store.get(spec.stage, spec.key) for name, spec in other.items()}
    assert pool.seen and pool.seen[-1][0] == pool.seen[-1][1], "progress reaches its total"
    artifacts = {name: artifact for name, artifact in made.items() if artifact is not None}
    return Made(artifacts, store, pool.seen[-1][2], said)


def assert_same_step(one: Made, two: Made, least: float = 1e-5) -> None:
    """Two trainings of one step had equal losses and gradients, but for the order of sums; some part of them is above `least`."""
    assert abs(one.losses[0] - two.losses[0]) < 1e-6
    mine, theirs = one.tensors("exp_avg"), two.tensors("exp_avg")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-7
    assert any(float(value.abs().max()) > least for value in mine.values())
