"""What a signal of supervision is, and the registry of signals."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from storage.artifacts.artifact import Retained, check_name
from storage.artifacts.shards import read_parquet
from storage.errors import ConfigError, InputError
from storage.identity import canonical_json
from storage.schemas import TABLES, TableSchema
from storage.store import Artifact, ArtifactSpec, ReadShard, Store
from tasks.losses.registry import require_methods
from tasks.plugins import used_plugins
from tasks.rollout_config import Dtype
from tasks.routing import combined, own_prompts
from tasks.signals.wanted import Ask, Values, Wanted

SPLIT = "train"
"""The split of the prompts that rollouts answer."""
STOP_IDS = "stop_ids"
"""Content of prepared prompts, there only where the stop ids of student and teacher are merged: a JSON list of the ids, first the
one that stands for all."""
_NOT_SIGNALS = {
    "model", "mixture", "prepare", "warmup", "draft", "rollout", "judge", "context", "train", "student", "trainer_state",
    "teacher_ema", "evaluate", "harness",
}  # fmt: skip
_PLAINLY_LOCAL = '{"kind":"local"}'
"""The backend that is left out of keys."""
_BYTES = {pa.int16(): 2, pa.int32(): 4, pa.float32(): 4, pa.int64(): 8, pa.float64(): 8}


class Settings(Protocol):
    """The part of the config of `supervise` that signals depend on."""

    @property
    def dtype(self) -> Dtype: ...
    @property
    def encoding(self) -> str: ...
    @property
    def tail_mass(self) -> float | None: ...
    @property
    def special_tokens(self) -> Any: ...
    @property
    def student(self) -> Literal["full", "none"]: ...
    @property
    def teacher(self) -> Any: ...


@dataclass(frozen=True)
class Inputs:
    """What the signals of one round are made from."""

    settings: Settings
    rollouts: Artifact
    student: Artifact
    teacher: Artifact
    prompts: Artifact
    sampling: dict[str, Any]
    """temperature, top_p, top_k of the rollouts, and min_p where it is not 0"""
    plugins: Mapping[str, str]
    """the run's plugins, name -> digest of the source"""
    names: tuple[str, ...] = ()
    """names of the teacher where there are several (more than one: of one checkpoint); it scores the samples of its prompts
    alone. Empty: the only teacher"""
    contexts: Artifact | None = None
    """what the teacher reads before each sample's completion, where that is not its prompt's"""

    def prompt_contents(self, parts: Sequence[str]) -> dict[str, str]:
        """The contents of the prompts by which they enter the keys. Of several teachers one's signals depend on its own prompts,
        and not on what the others are called or asked."""
        content = self.prompts.content
        if not self.names:
            return {"prompts": content[f"prompts:{SPLIT}"], **{part: content[part] for part in parts}}
        own = combined([content[own_prompts(name, SPLIT)] for name in self.names])
        named = {part: f"{part}:{self.names[0]}" for part in parts}
        return {"prompts": own, **{part: content.get(name) or content[part] for part, name in named.items()}}


@dataclass(frozen=True)
class Shard:
    """One shard of rollouts with the values that the models gave: what a signal's rows are made from."""

    rollouts: pa.Table
    values: Values
    k: int | None = None
    encoding: str = "exact"
    rules: Mapping[str, Any] = field(default_factory=dict)
    """of the mask, see `tasks.signals.mask`"""
    flags: pa.Table | None = None
    """rows of a committed `sampled`, which show invalid values where the models were not run"""
    tail_mass: float | None = None
    """the teacher's mass outside a list that ends it; None: lists of k"""


@dataclass(frozen=True)
class Written:
    """A signal's finished shards before they are committed, beside those of the rollouts."""

    files: list[Path]
    store: Store
    rollouts: Artifact

    def read(self, column: str) -> pa.ChunkedArray:
        """A column over all shards."""
        return pa.concat_tables([read_parquet(path, [column]) for path in self.files])[column]

    def beside_rollouts(self, column: str, of_rollouts: str) -> list[tuple[pa.ChunkedArray, pa.ChunkedArray]]:
        """Shard by shard a column of the signal and one of its rollouts, the same samples in the same order."""
        found = []
        for shard, path in enumerate(self.files):
            rows = read_parquet(path, ["sample_id", column])
            beside = self.store.read_shard(self.rollouts, "rollouts", shard)
            if rows.num_rows != beside.num_rows:  # those of one teacher of several
                beside = beside.filter(pc.is_in(beside["sample_id"], value_set=rows["sample_id"].combine_chunks()))
            found.append((rows[column], beside[of_rollouts]))
        return found


