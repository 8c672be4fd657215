"""A whole run in a second: engines that draw from seeds, in place of worker processes; all else is the real run.

What they write depends on nothing but what a stage gives them, so two runs are equal when, and only when, every stage
got the same inputs."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file, save_file

from flows.experiment import Experiment, experiment_of
from storage.digests import table_digest
from storage.runs import RunState
from storage.schemas import schema_for
from storage.store import Store
from tasks.engines.sampler import Completion, Sampler
from tasks.engines.signals import mask_table, sampled_table

ROUNDS = 3
SHAPE = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "student": {"source": {"kind": "architecture", "config": SHAPE}},
    "teacher": {"source": {"kind": "architecture", "config": {**SHAPE, "intermediate_size": 48}}},
    "prompts": {
        "train": {"kind": "addition", "digits": 2, "count": 40, "seed": 1},
        "eval": {"kind": "addition", "digits": 2, "count": 4, "seed": 2},
    },
    "rollout": {"prompts_per_round": 8, "num_generations": 2, "max_completion_length": 8, "shard_prompts": 4},
    "objective": {"estimator": "policy_gradient"},
    "train": {"samples_per_step": 4, "lr": 1e-3},
    "evaluate": {"max_completion_length": 8},
    "runtime": {"device": "cpu", "threads": 1},
    "policy": {"rounds": ROUNDS},
}


def experiment(**changes: Any) -> Experiment:
    return experiment_of({**CONFIG, **changes}, "instant")


class InstantSampler(Sampler):
    """Completions drawn from their seeds; the shards are written by the real sampler's other half."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def _complete(self, job, prompts, seeds, progress):
        self.proof = {"weights": job["weights"]}
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            draw = random.Random(f"{job['weights']}{seed}{prompt}")
            ids = [draw.randrange(256) for _ in range(draw.randint(1, job["sampling"]["max_completion_length"]))]
            found.append(Completion(ids, str(seed), "stop", [-draw.random() for _ in ids]))
        progress(len(prompts), len(prompts))
        return found, [257]


class InstantScorer:
    """Values drawn from the tokens; the tables are made by the real scorer's other half."""

    def handle(self, job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
        if job["op"] == "reverse_kl":
            return {"sums": [self._draw(job["teacher"]["weights"], s["completion"]).random() for s in job["samples"]]}
        store = Store(job["store"])
        artifact = store.get(job["rollouts"]["stage"], job["rollouts"]["key"])
        rollouts = store.read_shard(artifact, "rollouts", job["shard"])
        names = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "behaviour_logprobs")
        completions = rollouts["completion_token_ids"].to_pylist()
        values = {name: [np.array([-self._draw(name, ids).random() for _ in ids]) for ids in completions] for name in names}
        tables = {"sampled": sampled_table(rollouts, values)}
        if job["mask"] is not None:
            tables["mask"] = mask_table(rollouts, tables["sampled"], job["mask"])
        for output in job["outputs"]:
            writer = store.shard_writer(output["stage"], output["key"])
            writer.write_shard(output["table"], job["shard"], tables[output["table"]])
        return {"samples": rollouts.num_rows, "tokens": sum(map(len, completions)), "outside_nucleus": 0}

    def _draw(self, *parts: object) -> random.Random:
        return random.Random(str(parts))


class InstantTrainer:
    """Adds to every weight a number drawn from all that training depends on."""

    def handle(self, job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
        store = Store(job["store"])
        digest = hashlib.sha256(str((job["seed"], job["round"], job["config"])).encode())
        for name, place in sorted({"rollouts": job["rollouts"], **job["signals"]}.items()):
            digest.update(table_digest(store.read_table(store.get(place["stage"], place["key"]), name)).encode())
        if job["state"]:
            digest.update((Path(job["state"]) / "state").read_bytes())
        shift = np.float32(int.from_bytes(digest.digest()[:4], "big") / 2**32)
        outputs = job["outputs"]
        if outputs.get("student"):
            source, target = Path(job["model"]), Path(outputs["student"])
            shutil.copytree(source, target, dirs_exist_ok=True)
            weights = {name: tensor + shift for name, tensor in load_file(source / "model.safetensors").items()}
            save_file(weights, target / "model.safetensors", {"format": "pt"})
        if outputs.get("trainer_state"):
            (Path(outputs["trainer_state"]) / "state").write_text(digest.hexdigest())
        if outputs.get("steps"):
            row = {
                "step": job["round"], "round": job["round"], "epoch": 0, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1,
                "samples": 4, "tokens": 9, "seconds": 0.0,
            }  # fmt: skip
            table = pa.Table.from_pylist([row], schema_for("training_steps"))
            store.shard_writer(outputs["steps"]["stage"], outputs["steps"]["key"]).write_shard("training_steps", 0, table)
        return {"steps": 1, "last_step": job["round"], "metrics": {"loss": 1.0}}


class InstantPool:
    """In the place of a WorkerPool. `before` is called with (role, number of the job from 1) before every job."""

    def __init__(self, before: Callable[[str, int], None] = lambda role, number: None) -> None:
        self.handlers = {"sampler": InstantSampler(), "scorer": InstantScorer(), "trainer": InstantTrainer()}
        self.before, self.jobs = before, 0

    @contextmanager
    def serving(self, *_: object) -> Iterator[InstantPool]:
        yield self

    def run(self, role: str, jobs: list[dict], on_progress: Any = None, settings_extra: Any = None) -> list[dict]:
        results = []
        for index, job in enumerate(jobs):
            self.jobs += 1
            self.before(role, self.jobs)
            report = lambda done, total, i=index: on_progress and on_progress(i, done, total)  # noqa: E731
            results.append(self.handlers[role].handle(job, report))
        return results

    def stage_done(self) -> None:
        """Nothing to end."""


def students(state: RunState) -> list[str | None]:
    """The digests of the weights that the rounds ended with."""
    return [entry.student_sha256 for entry in state.rounds]
