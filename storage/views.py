"""The views that queries see, made from the columns of `storage.schemas` and from what the runs' states say.

Every artifact that a statement needs becomes one lazy Arrow dataset, named `table@key`. A view is the union of these,
one branch per use (run, round, artifact), with the three as constants: a filter on run or round prunes whole branches
before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from storage.artifact import Artifact
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
    View("prompts", TABLES["prompts"].doc, (_ARTIFACT, *_columns("prompts")), ("prompts",)),
    View("vocabulary", TABLES["vocabulary"].doc, (_ARTIFACT, *_columns("vocabulary")), ("vocabulary",)),
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


def relation(table: str, artifact: Artifact) -> str:
    """Name of the dataset of one artifact's table."""
    return f"{table}@{artifact.key}"


def wanted_views(sql: str) -> set[str]:
    """Views whose names occur anywhere in a statement: at least those it reads."""
    text = sql.casefold()
    return {name for name in VIEWS if name in text}


def view_sql(name: str, uses: Sequence[Use] | None) -> str:
    """`CREATE VIEW` for one view over the datasets of `uses`; with None, the same columns and no rows."""
    view = VIEWS[name]
    branches = _branches(name, uses) if uses is not None else []
    if not branches:
        return f"CREATE VIEW {name} AS SELECT {_casts(view.columns, null=True)} WHERE false"
    union = " UNION ALL ".join(branches)
    if name == "tokens":
        union = _with_text(union, uses or ())
    return f"CREATE VIEW {name} AS SELECT {_casts(view.columns)} FROM ({union})"


def _branches(name: str, uses: Sequence[Use] | None) -> list[str]:
    uses = uses or ()
    if name in ("artifacts", "rounds"):
        return [f"SELECT * FROM {_identifier(name + '@')}"]
    if name == "supervision":
        return [_supervision(group) for group in _groups(uses)]
    if name == "tokens":
        return [_tokens(group) for group in _groups(uses)]
    holding = [use for use in uses if name in use.artifact.rows]
    if name in ("prompts", "vocabulary"):
        once = {use.artifact.key: use for use in holding}
        return [_rows(name, use, "") for use in once.values()]
    return [_rows(name, use, _where_used(use, name)) for use in holding]


def _rows(table: str, use: Use, constants: str) -> str:
    columns = [f"{_text(use.artifact.key)} AS artifact"]
    columns += [_identifier(c.name) for c in _columns(table, without=("round",))]
    return f"SELECT {constants}{', '.join(columns)} FROM {_identifier(relation(table, use.artifact))}"


def _where_used(use: Use, table: str) -> str:
    own = '"round"' if table == "training_steps" else "NULL"
    run, round = (_text(use.run), str(use.round)) if use.run else ("NULL", own)
    stage = f"{_text(use.stage)} AS stage, " if table == "training_steps" else ""
    return f'{run} AS run, {round} AS "round", {stage}'


@dataclass(frozen=True)
class _Group:
    """A run's rollouts of one round, with the signals that describe them and the vocabulary they are in."""

    run: str
    round: int
    rollouts: Artifact
    signals: dict[str, Artifact]


def _groups(uses: Sequence[Use]) -> list[_Group]:
    found = []
    for use in uses:
        if use.run and "rollouts" in use.artifact.rows:
            beside = [u.artifact for u in uses if (u.run, u.round) == (use.run, use.round)]
            signals = {name: a for name in SIGNALS for a in beside if name in a.rows}
            found.append(_Group(use.run, use.round, use.artifact, signals))
    return found


def _constants(group: _Group) -> str:
    return f'{_text(group.run)} AS run, {group.round} AS "round", {_text(group.rollouts.key)} AS artifact'


def _joins(group: _Group, signals: Sequence[str]) -> str:
    joined = "".join(
        f" LEFT JOIN {_identifier(relation(signal, group.signals[signal]))} AS {signal} USING (sample_id)"
        for signal in signals
        if signal in group.signals
    )
    return f"FROM {_identifier(relation('rollouts', group.rollouts))} AS rollouts{joined}"


def _supervision(group: _Group) -> str:
    columns = [_constants(group), "sample_id"]
    for signal in SIGNALS:
        for column in _columns(signal, without=("sample_id",)):
            held = f"{signal}.{column.name}" if signal in group.signals else "NULL"
            columns.append(f"{held} AS {_signal_name(signal, column.name)}")
    return f"SELECT {', '.join(columns)} {_joins(group, SIGNALS)}"


def _tokens(group: _Group) -> str:
    def unnested(signal: str, column: str, name: str) -> str:
        known = signal == "rollouts" or signal in group.signals
        return f"unnest({signal}.{column}) AS {name}" if known else f"NULL AS {name}"

    columns = [
        _constants(group),
        "sample_id",
        "generate_subscripts(rollouts.completion_token_ids, 1) - 1 AS position",
        unnested("rollouts", "completion_token_ids", "token_id"),
        unnested("rollouts", "sampling_logprobs", "sampling_logprob"),
        unnested("sampled", "student_logprobs", "student_logprob"),
        unnested("sampled", "teacher_logprobs", "teacher_logprob"),
        unnested("sampled", "student_entropy", "student_entropy"),
        unnested("sampled", "teacher_entropy", "teacher_entropy"),
        unnested("mask", "mask_reasons", "mask_reasons"),
    ]
    return f"SELECT {', '.join(columns)} {_joins(group, ('sampled', 'mask'))}"


def _with_text(exploded: str, uses: Sequence[Use]) -> str:
    """The exploded tokens with their texts, in the vocabulary of the run."""
    vocabularies = {use.run: use.artifact for use in uses if use.run and "vocabulary" in use.artifact.rows}
    if not vocabularies:
        return f"SELECT *, NULL AS token FROM ({exploded})"
    texts = " UNION ALL ".join(
        f"SELECT {_text(run)} AS run, id AS token_id, coalesce(text, token) AS token"
        f" FROM {_identifier(relation('vocabulary', artifact))} WHERE tokenizer = 'student'"
        for run, artifact in vocabularies.items()
    )
    return f"SELECT e.*, v.token FROM ({exploded}) AS e LEFT JOIN ({texts}) AS v USING (run, token_id)"


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


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
