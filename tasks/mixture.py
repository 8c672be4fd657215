"""mixture: several teachers that answer as one, by a weighted average over the vocabulary. The artifact names its members; the
scorer computes the average (`tasks/engines/mixture.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from storage.identity import Identity, digest_of
from storage.store import Artifact, ArtifactSpec, Builder
from tasks.stage import Context, Work

VERSION = 1
STAGE = "mixture"
_ROUNDING = 1e-6


class MixtureConfig(Identity):
    """Teachers that teach every prompt together. q is the teacher's distribution, q_i that of teacher i, w_i its weight:
    `logprobs` gives log q = sum_i w_i log q_i - log Z (a geometric mean, normalised by Z); `probs` q = sum_i w_i q_i."""

    equation: ClassVar[str] = "log q = sum_i w_i log q_i - log Z (logprobs), or q = sum_i w_i q_i (probs)"
    paper: ClassVar[str] = ""

    weights: dict[str, float] = Field(description="by name of `teachers`; positive, with the sum 1")
    average: Literal["logprobs", "probs"] = Field(
        "probs", description="what is averaged: probabilities, or log-probabilities (then normalised)"
    )

    @field_validator("weights")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not weight > 0:
                raise ValueError(f"weights.{name}: {weight:g} is not above 0; leave the teacher out of `teachers`")
        if len(value) < 2:
            raise ValueError("weights: a mixture has at least two teachers; use `teacher` for one")
        if abs(sum(value.values()) - 1) > _ROUNDING:
            raise ValueError(f"weights: their sum is {sum(value.values()):g}, but must be 1")
        return value

    def problems(self, teachers: Mapping[str, Any]) -> list[str]:
        """What does not fit the named teachers."""
        unknown, without = sorted(set(self.weights) - set(teachers)), sorted(set(teachers) - set(self.weights))
        found = [f"mixture.weights.{name}: `teachers` has no {name!r}" for name in unknown]
        return found + [f"mixture.weights: teachers.{name} has no weight" for name in without]


def mixture_work(config: MixtureConfig, teachers: Mapping[str, Artifact]) -> Work:
    """Work with the output `mixture`: no data, only digests and, in the meta data, `average` and `members` (stage, key and weight
    of each). Its contents `weights` and `architecture` stand for those of all members and the average; what the teachers are
    called is not among them. The key also has the members' artifacts: equal weights of another run, in another folder, are
    another mixture of the same contents, because that run or folder may be removed."""
    members = sorted((teachers[name].content["weights"], weight, name) for name, weight in config.weights.items())
    content = {
        part: digest_of([config.average, [[teachers[name].content[part], weight] for _, weight, name in members]])
        for part in ("weights", "architecture")
    }
    first = teachers[members[0][2]]
    content |= {part: first.content[part] for part in ("tokenizer", "generation") if part in first.content}
    parts = [[teachers[name].stage, teachers[name].key, weight] for _, weight, name in members]
    spec = ArtifactSpec.of(STAGE, VERSION, {"average": config.average}, content | {"members": digest_of(parts)})

    def build(builders: dict[str, Builder], context: Context) -> None:
        builders[STAGE].commit(content=content, meta={"average": config.average, "members": parts})

    return Work(STAGE, {STAGE: spec}, build)
