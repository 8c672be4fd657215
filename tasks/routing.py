"""Several teachers, each with prompts of its own (`teachers:`, and `teacher_id` of a prompt): the names of the contents by which
their prompts enter keys, and which prompt is whose. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from storage.identity import digest_of
from storage.store import Artifact, Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a teacher may be called."""
ROUTED_COLUMNS = ("teacher_id", "teacher_token_ids")
"""Columns of `prompts` that say who teaches a prompt and what that teacher reads. With several teachers they are left out of the
content `prompts:SPLIT`, so that rollouts do not depend on them."""


def teacher_field(name: str | None) -> str:
    """The field of a teacher's section, by its name (None: the only one)."""
    return "teacher" if name is None else f"teachers.{name}"


def teacher_label(stage: str, name: str | None) -> str:
    """What a stage is called for a teacher: `warmup_teacher`, with several `warmup_teacher_NAME`."""
    return stage if name is None else f"{stage}_{name}"


def own_prompts(name: str, split: str) -> str:
    """Content of `prepare`: the prompts of one teacher, and what it reads of them. Its signals depend on it, and on no other
    teacher's."""
    return f"teacher:{name}:{split}"


def all_routes(split: str) -> str:
    """Content of `prepare`: who teaches each prompt of a split, and what that teacher reads."""
    return f"teachers:{split}"


def learned_by(name: str) -> str:
    """Content of `prepare`: the rows of the split `warmup` that a teacher's warm-up learns, those that name it or none."""
    return f"warmup:{name}"


def combined(digests: Sequence[str]) -> str:
    """One digest of several, whatever their order; of one it is the digest itself."""
    if len(digests) == 1:
        return digests[0]
    return digest_of(sorted(digests))


def teacher_of_prompts(store: Store, prompts: Artifact) -> dict[str, str | None]:
    """By prompt_id the name of its teacher; null where it names none."""
    table = store.read_table(prompts, "prompts", columns=["prompt_id", "teacher_id"])
    return dict(zip(table["prompt_id"].to_pylist(), table["teacher_id"].to_pylist(), strict=True))


def taught_by(names: Collection[str], prompts: pa.Table) -> pa.ChunkedArray:
    """bool, per row of `prompts`: whether its teacher has one of these names."""
    return pc.is_in(prompts["teacher_id"], value_set=pa.array(sorted(names), pa.string()))