class Signal(ABC):
    """One signal: a table beside the rollouts, row for row and token for token, made by running student and teacher over them.

    A subclass gives its name and table, what it asks of the models, and how their answers become rows. Instances hold no
    state."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Enters the key: rises when the meaning of the signal changes."""
    schema: ClassVar[TableSchema]
    """Its table, of the same name. The first column is `sample_id`; all others are lists with one entry per token."""
    listed: ClassVar[bool] = False
    """Whether it is a list of k candidates per token, of which a smaller k is a slice."""
    prompt_parts: ClassVar[tuple[str, ...]] = ()
    """Named contents of the prepared prompts that it depends on, beside the prompts of the split."""
    without_student: ClassVar[bool] = False
    """Whether it is made where the student is not run (`supervise.student: none`), with null in place of what is asked of it."""
    without_teacher: ClassVar[bool] = False
    """The same of the teacher (`supervise.teacher: none`)."""
    retention: ClassVar[Retained] = "signals"
    floats: ClassVar[tuple[str, ...]] = ()
    """Columns of one number per token that objectives read: `TokenBatch` has them as fields where the table is not prefixed,
    else in `signals` under `<signal>_<column>`."""
    lists: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Where the table is a support: by model the columns of log-probabilities and of tails; lists are sorted by the first."""

    @abstractmethod
    def wanted(self, k: int | None, sampling: Mapping[str, Any]) -> Wanted:
        """What must be asked of the models. `sampling`: temperature, top_p, top_k of the rollouts."""

    def asked(
        self, k: int | None, sampling: Mapping[str, Any], student: Literal["full", "none"], teacher: bool = True
    ) -> Wanted:
        """`wanted`, without what is asked of a student or a teacher (false) that is not run."""
        wanted = self.wanted(k, sampling)
        if student == "none" and self.without_student:
            wanted = replace(wanted, student=Ask())
        return wanted if teacher or not self.without_teacher else replace(wanted, teacher=Ask())

    @abstractmethod
    def table(self, shard: Shard) -> pa.Table:
        """The rows of one shard, in the order of its rollouts. InputError by sample for values that do not fit these."""

    def identity(self, inputs: Inputs, k: int | None) -> dict[str, Any]:
        """What enters the key beside the models, the rollouts, the prompts, dtype and plugins."""
        return {"k": k, "encoding": inputs.settings.encoding} if self.listed else {}

    def meta(self, written: Written) -> dict[str, Any]:
        """What the artifact records of itself: counts, and `metrics` for the run's state. Of all shards."""
        return {}

    checked: ClassVar[tuple[str, ...]] = ()
    """Columns that `unusable` reads."""

    def unusable(self, rows: pa.Table) -> tuple[int, int]:
        """(tokens for which a model gave no usable value, tokens) of rows of its table (`checked`); tokens that the teacher's
        vocabulary lacks do not count. A signal that says nothing about it: (0, 0)."""
        return 0, 0

    def spec(self, inputs: Inputs, k: int | None) -> ArtifactSpec:
        """The artifact. Its key holds what the signal depends on and nothing else: the weights of a model only if it is asked
        anything, its architecture always, because candidates and distributions end with the smaller vocabulary.

        Raises ConfigError for a list without k, and for a k where there is no list."""
        if problem := self.problem(k):
            raise ConfigError(problem)
        settings = inputs.settings
        models = self.asked(k, inputs.sampling, settings.student, settings.teacher.asked).models
        contents = {"rollouts": inputs.rollouts.content["rollouts"]}
        contents |= inputs.prompt_contents(self.prompt_parts)
        if STOP_IDS in inputs.prompts.content:
            contents[STOP_IDS] = inputs.prompts.content[STOP_IDS]
        for who, model in (("student", inputs.student), ("teacher", inputs.teacher)):
            parts = ("weights", "architecture") if who in models else ("architecture",)
            contents |= {f"{who}:{part}": model.content[part] for part in parts}
        identity = {"dtype": inputs.settings.dtype, **self.identity(inputs, k)}
        if inputs.contexts is not None and "teacher" in models:
            contents["contexts"] = inputs.contexts.content["contexts"]
        backend = inputs.settings.teacher if "teacher" in models else None
        if backend is not None and canonical_json(backend) != _PLAINLY_LOCAL:
            identity["teacher"] = backend
        if used := used_plugins(inputs.plugins, "scorer", config=backend, classes=(type(self),)):
            identity["plugins"] = used
        tables = () if self.schema is TABLES.get(self.name) else (self.schema,)
        retention = self.retention if tables else None
        return ArtifactSpec.of(self.name, self.version, identity, contents, tables, retention)

    def problem(self, k: int | None) -> str | None:
        """What is wrong with asking for it with this k."""
        if (k is None) == self.listed:
            return f"objective: the signal {self.name!r} {'needs' if self.listed else 'takes no'} k"
        if k is not None and k > LARGEST_K:
            return (
                f"objective.support.k: {k} candidates per token, but a stored list has at most {LARGEST_K} (column valid of"
                f" {self.name!r} is int16); use kind: teacher_topk with a smaller k and outside: bucket"
            )
        return None

    def bytes_per_token(self, k: int | None) -> int:
        """Of its table, before compression."""
        return sum(
            _BYTES[inner.value_type] * (k or 1) if pa.types.is_list(inner) else _BYTES[inner]
            for inner in (column.type.value_type for column in self.schema.columns if column.name != "sample_id")
        )


