"""The rollout stage on a small store, its sampler a plugin (`tests/plugins/scripted_sampler.py`) or the real one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from storage.artifacts.artifact import Artifact, ArtifactSpec
from storage.schemas import schema_for
from storage.store import Store
from tasks.rollout import RolloutConfig, plan_samples, prompts_for_round, rollout_work
from tasks.stage import Context
from tasks.workers.pool import WorkerPool

CONFIG = RolloutConfig(num_generations=2, prompts_per_round=5, shard_prompts=2, max_completion_length=4, top_p=0.9)
SEED, ROUND = 5, 2


class Stage:
    """A store with a student and seven prompts, and rollouts of them: three shards of four, four and two samples."""

    def __init__(
        self,
        root: Path,
        checkpoint: Path | None = None,
        config: RolloutConfig = CONFIG,
        teacher: Path | None = None,
        masked: Sequence[int] = (),
    ) -> None:
        """`masked`: ids that are another token to the teacher."""
        self.store = Store(root / "store")
        with self.store.building(ArtifactSpec.of("model", 1, {}, {})) as builder:
            folder = builder.directory("model")
            if checkpoint is None:
                (folder / "config.json").write_text("{}")
                (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
                (folder / "tokenizer.json").write_text("{}")
            else:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
            self.student = builder.commit()
        self.teacher = self.student
        if teacher is not None:
            with self.store.building(ArtifactSpec.of("model", 1, {"teacher": True}, {})) as builder:
                shutil.copytree(teacher, builder.directory("model"), dirs_exist_ok=True)
                self.teacher = builder.commit()
        rows = [
            {"prompt_id": f"p{i}", "split": "eval" if i == 7 else "train", "text": "x", "token_ids": [i, i + 1]}
            for i in range(8)
        ]
        table = pa.Table.from_pylist(rows, schema=schema_for("prompts"))
        with self.store.building(ArtifactSpec.of("prepare", 1, {}, {})) as builder:
            builder.write_shard("prompts", 0, table)
            content, meta = {"prompts:train": "p", "prompts:eval": "e"}, {}
            if masked:
                names = [
                    {"tokenizer": who, "id": index, "token": f"{who} {index}", "text": None, "special": False}
                    for who in ("student", "teacher")
                    for index in masked
                ]
                builder.write_shard("vocabulary", 0, pa.Table.from_pylist(names, schema=schema_for("vocabulary")))
                content["audit"], meta["audit"] = f"masks {list(masked)}", {"masked_ids": list(masked)}
            self.prompts = builder.commit(content=content, meta=meta)
        self.work = rollout_work(config, self.student, self.prompts, seed=SEED, round=ROUND, teacher=self.teacher)
        self.spec = self.work.outputs["rollout"]
        chosen = prompts_for_round([f"p{i}" for i in range(7)], SEED, ROUND, config.prompts_per_round)
        self.shards = plan_samples(chosen, config, SEED, ROUND)
        self.progress: list[tuple[int, int, str]] = []
        self.said: list[str] = []

    def context(self, pool: WorkerPool) -> Context:
        return Context(self.store, pool.runtime, pool, lambda *p: self.progress.append(p), self.said.append)

    def build(self, pool: WorkerPool) -> Artifact:
        self.progress.clear()
        with self.store.building(self.spec) as builder:
            self.work.build({"rollout": builder}, self.context(pool))
            assert builder.committed is not None
            return builder.committed

    def build_all(self, pool: WorkerPool, recorded: Mapping[str, Artifact] | None = None) -> dict[str, Artifact]:
        """All outputs, as an executor builds them: those that are missing. `recorded`: artifacts of another store that are
        repeated in their batches."""
        context = self.context(pool)
        if recorded is not None:
            provenance = {(artifact.stage, artifact.key): artifact.provenance for artifact in recorded.values()}
            context = replace(context, recorded=provenance)
        with ExitStack() as stack:
            builders = {
                name: stack.enter_context(self.store.building(spec)) for name, spec in self.work.outputs.items()
            }
            missing = {name: builder for name, builder in builders.items() if builder.committed is None}
            if missing:
                self.work.build(missing, context)
            return {name: builder.committed for name, builder in builders.items() if builder.committed is not None}

    def noted(self, name: str) -> list[int]:
        """The numbers that the scripted sampler has noted in a file since the last call."""
        path = self.store.root / name
        numbers = [int(word) for word in path.read_text().split()] if path.exists() else []
        path.unlink(missing_ok=True)
        return numbers

    def done(self) -> list[int]:
        """The shards that were begun."""
        return self.noted("shards-done")
