"""A plugin that takes all three engines' places, so that a whole run takes seconds: real stages, store and supervisor, made-up
numbers. Every number depends on all that a real engine's would (weights, tokens, seeds, earlier state), so that anything
lost, doubled or changed on the way ends in another student. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

import tasks.trainer.launch
from storage.artifacts.batches import BatchLog
from storage.artifacts.checkpoints import Checkpoints, write_file
from storage.artifacts.digests import table_digest, weights_digest
from storage.disk.failpoints import failpoint
from storage.schemas import schema_for
from storage.store import Store
from tasks.routing import teacher_of_prompts
from tasks.signals import Shard, signal_named
from tasks.trainer.batching import plan_steps
from tasks.workers.jobs import KLJob, SampleResult, ScoreResult, ShardDone, TrainResult, register_role

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


class Engine:
    def __init__(self, settings: dict) -> None:
        self.settings = settings

    def close(self) -> None:
        """Nothing is kept."""


class Sampler(Engine):
    def handle(self, job, link):
        assert weights_digest(job.model.path) == job.model.weights
        writer = Store(job.store).shard_writer(job.target.stage, job.target.key)
        target = writer.intermediate() if job.intermediate else writer
        prompts = Store(job.store).read_table(Store(job.store).require(job.prompts.stage, job.prompts.key), "prompts")
        tokens = {row["prompt_id"]: row["token_ids"] for row in prompts.to_pylist() if row["split"] == job.split}
        log, done = BatchLog(writer.path, job.log_table), 0
        while (item := link.next()) is not None:
            log.add(item.shard, done)
            rows = []
            for request in item.requests:
                made = self.complete(job, item.sampling, tokens[request.prompt_id], request.seed)
                rows.append(
                    {
                        "sample_id": request.sample_id,
                        "prompt_id": request.prompt_id,
                        "sample_index": request.sample_index,
                        "prompt_token_ids": tokens[request.prompt_id],
                        "completion_token_ids": made["token_ids"],
                        "sampling_logprobs": made["logprobs"],
                        "behaviour": "student",
                        "prefix_length": 0,
                        "finish_reason": made["finish_reason"],
                        "seed": request.seed,
                        "completion_text": made["text"],
                        "reward": None,
                    }
                )
                link.progress(done := done + 1, 0)
            log.writing(item.shard)
            target.write_shard("rollouts", item.shard, pa.Table.from_pylist(rows, schema=schema_for("rollouts")))
            link.done(ShardDone(item.shard, item.size))
        return SampleResult([257], {"weights": job.model.weights})

    def complete(self, job, sampling, prompt: list[int], seed: int) -> dict:
        numbers = draw(job.model.weights, prompt, seed, msgspec.structs.asdict(sampling))
        limit = sampling.max_completion_length
        length = int(numbers.integers(1, limit + 1))
        return {
            "token_ids": numbers.integers(0, 256, length).tolist(),
            "text": f"#{seed % 1000}",
            "finish_reason": "length" if length == limit else "stop",
            "logprobs": (-numbers.random(length)).tolist(),
        }


class Scorer(Engine):
    def handle(self, job, link):
        named = {"student": job.student, "teacher": job.teacher}
        models = {name: weights_digest(model.path) for name, model in named.items() if model.path}
        assert all(weights == named[name].weights for name, weights in models.items())
        store, done = Store(job.store), 0
        while (item := link.next()) is not None:
            self.score_kl(store, job, item, models) if isinstance(job, KLJob) else self.score(store, job, item, models)
            link.progress(done := done + item.size, 0)
            link.done(ShardDone(item.shard, item.size))
        return ScoreResult()

    def score_kl(self, store: Store, job, item, models: dict) -> None:
        between = store.shard_writer(job.target.stage, job.target.key).intermediate()
        rows = between.require("rollouts", item.shard).to_pylist()
        told = ("prompt_token_ids", "completion_token_ids")
        sums = [float(draw(models, [row[name] for name in told]).random()) for row in rows]
        found = [{"sample_id": r["sample_id"], "reverse_kl_sum": value} for r, value in zip(rows, sums, strict=True)]
        table = pa.Table.from_pylist(found, schema=schema_for("completion_kl"))
        between.write_shard("completion_kl", item.shard, table)

    def score(self, store: Store, job, item, models: dict) -> None:
        rollouts = store.read_shard(store.require(job.rollouts.stage, job.rollouts.key), "rollouts", item.shard)
        if job.names is not None:
            of = teacher_of_prompts(store, store.require(job.prompts.stage, job.prompts.key))
            rollouts = rollouts.filter(pa.array([of[name] in job.names for name in rollouts["prompt_id"].to_pylist()]))
            assert rollouts.num_rows == item.size
        flags, values = None, {}
        if job.flags is None:
            values = self.sampled(models, rollouts)
        else:
            flags = store.read_shard(store.require(job.flags.stage, job.flags.key), "sampled", item.shard)
        rules = msgspec.structs.asdict(job.mask) if job.mask is not None else {}
        for output in item.outputs:
            signal = signal_named(output.table)
            for k in signal.wanted(output.k, msgspec.structs.asdict(job.sampling)).teacher.top:
                values |= self.top(models, rollouts, k)
            shard = Shard(rollouts, values, output.k, output.encoding, rules, flags, output.tail_mass)
            table = signal.table(shard) if rollouts.num_rows else signal.schema.arrow.empty_table()
            writer = store.shard_writer(output.target.stage, output.target.key)
            writer.write_shard(output.table, item.shard, table, signal.schema)

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

    def handle(self, job, link):
        store, outputs = Store(job.store), job.outputs
        rollouts = store.read_table(store.require(job.rollouts.stage, job.rollouts.key), "rollouts")
        signals = {
            name: pa.concat_tables([store.read_table(store.require(at.stage, at.key), name) for at in places])
            for name, places in sorted(job.signals.items())
        }
        ids = rollouts["sample_id"].to_pylist()
        assert all(sorted(table["sample_id"].to_pylist()) == sorted(ids) for table in signals.values())
        teachers = None
        if job.prompts is not None:
            of = teacher_of_prompts(store, store.require(job.prompts.stage, job.prompts.key))
            teachers = {name: of[prompt] for name, prompt in zip(ids, rollouts["prompt_id"].to_pylist(), strict=True)}
        used = json.loads((Path(job.state) / "used.json").read_text()) if job.state else []
        chain = digest(weights_digest(job.model), used, [table_digest(t) for t in (rollouts, *signals.values())])
        config, rows = json.loads(bytes(job.config)), []
        total = len(ids) * config["epochs_per_round"]
        steps = plan_steps(job.seed, job.round, len(ids), config["samples_per_step"], total)
        kept = Checkpoints(store.root, Path(job.checkpoints.folder), json.loads(bytes(job.checkpoints.numerics)))
        found, problems = kept.newest()
        for problem in problems:
            link.progress(0, len(steps), note=problem)
        if found is not None:
            saved = json.loads(found.files[0].read_text())
            used, chain, rows = saved["used"], saved["chain"], saved["rows"]
        for number, step in enumerate(steps[len(rows) :], len(rows) + 1):
            if rows:
                folder, text = kept.begin(), json.dumps({"used": used, "chain": chain, "rows": rows})
                record = write_file(folder / "state.json", lambda path, text=text: path.write_text(text))
                kept.commit(folder, len(rows), [record], {})
            batch = [ids[row] for row in step.rows]
            used.append([job.round, batch])
            chain = digest(chain, batch)
            rows.append(
                {"step": len(used), "round": job.round, "epoch": step.epoch, "loss": int(chain[:8], 16) / 2**32}
                | {"grad_norm": 1.0, "lr": 1e-3, "samples": len(batch), "tokens": len(batch), "seconds": 0.0}
            )
            failpoint("train.after_step")
            link.progress(number, len(steps))
        if outputs.trainer_state:
            Path(outputs.trainer_state, "used.json").write_text(json.dumps(used))
        for folder, what in (
            (outputs.student, (chain,)),
            (outputs.teacher_ema, (chain, str(job.average))),
        ):
            if folder:
                for name in ("config.json", "tokenizer.json"):
                    shutil.copyfile(Path(job.model, name), Path(folder, name))
                save_file({"weight": draw(*what).random(VALUES, np.float32)}, Path(folder, "model.safetensors"))
        if outputs.steps:
            writer = store.shard_writer(outputs.steps.stage, outputs.steps.key)
            writer.write_shard("training_steps", 0, pa.Table.from_pylist(rows, schema=schema_for("training_steps")))
            if teachers is not None:
                steps = zip(rows, used[-len(rows) :], strict=True)
                by_teacher = [
                    {
                        "step": row["step"],
                        "round": row["round"],
                        "teacher": name,
                        "samples": n,
                        "tokens": n,
                        "loss": row["loss"],
                    }
                    for row, (_, batch) in steps
                    for name, n in sorted(Counter(teachers[sample] for sample in batch).items())
                ]
                table = pa.Table.from_pylist(by_teacher, schema=schema_for("teacher_steps"))
                writer.write_shard("teacher_steps", 0, table)
        metrics = {"loss": rows[-1]["loss"]}
        return TrainResult(len(rows), rows[-1]["step"], metrics)
