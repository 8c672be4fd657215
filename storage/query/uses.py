"""Which run uses which artifact, and the datasets that queries read.

Every table becomes one lazy Arrow dataset over the shards of all artifacts that a run used (or that none did). Each
shard carries its use (run, round, stage, artifact) as a partition: a filter on these prunes files before anything is
read. A shard that several runs or rounds used occurs once for each.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset as pads

from storage.artifacts.artifact import Artifact
from storage.artifacts.packed import packed_schema
from storage.runs import RunState
from storage.schemas import TableSchema

_TABLES_OF = {
    "prepare": ("prompts", "vocabulary", "context_columns"),
    "draft": ("drafts",),
    "rollout": ("rollouts",),
    "judge": ("rewards",),
    "context": ("contexts",),
    "train": ("training_steps", "teacher_steps"),
    "warmup": ("training_steps",),
    "evaluate": ("evaluations",),
    "harness": ("harness_results", "harness_samples"),
}
"""By stage: the tables of artifacts that have another name than their table."""

USE = (
    pa.field("use_run", pa.string()),
    pa.field("use_round", pa.int32()),
    pa.field("use_stage", pa.string()),
    pa.field("use_artifact", pa.string()),
)


@dataclass(frozen=True)
class Use:
    """One run's use of one artifact. `run` is empty for an artifact that no run uses."""

    run: str
    round: int
    stage: str
    artifact: Artifact


def uses_of(states: Iterable[RunState], artifacts: Iterable[Artifact], with_unused: bool) -> list[Use]:
    """Who uses which committed artifact, each once per run and round; with `with_unused`, the others last."""
    by_key = {artifact.key: artifact for artifact in artifacts}
    found: dict[tuple[str, int, str], Use] = {}
    for state in states:
        for round in state.rounds:
            for label, stage in round.stages.items():
                for key in stage.artifacts.values():
                    if key in by_key:
                        use = Use(state.name, round.round, label, by_key[key])
                        found.setdefault((state.name, round.round, key), use)
    uses = list(found.values())
    if with_unused:
        used = {use.artifact.key for use in uses}
        uses += [Use("", 0, artifact.stage, artifact) for artifact in by_key.values() if artifact.key not in used]
    return uses


def missing_of(states: Iterable[RunState], artifacts: Iterable[Artifact], tables: set[str]) -> list[str]:
    """What finished stages made but the store no longer has whole, of the artifacts that hold any of `tables`."""
    there = {artifact.key for artifact in artifacts}
    return [
        f"{stage}/{key} (run {state.name}, round {round.round})"
        for state in states
        for round in state.rounds
        for record in round.stages.values()
        if record.state in ("done", "cached")
        for stage, key in record.artifacts.items()
        if key not in there and tables & set(_TABLES_OF.get(stage, (stage,)))
    ]


def used_dataset(schema: TableSchema, uses: Sequence[Use], dataset: Callable[[Artifact], pads.Dataset]) -> pads.Dataset:
    """The shards of all artifacts that hold a table, lazily; `dataset` gives those of one artifact."""
    table, fragments = schema.name, []
    opened: dict[str, list[pads.Fragment]] = {}
    for use in uses:
        if table not in use.artifact.rows:
            continue
        key = use.artifact.key
        if key not in opened:
            opened[key] = list(dataset(use.artifact).get_fragments()) if use.artifact.rows[table] else []
        partition = _partition(use)
        for shard in opened[key]:
            fragments.append(shard.format.make_fragment(shard.path, shard.filesystem, partition))
    columns = pa.schema([*USE, *columns_of_table(schema)])
    if not fragments:
        return pads.dataset(columns.empty_table())
    return pads.FileSystemDataset(fragments, columns, fragments[0].format, fragments[0].filesystem)


def columns_of_table(schema: TableSchema) -> list[pa.Field]:
    """A table's columns as files have them; where it may be packed, those of both layouts, of which a file has one."""
    layout = packed_schema(schema)
    if layout is None:
        return list(schema.arrow)
    names = dict.fromkeys((*schema.names, *layout.names))
    types = {column.name: column.type for column in (*schema.columns, *layout.columns)}
    return [pa.field(name, types[name]) for name in names]


def _partition(use: Use) -> pads.Expression:
    values = (use.run, use.round, use.stage, use.artifact.key) if use.run else (None, None, use.stage, use.artifact.key)
    terms = [
        pads.field(field.name).is_null() if value is None else pads.field(field.name) == pa.scalar(value, field.type)
        for field, value in zip(USE, values, strict=True)
    ]
    return functools.reduce(operator.and_, terms)
