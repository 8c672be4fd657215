"""Runs with several teachers and scripted engines, in this process: real models (tiny), prompts, stages and store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import in_process
import scripted_run

from flows.experiment import Experiment
from flows.run.progress import SilentReporter
from flows.run.runner import run_experiment
from storage.runs import Run, RunState
from storage.store import Artifact, Store

_TINY = {
    "model_type": "qwen3", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
NAME = "several"
SIGNALS = ("mask", "sampled", "teacher_topk")


def model(seed: int) -> dict[str, Any]:
    """A teacher's section; equal seeds give equal weights."""
    return {"source": {"kind": "architecture", "config": _TINY, "init_seed": seed}}


def rows_for(names: Mapping[str, int] | Sequence[str], prefix: str) -> list[dict[str, Any]]:
    """One prompt per name, in order."""
    return [
        {"id": f"{prefix}{i}", "prompt": f"{prefix}{i}=", "answer": "1", "teacher_id": n} for i, n in enumerate(names)
    ]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def experiment(
    folder: Path, train: Sequence[str], teachers: Mapping[str, int], rounds: int = 2, **more: Any
) -> Experiment:
    """Teachers by name and seed; `train`: the teacher of each prompt. Three held-out prompts name the first teacher, one the
    last."""
    names = sorted(teachers)
    eval_rows = rows_for([names[0]] * 3 + [names[-1]], "held")
    data = scripted_run.EXPERIMENT | {
        "teacher": None,
        "teachers": {name: model(seed) for name, seed in teachers.items()},
        "student": model(1),
        "prompts": {
            "train": {"kind": "file", "path": str(write(folder / "train.jsonl", rows_for(train, "p")))},
            "eval": {"kind": "file", "path": str(write(folder / "eval.jsonl", eval_rows))},
            "chat_template": False,
        },
        "rollout": {"prompts_per_round": 4, "num_generations": 2, "max_completion_length": 6, "shard_prompts": 1},
        "policy": {"rounds": rounds, "collect": False},
    }
    return Experiment.model_validate(data | more)


class Engines(in_process.InProcess):
    """The scripted engines, and every job that they did."""

    def of(self, kind: str) -> list[Any]:
        return [job for _, job, _ in self.jobs if type(job).__name__ == kind]


def go(root: Path, e: Experiment, engines: Engines | None = None, name: str = NAME, **more: Any) -> Engines:
    engines = engines or Engines()
    run_experiment(e, name=name, root=root, prefect=False, workers=engines, reporter=SilentReporter(), **more)  # type: ignore[arg-type]
    return engines


def state(root: Path, name: str = NAME) -> RunState:
    return Run.open(root, name).state


def made(root: Path, round: int, label: str, name: str = NAME) -> dict[str, Artifact]:
    """The artifacts of a stage of a round."""
    record = next(r for r in state(root, name).rounds if r.round == round).stages[label]
    return {stage: Store(root).require(stage, key) for stage, key in record.artifacts.items()}
