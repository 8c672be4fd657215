"""The views that queries see, made from the columns of `storage.schemas` and from what the runs' states say.

Every table becomes one lazy Arrow dataset over the shards of all artifacts that a run used (or that none did). Each
shard carries its use (run, round, stage, artifact) as a partition: a filter on these prunes files before anything is
read. A shard that several runs or rounds used is there once for each.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset as pads

from storage.artifacts.artifact import Artifact
from storage.runs import RunState
from storage.schemas import TABLES, Column

_STR, _INT, _LONG, _FLOAT, _DOUBLE = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64()

SIGNALS = ("sampled", "teacher_topk", "student_topk", "mask")
_PREFIXED = ("teacher_topk", "student_topk")
_TABLES_OF = {
    "prepare": ("prompts", "vocabulary"),
    "rollout": ("rollouts",),
    "train": ("training_steps",),
    "warmup": ("training_steps",),
    "evaluate": ("evaluations",),
}
"""Tables of the artifacts that are not named as their table."""

_ARTIFACT = Column("artifact", _STR, "key of the artifact that holds the row")
_RUN = Column("run", _STR, "run that used the artifact; null for none", nullable=True)
_ROUND = Column("round", _INT, "round of that run; null for none", nullable=True)
_STAGE = Column("stage", _STR, "the run's name of the stage (train, warmup, warmup_teacher)", nullable=True)
_STAGE_STATE = pa.struct(
    [("stage", _STR), ("key", _STR), ("state", _STR), ("seconds", _DOUBLE), ("rows", _LONG), ("error", _STR)]
)
_USE = (
    pa.field("use_run", _STR),
    pa.field("use_round", _INT),
    pa.field("use_stage", _STR),
    pa.field("use_artifact", _STR),
)
METRICS = (
    Column("accuracy_greedy", _DOUBLE, "share of held-out prompts answered correctly, greedy", nullable=True),
    Column("accuracy_sampled", _DOUBLE, "the same, sampled", nullable=True),
    Column("reverse_kl", _DOUBLE, "KL(student || teacher), token mean on fresh rollouts", nullable=True),
    Column("mean_length", _DOUBLE, "mean tokens of an evaluated completion", nullable=True),
    Column("clipped_ratio", _DOUBLE, "share of completions cut off at the length limit", nullable=True),
    Column("eval_tokens", _DOUBLE, "tokens of the evaluation", nullable=True),
    Column("rollout_tokens", _DOUBLE, "tokens sampled for training", nullable=True),
)


@dataclass(frozen=True)
class View:
    """A view's name, meaning and columns; `tables` are those it reads (none: it comes from manifests and states)."""

    name: str
    doc: str
    columns: tuple[Column, ...]
    tables: tuple[str, ...] = ()

    @property
    def arrow(self) -> pa.Schema:
        return pa.schema([(column.name, column.type) for column in self.columns])


@dataclass(frozen=True)
class Use:
    """One run's use of one artifact. `run` is empty for an artifact that no run uses."""

    run: str
    round: int
    stage: str
    artifact: Artifact


def _columns(table: str, without: Sequence[str] = ()) -> tuple[Column, ...]:
    return tuple(column for column in TABLES[table].columns if column.name not in without)


def _signal_columns() -> tuple[Column, ...]:
    """The signals' columns, all nullable; those of the top-K lists carry their signal's name."""
    return tuple(
        Column(_signal_name(signal, column.name), column.type, column.doc, nullable=True)
        for signal in SIGNALS
        for column in _columns(signal, without=("sample_id",))
    )


def _signal_name(signal: str, column: str) -> str:
    return f"{signal}_{column}" if signal in _PREFIXED else column


