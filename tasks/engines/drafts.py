"""Completions that were written before, as the behaviours get them. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc

from storage.errors import InputError
from storage.store import Store
from tasks.behaviours import Behaviour, Draft
from tasks.workers.jobs import ArtifactRef, Request, SampleJob

Drafted = dict[str, list[Draft]]
"""By prompt_id its drafts, in the order of their index."""
_SHOWN = 3


def load_drafts(store: Store, job: SampleJob) -> Drafted:
    """The drafts that a job names. Empty where it names none."""
    return {} if job.drafts is None else read_drafts(store, job.drafts, job.split, job.foreign)


def read_drafts(store: Store, source: ArtifactRef, split: str, foreign: Sequence[int] = ()) -> Drafted:
    """Drafts of the table `drafts`, or the completions of prompts of a split. A draft ends before the first id of `foreign`, as
    if it had been cut; one that begins with such an id is empty."""
    artifact = store.require(source.stage, source.key)
    found: Drafted = {}
    lacking = frozenset(foreign)
    if source.stage == "draft":
        columns = ["prompt_id", "sample_index", "completion_token_ids", "sampling_logprobs", "finish_reason"]
        rows = store.read_table(artifact, "drafts", columns=columns).sort_by("sample_index").to_pylist()
        for row in rows:
            made = Draft(row["completion_token_ids"], row["sampling_logprobs"], row["finish_reason"])
            found.setdefault(row["prompt_id"], []).append(_known(made, lacking))
        return found
    columns = ["prompt_id", "split", "completion_token_ids"]
    table = store.read_table(artifact, "prompts", columns=columns)
    table = table.filter(pc.equal(table["split"], split))
    for name, ids in zip(table["prompt_id"].to_pylist(), table["completion_token_ids"].to_pylist(), strict=True):
        if ids:
            found[name] = [Draft(ids, [0.0] * len(ids), "stop")]
    return found


def require_drafts(drafts: Drafted, requests: Sequence[Request]) -> None:
    """InputError, naming prompts, where a sample has no draft."""
    lacking = sorted({request.prompt_id for request in requests if not drafts.get(request.prompt_id)})
    if lacking:
        raise InputError(
            f"rollout.behaviour: {len(lacking)} training prompts have no completion ({', '.join(lacking[:_SHOWN])}"
            f"{', ...' if len(lacking) > _SHOWN else ''}); give each row of prompts.train a `completion`"
            " (prompts.train.columns names the column), or use completions: teacher"
        )


def draft_of(drafts: Drafted, request: Request, behaviour: Behaviour) -> Draft | None:
    """The draft of a sample: those of its prompt in turn."""
    mine = drafts.get(request.prompt_id)
    return mine[behaviour.draft_index(request.sample_index) % len(mine)] if mine else None


def _known(draft: Draft, lacking: frozenset[int]) -> Draft:
    end = next((at for at, token in enumerate(draft.token_ids) if token in lacking), None)
    if end is None:
        return draft
    return Draft(draft.token_ids[:end], draft.logprobs[:end], "length")
