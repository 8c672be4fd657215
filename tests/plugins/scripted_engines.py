"""A plugin that takes all three engines' places, so that a whole run takes seconds: real stages, store and supervisor, made-up
numbers. Every number depends on all that a real engine's would (weights, tokens, seeds, earlier state), so that anything
lost, doubled or changed on the way ends in another student. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

import tasks.trainer.launch
from storage.artifacts.checkpoints import Checkpoints, write_file
from storage.artifacts.digests import table_digest, weights_digest
from storage.disk.failpoints import failpoint
from storage.schemas import schema_for
from storage.store import Artifact, Store
from tasks.plugins import register_role
from tasks.signals import Shard, signal_named
from tasks.trainer.batching import plan_steps

for role in ("sampler", "scorer", "trainer"):
    register_role(role, f"{__name__}:{role.capitalize()}")

# One rank needs no launcher, and DeepSpeed's takes seconds to import.
tasks.trainer.launch.launch_command = lambda *_: ([sys.executable, "-m", "tasks.workers.main", "trainer"], {})

VALUES = 2048
"""Weights of the student: 8 KiB, so that a block of 4 KiB is half of them."""


def draw(*name: object) -> np.random.Generator:
    """Numbers that depend on the name alone."""
    return np.random.default_rng(int(digest(*name)[:16], 16))


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def artifact(store: Store, place: dict[str, str]) -> Artifact:
    found = store.get(place["stage"], place["key"])
    assert found is not None, place
    return found


class Engine:
    def __init__(self, settings: dict) -> None:
        self.settings = settings

    def close(self) -> None:
        """Nothing is kept."""


class Sampler(Engine):
    def handle(self, job: dict, progress) -> dict:
        assert weights_digest(job["model"]) == job["weights"]
        sampling = job["sampling"]
        if job["op"] == "generate_shard":
            pairs = list(zip(job["prompts"], job["seeds"], strict=True))
            completions = [self.complete(job, prompt, seed) for prompt, seed in pairs]
            return {"completions": completions, "stop_token_ids": [257], "proof": {"weights": job["weights"]}}
        rows = []
        for done, sample in enumerate(job["samples"], 1):
            prompt = job["prompts"][sample["prompt"]]
            made = self.complete(job, prompt["token_ids"], sample["seed"])
            rows.append(
                {
                    "sample_id": sample["sample_id"],
                    "prompt_id": prompt["prompt_id"],
                    "sample_index": sample["sample_index"],
                    "prompt_token_ids": prompt["token_ids"],
                    "completion_token_ids": made["token_ids"],
                    "sampling_logprobs": made["logprobs"],
                    "behaviour": "student",
                    "prefix_length": 0,
                    "finish_reason": made["finish_reason"],
                    "seed": sample["seed"],
                    "completion_text": made["text"],
                    "reward": None,
                }
            )
            progress(done, len(job["samples"]))
        writer = Store(job["store"]).shard_writer(job["stage"], job["key"])
        writer.write_shard("rollouts", job["shard"], pa.Table.from_pylist(rows, schema=schema_for("rollouts")))
        assert sampling["max_completion_length"] >= 1
        return {"samples": len(rows), "stop_token_ids": [257], "proof": {"weights": job["weights"]}}

    def complete(self, job: dict, prompt: list[int], seed: int) -> dict:
        numbers = draw(job["weights"], prompt, seed, job["sampling"])
        limit = job["sampling"]["max_completion_length"]
        length = int(numbers.integers(1, limit + 1))
        return {
            "token_ids": numbers.integers(0, 256, length).tolist(),
            "text": f"#{seed % 1000}",
            "finish_reason": "length" if length == limit else "stop",
            "logprobs": (-numbers.random(length)).tolist(),
        }


class Scorer(Engine):
    def handle(self, job: dict, progress) -> dict:
        models = {name: weights_digest(job[name]["path"]) for name in ("student", "teacher") if job[name]["path"]}
        assert all(weights == job[name]["weights"] for name, weights in models.items())
        if job["op"] == "reverse_kl":
            return {"sums": [float(draw(models, sample).random()) for sample in job["samples"]]}
        store = Store(job["store"])
        rollouts = store.read_shard(artifact(store, job["rollouts"]), "rollouts", job["shard"])
        outputs = {output["table"]: output for output in job["outputs"]}
        flags, values = None, {}
        if job["flags"] is None:
            values = self.sampled(models, rollouts)
        else:
            flags = store.read_shard(artifact(store, job["flags"]), "sampled", job["shard"])
        for name, output in outputs.items():
            signal = signal_named(name)
            for k in signal.wanted(output["k"], job["sampling"]).teacher.top:
                values |= self.top(models, rollouts, k)
            table = signal.table(Shard(rollouts, values, output["k"], output["encoding"], job["mask"] or {}, flags))
            writer = store.shard_writer(output["stage"], output["key"])
            writer.write_shard(name, job["shard"], table, signal.schema)
        progress(rollouts.num_rows, rollouts.num_rows)
        return {"outside_nucleus": 0}

    @staticmethod
    def samples(rollouts: pa.Table) -> list[tuple[list[int], int]]:
        return [(ids, len(ids)) for ids in rollouts["completion_token_ids"].to_pylist()]

    def sampled(self, models: dict, rollouts: pa.Table) -> dict[str, list[np.ndarray]]:
        signs = {"student_logprobs": -1, "teacher_logprobs": -1, "student_entropy": 1, "teacher_entropy": 1}
        return {
            name: [sign * draw(models, name, ids).random(n) for ids, n in self.samples(rollouts)]
            for name, sign in signs.items()
        }

    def top(self, models: dict, rollouts: pa.Table, k: int) -> dict[str, list[np.ndarray]]:
        """A teacher whose K candidates are equally likely: ids in order, nothing in the tail."""
        samples = self.samples(rollouts)
        first = [draw(models, "top", ids).integers(0, 256 - k, n) for ids, n in samples]
        return {
            f"teacher_top{k}_ids": [starts[:, None] + np.arange(k) for starts in first],
            f"teacher_top{k}_logprobs": [np.full((n, k), -np.log(k), np.float32) for _, n in samples],
            f"teacher_top{k}_valid": [np.full(n, k) for _, n in samples],
            f"teacher_top{k}_tail": [np.full(n, -30.0, np.float32) for _, n in samples],
        }


class Trainer(Engine):
    """Its state remembers every sample of every step since the beginning: what was used, and how often."""

    def handle(self, job: dict, progress) -> dict:
        store, outputs = Store(job["store"]), job["outputs"]
        rollouts = store.read_table(artifact(store, job["rollouts"]), "rollouts")
        signals = {name: store.read_table(artifact(store, at), name) for name, at in sorted(job["signals"].items())}
        ids = rollouts["sample_id"].to_pylist()
        assert all(table["sample_id"].to_pylist() == ids for table in signals.values())
        used = json.loads((Path(job["state"]) / "used.json").read_text()) if job["state"] else []
        chain = digest(weights_digest(job["model"]), used, [table_digest(t) for t in (rollouts, *signals.values())])
        config, rows = job["config"], []
        total = len(ids) * config["epochs_per_round"]
        steps = plan_steps(job["seed"], job["round"], len(ids), config["samples_per_step"], total)
        kept = Checkpoints(store.root, Path(job["checkpoints"]["folder"]), job["checkpoints"]["settings"])
        found, problems = kept.newest()
        for problem in problems:
            progress(0, len(steps), note=problem)
        if found is not None:
            saved = json.loads(found.files[0].read_text())
            used, chain, rows = saved["used"], saved["chain"], saved["rows"]
        for number, step in enumerate(steps[len(rows) :], len(rows) + 1):
            if rows:
                folder, text = kept.begin(), json.dumps({"used": used, "chain": chain, "rows": rows})
                record = write_file(folder / "state.json", lambda path, text=text: path.write_text(text))
                kept.commit(folder, len(rows), [record], {})
            batch = [ids[row] for row in step.rows]
            used.append([job["round"], batch])
            chain = digest(chain, batch)
            rows.append(
                {"step": len(used), "round": job["round"], "epoch": step.epoch, "loss": int(chain[:8], 16) / 2**32}
                | {"grad_norm": 1.0, "lr": 1e-3, "samples": len(batch), "tokens": len(batch), "seconds": 0.0}
            )
            failpoint("train.after_step")
            progress(number, len(steps))
        if outputs.get("trainer_state"):
            Path(outputs["trainer_state"], "used.json").write_text(json.dumps(used))
        if outputs.get("student"):
            target = Path(outputs["student"])
            for name in ("config.json", "tokenizer.json"):
                shutil.copyfile(Path(job["model"], name), target / name)
            save_file({"weight": draw(chain).random(VALUES, np.float32)}, target / "model.safetensors")
        if outputs.get("steps"):
            writer = store.shard_writer(outputs["steps"]["stage"], outputs["steps"]["key"])
            writer.write_shard("training_steps", 0, pa.Table.from_pylist(rows, schema=schema_for("training_steps")))
        metrics = {"loss": rows[-1]["loss"]}
        return {"steps": len(rows), "last_step": rows[-1]["step"], "metrics": metrics}
