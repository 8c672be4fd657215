"""What a stage is: inputs with identities in, artifacts out.

Every `tasks/<stage>.py` offers a pure function that returns a `Work`; `flows/distill.py` decides the order and an
executor decides whether anything needs to be built at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NewType

from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.signals.signal import STOP_IDS
from tasks.workers.metrics import StageProgress
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig


@dataclass(frozen=True)
class Context:
    """What a stage may use while it builds."""

    store: Store
    runtime: RuntimeConfig
    workers: WorkerPool
    progress: StageProgress
    log: Callable[[str], None]
    plugins: tuple[str, ...] = ()
    tell: Callable[[str], None] = lambda text: None
    """Shows a line to the user."""
    recorded: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    """(stage, key) -> provenance of an artifact that a replay repeats in another store, in the recorded batches."""

    def say(self, stage: str, text: str) -> None:
        """Write a line to the log and show it to the user."""
        self.log(f"{stage}: {text}")
        self.tell(text)


@dataclass(frozen=True)
class Work:
    """One stage's work: which artifacts it makes and how.

    `build` gets a builder for every output that is missing, and must commit each of them."""

    stage: str
    outputs: dict[str, ArtifactSpec]
    build: Callable[[dict[str, Builder], Context], None]
    shared: dict[str, str] = field(default_factory=dict)
    """Outputs that another artifact can serve: output name -> key of the artifact (a larger top-K, say)."""
    notes: tuple[str, ...] = ()
    """What the user is told before it is made, and in a plan: why something is made again, say."""


Student = NewType("Student", Artifact)
"""The model that is trained, as it is now."""
Teacher = NewType("Teacher", Artifact)
Prompts = NewType("Prompts", Artifact)
"""The artifact of `prepare`."""
Drafts = NewType("Drafts", Artifact)
"""Completions of training prompts that the teacher wrote once."""
Rollouts = NewType("Rollouts", Artifact)
Judged = NewType("Judged", Artifact)
"""Rewards and feedback of a round's rollouts."""
Contexts = NewType("Contexts", Artifact)
"""What the teacher reads before each completion of a round's rollouts."""
TrainerState = NewType("TrainerState", Artifact)


MODEL_CONTENT = ("weights", "architecture", "tokenizer", "generation")
"""The content digests of a model that decide what it computes and writes."""


def model_inputs(artifact: Artifact, prefix: str = "") -> dict[str, str]:
    """The content digests by which a model enters a key."""
    return {f"{prefix}{part}": artifact.content[part] for part in MODEL_CONTENT if part in artifact.content}


def same_models(models: Mapping[Any, Artifact]) -> list[tuple[Any, ...]]:
    """The names of `models`, those of one checkpoint together: names are aliases where weights, architecture, tokenizer and
    generation config are equal. A model that is not made yet (in a plan) stands alone."""
    found: dict[Any, tuple[Any, ...]] = {}
    for name, model in models.items():
        made = isinstance(model, Artifact)
        content = tuple(sorted(model_inputs(model).items())) if made else name
        found[content] = (*found.get(content, ()), name)
    return list(found.values())


LOADING = "tokenizer_loading"
"""Field of identities and contents; it is there only where versions up to 0.1.0 read a tokenizer otherwise than its file says
(`tasks/inputs/shipped.py`), so that their results are not found again. Its one value is `file`."""


def merged_stop_ids(prompts: Artifact | None) -> list[int]:
    """The stop ids that are one category for student and teacher, first the student's own; empty where nothing is merged."""
    found = None if prompts is None else prompts.content.get(STOP_IDS)
    return [] if found is None else [int(index) for index in json.loads(found)]


def stop_inputs(prompts: Artifact | None) -> dict[str, str]:
    """The content by which merged stop ids enter the keys of stages whose results depend on them; empty without."""
    return {STOP_IDS: prompts.content[STOP_IDS]} if prompts is not None and STOP_IDS in prompts.content else {}


def masked_ids(prompts: Artifact | None) -> list[int]:
    """The ids that the tokenizers' audit marks as unmapped, and different ends of sequence that it masks; empty without."""
    audit = None if prompts is None else prompts.meta.get("audit")
    return [] if audit is None else [int(index) for index in audit["masked_ids"]]


def mask_inputs(prompts: Artifact | None) -> dict[str, str]:
    """The content by which masked ids enter the keys of stages whose results depend on them; empty without."""
    return {"audit": prompts.content["audit"]} if prompts is not None and masked_ids(prompts) else {}


def prompt_inputs(prompts: Artifact, split: str) -> dict[str, str]:
    """The content digests by which the prompts of a split enter the keys of stages that load the tokenizer too."""
    inputs = {"prompts": prompts.content[f"prompts:{split}"]}
    return inputs | {LOADING: prompts.content[LOADING]} if LOADING in prompts.content else inputs
