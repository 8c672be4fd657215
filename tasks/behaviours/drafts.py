"""Completions that the student did not write: how a teacher writes them (stage `draft`), and draws that depend on nothing but a
sample's seed."""

from __future__ import annotations

from pydantic import Field

from storage.errors import InputError
from storage.identity import Identity, derive_seed
from tasks.behaviours import Behaviour, Completion, Start

SEEDS = 2**31 - 1
"""`derive_seed` gives integers from 0 up to here, this one left out."""


class Drafts(Identity):
    """How the teacher writes completions of the training prompts: once per prompt, reused in all rounds."""

    temperature: float = Field(1.0, ge=0.01, le=2, description="divides the teacher's logits")
    top_p: float = Field(1.0, gt=0, le=1, description="the teacher samples from the smallest set with this probability")
    per_prompt: int = Field(
        1,
        ge=1,
        description="drafts of each prompt; the sample with index i uses draft i modulo this number (with behaviour pairs: the"
        " pair with index i)",
    )


class ReadsDrafts(Behaviour):
    """A behaviour that may read drafts of the teacher."""

    drafts: Drafts = Field(Drafts(), description="how the teacher writes completions for this")

    def given(self, start: Start) -> Completion:
        """The completion that was written before, cut at the longest that is asked for. InputError without one."""
        draft = start.draft
        if draft is None or not draft.token_ids:
            raise InputError(
                f"rollout.behaviour: {self.kind}: there is no completion that was written before for this prompt"
            )
        ids, logprobs = draft.token_ids[: start.max_tokens], draft.logprobs[: start.max_tokens]
        whole = len(ids) == len(draft.token_ids)
        return Completion(ids, logprobs, draft.finish_reason if whole else "length", len(ids), label="teacher")


def uniform(seed: int, stream: str) -> float:
    """A number in [0, 1) from a sample's seed and the name of the draw: the same in every batch and replay."""
    return derive_seed(seed, stream) / SEEDS
