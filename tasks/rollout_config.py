"""How the student is sampled. Supervision reads this config too: it scores under the same distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from storage.identity import Identity, omit_at
from tasks.behaviours import BehaviourField
from tasks.behaviours.student import StudentWrites


def _sorted_ids(value: str | tuple[int, ...]) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if not value or min(value) < 0:
        raise ValueError(f"{list(value)} must be a list of one or more token ids, or eos")
    return tuple(sorted(set(value)))


StopTokenIds = Annotated[Literal["eos"] | tuple[int, ...], AfterValidator(_sorted_ids)]
"""The ids that end a completion: explicit, or those of the student's tokenizer and generation config."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of the weights and arithmetic of an engine or a scorer."""

BYTES_OF: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


class RolloutConfig(Identity):
    """How the student is sampled. Log-probabilities are recorded under the distribution really sampled from."""

    temperature: float = Field(1.0, ge=0.01, le=2, description="divides the logits")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability; 1: all"
    )
    top_k: int = Field(0, ge=0, description="sample from this many likeliest tokens; 0: all")
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="sample from tokens at least this share as likely as the likeliest one; 0: all",
        json_schema_extra=omit_at(0.0),
    )
    num_generations: int = Field(1, ge=1, description="completions per prompt")
    max_completion_length: int = Field(256, ge=1, description="tokens of a completion; longer ones are cut (clipped)")
    stop_token_ids: StopTokenIds = Field(
        "eos", description="ids that end a completion; eos: those of the student's tokenizer and generation config"
    )
    prompts_per_round: int = Field(
        128, ge=1, description="prompts of a round, from a seeded permutation, epoch after epoch"
    )
    shard_prompts: int = Field(64, ge=1, description="prompts per shard: the unit of redo and of data parallelism")
    dtype: Dtype = Field("float32", description="the engine's weights and arithmetic")

    behaviour: BehaviourField = Field(
        StudentWrites(),
        description="who writes the tokens; a name or {kind: ..., its fields}",
        json_schema_extra=omit_at({"kind": "student"}),
    )

    @model_validator(mode="after")
    def _fits_behaviour(self) -> RolloutConfig:
        if problems := self.behaviour.problems(self):
            raise ValueError("; ".join(problems))
        return self

    def at(self, step: int) -> RolloutConfig:
        """This config for a round whose first optimizer step is `step` (from 0): with the behaviour that holds then."""
        return self.model_copy(update={"behaviour": self.behaviour.at(step)})

    def sampling(self) -> dict[str, Any]:
        """The fields of `tasks.workers.jobs.Sampling`, as JSON."""
        fields = {"temperature", "top_p", "top_k", "min_p", "max_completion_length", "stop_token_ids"}
        return self.model_dump(mode="json", include=fields)
