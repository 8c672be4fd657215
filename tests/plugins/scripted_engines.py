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
from tasks.behaviours import Completion, Draw, Drawn, Start, behaviour_of
from tasks.engines.drafts import draft_of, load_drafts
from tasks.engines.writing import Writing, rollout_rows
from tasks.routing import teacher_of_prompts
from tasks.signals import Shard, signal_named
from tasks.trainer.batching import pairs_of, plan_steps
from tasks.workers.jobs import KLJob, SampleResult, ScoreResult, ShardDone, TrainResult, register_role

for role in ("sampler", "scorer", "trainer"):
    register_role(role, f"{__name__}:{role.capitalize()}")

# One rank needs no launcher, and DeepSpeed's takes seconds to import.
tasks.trainer.launch.launch_command = lambda *_: ([sys.executable, "-m", "tasks.workers.main", "trainer"], {})

VALUES = 2048
"""Weights of the student: 8 KiB, so that a block of 4 KiB is half of them."""
VOCABULARY = 264


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
    """Behaviours that draw from the student or read drafts are the real ones. A blend (one with a table of its own) is made up,
    for the real one needs both models' whole distributions."""

    def handle(self, job, link):
        assert weights_digest(job.model.path) == job.model.weights
        assert job.teacher is None or weights_digest(job.teacher.path) == job.teacher.weights
        store = Store(job.store)
        writer = store.shard_writer(job.target.stage, job.target.key)
        target = writer.intermediate() if job.intermediate else writer
        values = store.shard_writer(job.values.stage, job.values.key) if job.values is not None else None
        prompts = store.read_table(store.require(job.prompts.stage, job.prompts.key), "prompts")
        read = "teacher_token_ids" if job.reader == "teacher" else "token_ids"
        tokens = {
            row["prompt_id"]: row[read] or row["token_ids"] for row in prompts.to_pylist() if row["split"] == job.split
        }
        drafts, behaviour = load_drafts(store, job), behaviour_of(json.loads(bytes(job.behaviour)))
        log, done = BatchLog(writer.path, job.log_table), 0
        while (item := link.next()) is not None:
            log.add(item.shard, done)
            completions = []
            for request in item.requests:
                start = Start(
                    tuple(tokens[request.prompt_id]),
                    item.sampling.max_completion_length,
                    request.seed,
                    draft=draft_of(drafts, request, behaviour),
                    index=request.sample_index,
                )
                write = self.write if behaviour.table is None else self.blend
                completions.append(write(job, item.sampling, behaviour, start))
                link.progress(done := done + 1, 0)
            log.writing(item.shard)
            tables = item.tables or [job.table]
            if job.table in tables:
                texts = iter(f"#{request.seed % 1000}" for request in item.requests)
                rows = rollout_rows(
                    item.requests, tokens, completions, behaviour, lambda made, texts=texts: next(texts)
                )
                target.write_shard(job.table, item.shard, rows.select(schema_for(job.table).names))
            if values is not None and behaviour.table.name in tables:
                cells = [
                    {"sample_id": request.sample_id, **made.values}
                    for request, made in zip(item.requests, completions, strict=True)
                ]
                table = pa.Table.from_pylist(cells, schema=behaviour.table.arrow)
                values.write_shard(behaviour.table.name, item.shard, table, behaviour.table)
            link.done(ShardDone(item.shard, item.size))
        return SampleResult([257], {"weights": job.model.weights})

    def write(self, job, sampling, behaviour, start: Start) -> Completion:
        if behaviour.kind == "student":
            made = self.complete(job, sampling, list(start.prompt), start.seed)
            return Completion(made["token_ids"], made["logprobs"], made["finish_reason"])
        writing = Writing(behaviour, start, "a sample", VOCABULARY, len(start.prompt) + start.max_tokens)
        turn = writing.turn()
        while isinstance(turn, Draw):
            limited = msgspec.structs.replace(sampling, max_completion_length=turn.max_tokens)
            turn = writing.turn(Drawn(**self.complete(job, limited, list(turn.tokens), turn.seed)))
        assert isinstance(turn, Completion), turn
        return turn

    def blend(self, job, sampling, behaviour, start: Start) -> Completion:
        seed = int(digest(job.teacher.weights, behaviour.epsilon, start.seed)[:8], 16)
        made = Drawn(**self.complete(job, sampling, list(start.prompt), seed))
        count, numbers = len(made.token_ids), draw("blend", job.model.weights, seed)
        values = {
            "beta": numbers.random(count).tolist(),
            "kl": (numbers.random(count) * behaviour.epsilon).tolist(),
            "accepted_lengths": [count] * count,
            "drafted": count,
            "accepted": count,
            "draft_excess": 0.0,
            "compared": count,
        }
        return Completion(made.token_ids, made.logprobs, made.finish_reason, 0, values)

    def complete(self, job, sampling, prompt: list[int], seed: int) -> dict:
        numbers = draw(job.model.weights, prompt, seed, msgspec.structs.asdict(sampling))
        limit = sampling.max_completion_length
        length = int(numbers.integers(1, limit + 1))
        return {
            "token_ids": numbers.integers(0, 256, length).tolist(),
            "logprobs": (-numbers.random(length)).tolist(),
            "finish_reason": "length" if length == limit else "stop",
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
        if job.contexts is not None:
            contexts = store.read_shard(store.require(job.contexts.stage, job.contexts.key), "contexts", item.shard)
            assert contexts["sample_id"].equals(rollouts["sample_id"])
            models = models | {"contexts": table_digest(contexts)}
        flags, values = None, {}
        if job.flags is None:
            values = self.sampled(models, rollouts)
            if json.loads(bytes(job.backend))["kind"] == "none":
                values = {name: found for name, found in values.items() if not name.startswith("teacher")}
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
        first = [draw(models, "top", ids).integers(0, max(1, 256 - k), n) for ids, n in samples]
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
        rewards = []
        if job.judged is not None:
            rewards.append(store.read_table(store.require(job.judged.stage, job.judged.key), "rewards"))
            assert rewards[0]["sample_id"].to_pylist() == ids
        contexts = []
        if job.contexts is not None:
            contexts.append(store.read_table(store.require(job.contexts.stage, job.contexts.key), "contexts"))
            assert contexts[0]["sample_id"].to_pylist() == ids
        teachers = None
        if job.prompts is not None:
            of = teacher_of_prompts(store, store.require(job.prompts.stage, job.prompts.key))
            teachers = {name: of[prompt] for name, prompt in zip(ids, rollouts["prompt_id"].to_pylist(), strict=True)}
        used = json.loads((Path(job.state) / "used.json").read_text()) if job.state else []
        chain = digest(
            weights_digest(job.model),
            used,
            [table_digest(t) for t in (rollouts, *signals.values(), *rewards, *contexts)],
        )
        config, rows = json.loads(bytes(job.config)), []
        total = len(ids) * config["epochs_per_round"]
        pairs = pairs_of(rollouts) if json.loads(bytes(job.objective))["estimator"] == "pairs" else None
        steps = plan_steps(job.seed, job.round, len(ids), config["samples_per_step"], total, pairs)
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
        average = {"weight": draw(chain, str(job.average)).random(VALUES, np.float32)}
        if outputs.trainer_state and job.average is not None:
            save_file(average, Path(outputs.trainer_state, "ema.safetensors"))
        student = {"weight": draw(chain).random(VALUES, np.float32)}
        for folder, weights in ((outputs.student, student), (outputs.teacher_ema, average)):
            if folder:
                for file in Path(job.model).iterdir():
                    if file.suffix != ".safetensors":
                        shutil.copyfile(file, Path(folder, file.name))
                save_file(weights, Path(folder, "model.safetensors"))
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