_ALL = (
    View("prompts", TABLES["prompts"].doc, (_RUN, _ARTIFACT, *_columns("prompts")), ("prompts",)),
    View("vocabulary", TABLES["vocabulary"].doc, (_RUN, _ARTIFACT, *_columns("vocabulary")), ("vocabulary",)),
    View("rollouts", TABLES["rollouts"].doc, (_RUN, _ROUND, _ARTIFACT, *_columns("rollouts")), ("rollouts",)),
    View(
        "supervision",
        "All signals of a run's rollouts, joined by sample_id; null where a signal was not asked for.",
        (
            _RUN,
            _ROUND,
            Column("artifact", _STR, "key of the rollouts that the signals describe"),
            TABLES["rollouts"].columns[0],
            *_signal_columns(),
        ),
        ("rollouts", *SIGNALS),
    ),
    View(
        "tokens",
        "One row per completion token of a run's rollouts.",
        (
            _RUN,
            _ROUND,
            Column("artifact", _STR, "key of the rollouts"),
            TABLES["rollouts"].columns[0],
            Column("position", _LONG, "index in the completion, from 0"),
            Column("token_id", _INT, "the student's token id"),
            Column("token", _STR, "its text, or its name where it is no text alone", nullable=True),
            Column("sampling_logprob", _FLOAT, "under the distribution sampled from", nullable=True),
            Column("student_logprob", _FLOAT, "of the rollout-time student", nullable=True),
            Column("teacher_logprob", _FLOAT, "of the teacher", nullable=True),
            Column("student_entropy", _FLOAT, "nats", nullable=True),
            Column("teacher_entropy", _FLOAT, "nats", nullable=True),
            Column("mask_reasons", _INT, TABLES["mask"].columns[1].doc.removeprefix("T "), nullable=True),
        ),
        ("rollouts", "sampled", "mask", "vocabulary"),
    ),
    View(
        "training_steps",
        TABLES["training_steps"].doc,
        (_RUN, _ROUND, _STAGE, _ARTIFACT, *_columns("training_steps", without=("round",))),
        ("training_steps",),
    ),
    View(
        "evaluations",
        TABLES["evaluations"].doc,
        (_RUN, _ROUND, _ARTIFACT, *_columns("evaluations")),
        ("evaluations",),
    ),
    View(
        "artifacts",
        "One row per committed artifact.",
        (
            Column("stage", _STR, "what made it"),
            _ARTIFACT,
            Column("created", _STR, "when it was committed"),
            Column("seconds", _DOUBLE, "wall time of making it"),
            Column("rows", _LONG, "rows of all its tables"),
            Column("content", _STR, "JSON: named digests of what it holds"),
            Column("inputs", _STR, "JSON: named digests of what went in"),
            Column("identity", _STR, "JSON: the configuration that decided it"),
            Column("meta", _STR, "JSON: counts and metrics"),
            Column("evicted", _STR, "when `opd gc` removed its data; null where it is there", nullable=True),
        ),
    ),
    View(
        "rounds",
        "One row per round of a run.",
        (
            Column("run", _STR, "the run"),
            Column("round", _INT, "0 is the student before distillation"),
            Column("artifact", _STR, "key of the evaluation", nullable=True),
            Column("student_sha256", _STR, "digest of the weights that the round ended with", nullable=True),
            *METRICS,
            Column("seconds", _DOUBLE, "wall time of its stages"),
            Column("metrics", pa.map_(_STR, _DOUBLE), "every metric by name"),
            Column("stages", pa.list_(_STAGE_STATE), "every stage's key, state, seconds, rows, error"),
        ),
    ),
)

VIEWS: dict[str, View] = {view.name: view for view in _ALL}


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


def used_dataset(table: str, uses: Sequence[Use], dataset: Callable[[Artifact], pads.Dataset]) -> pads.Dataset:
    """The shards of all artifacts that hold `table`, lazily; `dataset` gives those of one artifact."""
    fragments = []
    opened: dict[str, list[pads.Fragment]] = {}
    for use in uses:
        if table not in use.artifact.rows:
            continue
        key = use.artifact.key
        if key not in opened:
            opened[key] = list(dataset(use.artifact).get_fragments()) if use.artifact.rows[table] else []
        for shard in opened[key]:
            fragments.append(shard.format.make_fragment(shard.path, shard.filesystem, _partition(use)))
    schema = pa.schema([*_USE, *TABLES[table].arrow])
    if not fragments:
        return pads.dataset(schema.empty_table())
    return pads.FileSystemDataset(fragments, schema, fragments[0].format, fragments[0].filesystem)


def _partition(use: Use) -> pads.Expression:
    values = (use.run, use.round, use.stage, use.artifact.key) if use.run else (None, None, use.stage, use.artifact.key)
    terms = [
        pads.field(field.name).is_null() if value is None else pads.field(field.name) == pa.scalar(value, field.type)
        for field, value in zip(_USE, values, strict=True)
    ]
    return functools.reduce(operator.and_, terms)


