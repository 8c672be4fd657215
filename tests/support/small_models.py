"""Small real checkpoints and a context to build stages in, without workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from storage.store import Artifact, Store
from tasks.inputs.models import ArchitectureModel, initialise
from tasks.stage import Context, Work
from tasks.workers.runtime import RuntimeConfig

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def checkpoint(folder: Path, seed: int = 0, **fields) -> Path:
    """A Qwen3-shaped checkpoint of a few thousand weights with the byte tokenizer."""
    folder.mkdir(parents=True)
    initialise(ArchitectureModel(config={**ARCHITECTURE, **fields}), seed, folder)
    return folder


@dataclass
class Bench:
    """A store, and what stages said while they were built in it."""

    store: Store
    said: list[str] = field(default_factory=list)
    progressed: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def context(self) -> Context:
        return Context(
            store=self.store,
            runtime=RuntimeConfig(device="cpu", threads=1),
            workers=None,
            progress=lambda done, total, unit: self.progressed.append((done, total, unit)),
            log=self.said.append,
        )

    def build(self, work: Work) -> Artifact:
        """The one artifact of a work, built unless the store has it."""
        ((name, spec),) = work.outputs.items()
        with self.store.building(spec) as builder:
            if builder.committed is None:
                work.build({name: builder}, self.context)
            return builder.committed