LARGEST_K = 2**15 - 1
"""Entries of a stored list: `valid` counts them as int16."""
SIGNALS: dict[str, Signal] = {}


def require_usable(stage: str, signals: Mapping[str, Sequence[ReadShard]], limit: float) -> None:
    """`signals`: name -> a function per shard that reads the given columns. InputError if the share of tokens without a usable
    value of student, teacher or sampler is above `limit`: a broken model would train on nothing, or on what little is left."""
    for name, readers in sorted(signals.items()):
        kind = signal_named(name)
        if not kind.checked or not readers:
            continue
        counts = [kind.unusable(read(kind.checked)) for read in readers]
        lost, tokens = (sum(count) for count in zip(*counts, strict=True))
        if tokens and lost / tokens > limit:
            raise InputError(
                f"{stage}: {lost:,} of {tokens:,} tokens ({lost / tokens:.1%}) have no usable value in the signal {name!r}: a"
                " log-probability or entropy of the teacher, the student or the sampler is NaN, infinite or out of range."
                f" At most {limit:.1%} are accepted (runtime.scorer.max_invalid). Check the models, above all the teacher's"
                " weights, dtype (supervise.dtype) and device; if it must be so, raise the field"
            )


def register(cls: type[Signal]) -> type[Signal]:
    """Make a signal known under its name. ValueError when the name is taken or is no name, or its table does not fit it;
    TypeError for a class that lacks a method, `name` or `schema`."""
    require_methods(cls)
    if lacking := [field for field in ("name", "schema") if not hasattr(cls, field)]:
        raise TypeError(f"{cls.__name__}: it lacks {' and '.join(lacking)}")
    name, schema = cls.name, cls.schema
    check_name(name, "signal")
    if name in SIGNALS or name in _NOT_SIGNALS or (name in TABLES and schema is not TABLES[name]):
        raise ValueError(f"{cls.__name__}: the name {name!r} is taken; give the signal another one")
    if schema.name != name or schema.names[:1] != ("sample_id",):
        raise ValueError(f"{cls.__name__}: its table must be called {name!r} and begin with the column sample_id")
    if reserved := [column for column in schema.names if column.startswith("packed_")]:
        raise ValueError(
            f"{cls.__name__}: the column name {reserved[0]!r} is reserved: packed_ is the layout of packed lists"
        )
    if name not in TABLES and not schema.prefixed:
        raise ValueError(
            f"{cls.__name__}: set prefixed=True in its table, whose columns are joined to those of other signals"
        )
    if missing := sorted({*cls.floats, *(c for pair in cls.lists.values() for c in pair)} - set(schema.names)):
        raise ValueError(f"{cls.__name__}: no column {missing[0]!r} in its table; it has {', '.join(schema.names)}")
    SIGNALS[name] = cls()
    return cls


def signal_named(name: str) -> Signal:
    """ConfigError for a signal that is not registered, with the nearest name."""
    if name not in SIGNALS:
        near = difflib.get_close_matches(name, SIGNALS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"objective: no signal named {name!r}; there are {', '.join(SIGNALS)}{hint}")
    return SIGNALS[name]