def wanted_views(sql: str) -> set[str]:
    """Views whose names occur anywhere in a statement: at least those it reads."""
    text = sql.casefold()
    return {name for name in VIEWS if name in text}


def view_sql(name: str, rows_wanted: bool) -> str:
    """`CREATE VIEW` over the datasets registered as `<table>@`; or, needing none, the same columns without rows."""
    columns = VIEWS[name].columns
    if not rows_wanted:
        return f"CREATE VIEW {name} AS SELECT {_casts(columns, null=True)} WHERE false"
    if name in ("artifacts", "rounds"):
        rows = f"SELECT * FROM {_identifier(name + '@')}"
    elif name == "supervision":
        rows = _supervision()
    elif name == "tokens":
        rows = _tokens()
    else:
        rows = _rows(name)
    return f"CREATE VIEW {name} AS SELECT {_casts(columns)} FROM ({rows})"


def _rows(table: str) -> str:
    """A table's dataset under the views' names."""
    columns = [_identifier(name) for name in TABLES[table].names if name not in ("run", "round", "stage")]
    own_round = 'coalesce(use_round, "round")' if "round" in TABLES[table].names else "use_round"
    use = f'use_run AS run, {own_round} AS "round", use_stage AS stage, use_artifact AS artifact'
    return f"SELECT {use}, {', '.join(columns)} FROM {_identifier(table + '@')}"


def _with_signals(signals: Sequence[str]) -> str:
    """The runs' rollouts, each beside its signals of the same round; nulls where a signal is not there.

    Run and round are join keys, so that a filter on them reaches the signals' shards too."""
    joins = " ".join(f'LEFT JOIN ({_rows(s)}) AS {s} USING (run, "round", sample_id)' for s in signals)
    return f"FROM (SELECT * FROM ({_rows('rollouts')}) WHERE run IS NOT NULL) AS rollouts {joins}"


def _supervision() -> str:
    columns = ['run, "round", rollouts.artifact, sample_id']
    for signal in SIGNALS:
        held = _columns(signal, without=("sample_id",))
        columns += [f"{signal}.{column.name} AS {_signal_name(signal, column.name)}" for column in held]
    return f"SELECT {', '.join(columns)} {_with_signals(SIGNALS)}"


def _tokens() -> str:
    """Lists are exploded side by side; the texts come from the vocabulary that the run prepared."""
    lists = {
        "token_id": "rollouts.completion_token_ids",
        "sampling_logprob": "rollouts.sampling_logprobs",
        "student_logprob": "sampled.student_logprobs",
        "teacher_logprob": "sampled.teacher_logprobs",
        "student_entropy": "sampled.student_entropy",
        "teacher_entropy": "sampled.teacher_entropy",
        "mask_reasons": "mask.mask_reasons",
    }
    exploded = ", ".join(f"unnest({values}) AS {name}" for name, values in lists.items())
    position = "generate_subscripts(rollouts.completion_token_ids, 1) - 1 AS position"
    samples = _with_signals(("sampled", "mask"))
    return (
        f'SELECT e.*, v.token FROM (SELECT run, "round", rollouts.artifact, sample_id, {position}, {exploded}'
        f" {samples})"
        " AS e LEFT JOIN (SELECT run, id AS token_id, any_value(coalesce(text, token)) AS token"
        f" FROM ({_rows('vocabulary')}) WHERE tokenizer = 'student' GROUP BY ALL) AS v USING (run, token_id)"
    )


_DUCKDB_TYPES = {
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}


def duckdb_type(type: pa.DataType) -> str:
    """DuckDB's name of an Arrow type used in the schemas."""
    if pa.types.is_list(type):
        return f"{duckdb_type(type.value_type)}[]"
    if pa.types.is_map(type):
        return f"MAP({duckdb_type(type.key_type)}, {duckdb_type(type.item_type)})"
    if pa.types.is_struct(type):
        return "STRUCT(" + ", ".join(f"{_identifier(f.name)} {duckdb_type(f.type)}" for f in type) + ")"
    return _DUCKDB_TYPES[type]


def _casts(columns: Sequence[Column], null: bool = False) -> str:
    """The columns in order, each with its declared type; with `null`, nulls of that type."""
    names = [_identifier(column.name) for column in columns]
    types = [duckdb_type(column.type) for column in columns]
    return ", ".join(f"CAST({'NULL' if null else n} AS {t}) AS {n}" for n, t in zip(names, types, strict=True))


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
