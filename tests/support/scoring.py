"""Parts for tests of scoring: models, a store with prompts and rollouts, and workers that serve in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from feed import InProcessPool
from small_models import Bench, checkpoint
from transformers import AutoModelForCausalLM

from storage.identity import derive_seed
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.engines.scorer import Scorer
from tasks.inputs.models import CheckpointModel, model_work
from tasks.inputs.prompts import PrepareConfig
from tasks.prepare import prepare_work
from tasks.stage import Context
from tasks.workers.jobs import ModelRef
from tasks.workers.runtime import RuntimeConfig

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.25}
VOCABULARY = 264
END = 257
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "top_k": 0}


def tokens(*name: object, length: int, below: int = 261) -> list[int]:
    """Token ids that depend on the name alone."""
    return [derive_seed("tokens", *map(str, name), place) % below for place in range(length)]


def model_folder(root: Path, name: str, seed: int, **fields: Any) -> Path:
    """A tiny Qwen3 whose distributions are far from uniform."""
    return checkpoint(root / name, seed, **{**SHAPE, **fields})


def described(path: Path) -> ModelRef:
    """A model as a scoring job names it."""
    return ModelRef(str(path), f"weights of {path.name}", f"architecture of {path.name}")


def plain_logits(path: Path, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """(T, V) in float64: everything at once, no padding, no chunks."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.inference_mode():
        return model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].clone()


def nucleus_logprobs(logits_TV: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """Token by token: divide, keep the k likeliest, keep the smallest set whose mass reaches top_p, normalise."""
    result = torch.full_like(logits_TV, -torch.inf)
    for row, logits_V in enumerate(logits_TV):
        order = (logits_V / temperature).argsort(descending=True).tolist()[: top_k or None]
        probs = torch.softmax(logits_V[order] / temperature, -1).tolist()
        kept, mass = [], 0.0
        for token, prob in zip(order, probs, strict=True):
            if top_p < 1 and mass >= top_p:  # a sum may round to 1 before its end
                break
            kept.append(token)
            mass += prob
        result[row, kept] = torch.log_softmax(logits_V[kept] / temperature, -1)
    return result


class InProcess(InProcessPool):
    """A scorer with `settings` in place of worker processes, and other handlers where they are given."""

    def __init__(self, settings: dict[str, Any] | None = None, **handlers: Any) -> None:
        super().__init__(scorer=Scorer({"threads": 1, **(settings or {})}), **handlers)


class ScoringBench(Bench):
    """A bench whose context has workers, and works with several outputs."""

    def __init__(self, store: Store, workers: InProcess) -> None:
        super().__init__(store)
        self.workers = workers
        self.max_invalid = 0.01

    @property
    def context(self) -> Context:
        return Context(
            store=self.store,
            runtime=RuntimeConfig(device="cpu", threads=1, scorer={"max_invalid": self.max_invalid}),
            workers=self.workers,  # type: ignore[arg-type]
            progress=lambda done, total, unit: self.progressed.append((done, total, unit)),
            log=self.said.append,
        )

    def make(self, work: Any) -> dict[str, Artifact]:
        """All outputs of a work, as the executor makes them: builders of the missing ones only."""
        from contextlib import ExitStack

        with ExitStack() as stack:
            builders, found = {}, {}
            for name, spec in sorted(work.outputs.items()):
                shared = self.store.get(spec.stage, work.shared[name]) if name in work.shared else None
                if (committed := shared or self.store.get(spec.stage, spec.key)) is not None:
                    found[name] = committed
                else:
                    builders[name] = stack.enter_context(self.store.building(spec))
            if builders:
                work.build(builders, self.context)
            return found | {name: builder.committed for name, builder in builders.items()}

    def model(self, path: Path) -> Artifact:
        return self.make(model_work(CheckpointModel(path=path), 0))["model"]

    def prompts(self, student: Artifact, teacher: Artifact, folder: Path, **config: Any) -> Artifact:
        """Train and eval prompts, with answers in eval; the second train prompt reads differently for the teacher."""
        folder.mkdir(parents=True, exist_ok=True)
        train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
        train.write_text('{"prompt": "ab", "id": "a"}\n{"prompt": "cd", "id": "b", "teacher_prompt": "see cd"}\n')
        held_out.write_text("".join(f'{{"prompt": "q{i}", "id": "e{i}", "answer": "x"}}\n' for i in range(5)))
        sources = {name: {"kind": "file", "path": str(path)} for name, path in (("train", train), ("eval", held_out))}
        return self.make(prepare_work(PrepareConfig(**sources, **config), student, teacher))["prepare"]

    def rollouts(self, student: Path, prompts: Artifact, shards: list[int], length: int = 5, **fields: Any) -> Artifact:
        """Completions for the train prompts in turn, `shards` many per shard, sampled from the student under SAMPLING:
        their sampling log-probabilities are exact."""
        table = self.store.read_table(prompts, "prompts").to_pylist()
        rows = {row["prompt_id"]: row["token_ids"] for row in table if row["split"] == "train"}
        spec = ArtifactSpec.of("rollout", 1, {"shards": shards, "length": length, "fields": str(fields)}, {})
        with self.store.building(spec) as builder:
            number = 0
            for shard, count in enumerate(shards):
                made = []
                for _ in range(count):
                    made.append(_rollout(student, number, sorted(rows.items())[number % 2], length) | fields)
                    number += 1
                builder.write_shard("rollouts", shard, pa.Table.from_pylist(made, schema_for("rollouts")))
            count = sum(len(row["completion_token_ids"]) for row in made)
            return builder.commit(meta={"metrics": {"tokens": count}}, tables={"rollouts": len(shards)})


def _rollout(student: Path, number: int, prompt: tuple[str, list[int]], length: int) -> dict[str, Any]:
    completion: list[int] = []
    generator = torch.Generator().manual_seed(number)
    for _ in range(length + number % 3):
        logprobs_TV = nucleus_logprobs(plain_logits(student, prompt[1], [*completion, 0]), **SAMPLING)
        completion.append(int(torch.multinomial(logprobs_TV[-1].exp(), 1, generator=generator)))
    logprobs_TV = nucleus_logprobs(plain_logits(student, prompt[1], completion), **SAMPLING)
    return {
        "sample_id": f"{prompt[0]}/1/{number}",
        "prompt_id": prompt[0],
        "sample_index": number,
        "prompt_token_ids": prompt[1],
        "completion_token_ids": completion,
        "sampling_logprobs": logprobs_TV.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist(),
        "behaviour": "student",
        "prefix_length": 0,
        "finish_reason": "stop",
        "seed": number,
        "completion_text": "",
        "reward": None,
    }
