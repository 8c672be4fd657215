"""What the checks before a run read: models, prompts, and what they report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from flows.experiment import Experiment
from storage.errors import InputError
from storage.store import Artifact, Store
from tasks.engines.hf_folder import (
    attention,
    model_rows,
    read_config,
)
from tasks.engines.teacher import VllmTeacher
from tasks.inputs.models import CheckpointModel, HubModel, ServedModel
from tasks.routing import taught_by, teacher_field
from tasks.stage import merged_stop_ids
from tasks.trainer.config import WarmupConfig
from tasks.workers import jobs

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Finding:
    """Something that a check found. `refused`: the run would fail."""

    text: str
    refused: bool = False


@dataclass(frozen=True)
class Model:
    """The checkpoint folder of the student or of a teacher."""

    side: str
    """Its section of the config: student, teacher or teachers.NAME"""
    path: Path
    warmup: WarmupConfig | None = None
    teacher: str | None = None
    """Its name where prompts name their teachers."""
    pretrained: bool = False
    """Whether its weights come from a folder or the Hub."""

    @cached_property
    def config(self) -> PretrainedConfig:
        return read_config(self.path)

    @cached_property
    def rows(self) -> int:
        return model_rows(self.path)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model's modules without weights. InputError where transformers cannot build them."""
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self.config, attn_implementation=attention(self.config), trust_remote_code=False
                )
        except Exception as error:  # whatever the architecture's own code raises for these fields
            raise InputError(
                f"{self.path}: config.json describes no model ({type(error).__name__}: {error})"
            ) from error
        return model

    @cached_property
    def linear_layers(self) -> set[str]:
        """Last parts of the names of the layers that can have an adapter, the output head not among them."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        head = self.skeleton.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel
        layers = ((n, m) for n, m in self.skeleton.named_modules() if isinstance(m, nn.Linear | Conv1D))
        return {name.rpartition(".")[2] for name, layer in layers if layer is not head}


@dataclass(frozen=True)
class Known:
    """The models, before any warm-up, and the prepared prompts."""

    experiment: Experiment
    student: Model
    teachers: tuple[Model, ...]
    prompts: pa.Table
    """Columns prompt_id, split, teacher_id, token_ids, teacher_token_ids, completion_token_ids, answer."""
    merged: tuple[int, ...] = ()
    """The stop ids that are one category for both models."""

    @property
    def models(self) -> tuple[Model, ...]:
        """The models that transformers loads: teachers with the local backend, and for the exact KL of evaluations."""
        e = self.experiment
        here = not any(isinstance(model.source, ServedModel) for model in e.taught_by.values())
        for_kl = here and e.evaluate.generations("kl") > 0
        return (self.student, *(self.teachers if e.supervise.teacher.loads_here or for_kl else ()))

    @property
    def in_vllm(self) -> tuple[Model, ...]:
        """The models that vLLM loads."""
        teacher = self.experiment.supervise.teacher
        return (self.student, *(self.teachers if isinstance(teacher, VllmTeacher) else ()))

    def of_split(self, split: str) -> pa.Table:
        return self.prompts.filter(pc.equal(self.prompts["split"], split))

    def read_by(self, model: Model, split: str) -> pa.Table:
        """The prompts of a split that a model reads: of several teachers each its own, and for its warm-up those of none."""
        return read_by(model, self.of_split(split))

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        store: Store,
        student: Artifact,
        teachers: Mapping[str | None, Artifact],
        prompts: Artifact,
    ) -> Known:
        columns = [
            "prompt_id",
            "split",
            "teacher_id",
            "token_ids",
            "teacher_token_ids",
            "completion_token_ids",
            "answer",
        ]
        return cls(
            experiment,
            Model(
                "student",
                store.materialize(student),
                experiment.student.warmup,
                pretrained=isinstance(experiment.student.source, CheckpointModel | HubModel),
            ),
            tuple(
                Model(
                    teacher_field(name),
                    store.materialize(teacher),
                    experiment.taught_by[name].warmup,
                    name if experiment.routed else None,
                    isinstance(experiment.taught_by[name].source, CheckpointModel | HubModel),
                )
                for name, teacher in teachers.items()
            ),
            store.read_table(prompts, "prompts", columns=columns),
            tuple(merged_stop_ids(prompts)),
        )


def read_by(model: Model, rows: pa.Table) -> pa.Table:
    if model.teacher is None:
        return rows
    unnamed = pc.and_(pc.equal(rows["split"], "warmup"), pc.is_null(rows["teacher_id"]))
    return rows.filter(pc.or_(unnamed, taught_by([model.teacher], rows)))


def ours(role: str) -> bool:
    """Whether workers of this program serve the role, and no plugin's."""
    return jobs.ROLES[role].startswith("tasks.")


def token_ids(rows: pa.Table, side: str) -> pa.ChunkedArray:
    """What a side reads of the prompts."""
    return rows["token_ids"] if side == "student" else pc.coalesce(rows["teacher_token_ids"], rows["token_ids"])


def prompt_lengths(rows: pa.Table, side: str) -> pa.ChunkedArray:
    """Tokens of the prompts as a side reads them."""
    return list_lengths(token_ids(rows, side))


def list_lengths(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """0 for a list that is null."""
    return pc.fill_null(pc.list_value_length(lists), 0)


Found = Iterator[Finding]
