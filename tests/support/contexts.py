"""A round whose samples have contexts: prompts, completions and rewards that a test writes down, without any engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from small_models import Bench, checkpoint

from storage.artifacts.artifact import Artifact
from storage.schemas import schema_for
from storage.store import ArtifactSpec, Store
from tasks.context import context_work
from tasks.inputs.contexts import SiblingConfig, kept_columns
from tasks.inputs.models import CheckpointModel, model_work
from tasks.inputs.prompts import PrepareConfig
from tasks.prepare import prepare_work
from tasks.stage import Work

USER, END, ASSISTANT = 259, 257, 260
"""Special tokens of the byte tokenizer."""


@dataclass(frozen=True)
class Said:
    """One completion: the prompt it answers, its text, and what the judge says."""

    prompt: str
    text: str
    reward: float | None = 0.0
    feedback: str | None = None


def tokens(text: str) -> list[int]:
    return [*text.encode(), END]


def read_as(text: str) -> list[int]:
    """The tokens of a user's turn."""
    return [USER, *text.encode(), END, ASSISTANT]


@dataclass
class Room(Bench):
    """A store with a student, the prompts `rows` (each has at least id and prompt), and rounds that tests write down."""

    folder: Path = Path()
    rows: Sequence[dict[str, Any]] = ({"id": "a", "prompt": "1+1="}, {"id": "b", "prompt": "2+2="})
    prepare: dict[str, Any] = field(default_factory=dict)
    model: Artifact = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        source = self.folder / "train.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        path = self.folder / "model"
        if not path.exists():
            checkpoint(path)
        self.model = self.build(model_work(CheckpointModel(path=path), 0))
        self.config = PrepareConfig.model_validate({"train": {"kind": "file", "path": source}, **self.prepare})

    def prompts(self, templates: Sequence[str]) -> Artifact:
        return self.build(prepare_work(self.config, self.model, self.model, context_columns=kept_columns(templates)))

    def rollouts(self, shards: Sequence[Sequence[Said]], round: int = 1) -> Artifact:
        written = self.write(
            "rollout", "rollouts", [self._rows(shards, round, number) for number in range(len(shards))]
        )
        return written

    def _rows(self, shards: Sequence[Sequence[Said]], round: int, number: int) -> list[dict[str, Any]]:
        return [
            {
                "sample_id": name,
                "prompt_id": said.prompt,
                "sample_index": int(name.rpartition("/")[2]),
                "prompt_token_ids": read_as(next(row["prompt"] for row in self.rows if row["id"] == said.prompt)),
                "completion_token_ids": tokens(said.text),
                "sampling_logprobs": [-1.0] * len(tokens(said.text)),
                "behaviour": "student",
                "prefix_length": 0,
                "finish_reason": "stop",
                "seed": 0,
                "completion_text": said.text,
            }
            for name, said in zip(names(shards, round)[number], shards[number], strict=True)
        ]

    def rewards(self, shards: Sequence[Sequence[Said]], round: int = 1) -> Artifact:
        rows = [
            [
                {"sample_id": name, "reward": said.reward, "feedback": said.feedback}
                for name, said in zip(shard, shards[number], strict=True)
            ]
            for number, shard in enumerate(names(shards, round))
        ]
        return self.write("judge", "rewards", rows)

    def write(self, stage: str, table: str, shards: Sequence[Sequence[dict[str, Any]]]) -> Artifact:
        with self.store.building(ArtifactSpec.of(stage, 1, {"rows": json.dumps(shards)}, {})) as builder:
            for number in builder.missing(table, len(shards)) if builder.committed is None else ():
                builder.write_shard(table, number, pa.Table.from_pylist(shards[number], schema=schema_for(table)))
            return builder.committed or builder.commit(tables={table: len(shards)})

    def work(
        self,
        templates: Sequence[str],
        shards: Sequence[Sequence[Said]],
        sibling: dict[str, Any] | None = None,
        seed: int = 0,
        judged: bool = True,
        success_threshold: float | None = None,
    ) -> Work:
        return context_work(
            templates,
            SiblingConfig.model_validate(sibling or {}),
            self.config,
            rollouts=self.rollouts(shards),
            student=self.model,
            teacher=self.model,
            prompts=self.prompts(templates),
            judged=self.rewards(shards) if judged else None,
            seed=seed,
            success_threshold=success_threshold,
        )

    def contexts(self, *args: Any, **more: Any) -> list[dict[str, Any]]:
        """The rows of the table, in order."""
        return self.store.read_table(self.build(self.work(*args, **more)), "contexts").to_pylist()


def names(shards: Sequence[Sequence[Said]], round: int = 1) -> list[list[str]]:
    """The sample_ids of the completions: the index goes on where a prompt occurs again."""
    seen: dict[str, int] = {}
    found = []
    for shard in shards:
        found.append([])
        for said in shard:
            seen[said.prompt] = seen.get(said.prompt, -1) + 1
            found[-1].append(f"{said.prompt}/{round}/{seen[said.prompt]}")
    return found


def room(root: Path, **fields: Any) -> Room:
    return Room(Store(root / "store"), folder=root / "data", **fields)
