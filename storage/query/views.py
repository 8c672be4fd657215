"""The views that queries see, made from the columns of `storage.schemas`, from the tables that manifests declare, and from the
runs' states.

Every table becomes one lazy Arrow dataset over the shards of all artifacts that a run used (or that none did). Each
shard carries its use (run, round, stage, artifact) as a partition: a filter on these prunes files before anything is
read. A shard that several runs or rounds used occurs once for each.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from storage.artifacts.artifact import Artifact
from storage.artifacts.packed import FUNCTIONS, Part, packed_schema, parts
from storage.query.figures import FIGURES, MODES, Z95
from storage.runs import RunState
from storage.schemas import TABLES, Column, MaskReason, TableSchema

_STR, _INT, _LONG, _FLOAT, _DOUBLE = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64()

SIGNALS = ("sampled", "teacher_topk", "student_topk", "mask")
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

_ARTIFACT = Column("artifact", _STR, "key of the artifact that holds the row")
_RUN = Column("run", _STR, "run that used the artifact; null for none", nullable=True)
_ROUND = Column("round", _INT, "round of that run; null for none", nullable=True)
_STAGE = Column("stage", _STR, "the run's name of the stage (train, warmup, warmup_teacher)", nullable=True)
_ARTIFACT_OF_STAGE = Column("artifact", _STR, "key of its first artifact; null before it began", nullable=True)
_TEACHER = Column("teacher", _STR, "teacher_id of its prompt: its teacher where there are several", nullable=True)
_STAGE_STATE = pa.struct(
    [("stage", _STR), ("key", _STR), ("state", _STR), ("seconds", _DOUBLE), ("rows", _LONG), ("error", _STR)]
)
_USE = (
    pa.field("use_run", _STR),
    pa.field("use_round", _INT),
    pa.field("use_stage", _STR),
    pa.field("use_artifact", _STR),
)
_SAMPLE_ID = "^(.*)/[^/]*/([0-9]+)$"
"""prompt_id (which may have slashes), round, sample_index."""
_OF_SET = "evaluate_"
_LABELS_OF_SETS = {"evaluations": _OF_SET, "prompts": "prepare_", "vocabulary": "prepare_"}
"""By table: how the labels of stages begin that belong to a named evaluation set."""
CONTEXT = 40
"""Characters of `before` and `after`."""
_IN_WORDS = {reason: (reason.name or "").lower().replace("_", " ") for reason in MaskReason}
_MADE_FROM = {
    "gap": ("student_logprob", "sampling_logprob", "teacher_logprob"),
    "teacher_mass": ("teacher_tail", "student_list_tail"),
    "reasons": ("mask_reasons",),
    "before": ("text_offset",),
    "after": ("text_offset",),
}
"""Columns of `tokens` that are computed: what they need of what is exploded."""
_MEANINGS = {
    "accuracy_greedy": "share of held-out prompts answered correctly, greedy",
    "accuracy_sampled": "the same, sampled",
    "reverse_kl": "KL(student || teacher), token mean on fresh rollouts",
    "mean_length": "mean tokens of an evaluated completion",
    "clipped_ratio": "share of completions cut off at the length limit",
}
METRICS = (
    *(Column(name, _DOUBLE, meaning, nullable=True) for name, meaning in _MEANINGS.items()),
    *(
        Column(f"{name}_{of}", _DOUBLE, text.format(name), nullable=True)
        for name in FIGURES
        for of, text in (
            ("se", "standard error of {}, clustered by prompt"),
            ("n", "completions that {} was computed from"),
            ("prompts", "prompts that these answer"),
        )
    ),
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


def _columns(schema: TableSchema, without: Sequence[str] = ()) -> tuple[Column, ...]:
    return tuple(column for column in schema.columns if column.name not in without)


def _signal_columns(schema: TableSchema) -> dict[str, Column]:
    """By name in the table: a signal's columns in `supervision`, all nullable."""
    return {
        column.name: Column(
            f"{schema.name}_{column.name}" if schema.prefixed else column.name, column.type, column.doc, True
        )
        for column in _columns(schema, without=("sample_id",))
    }


_ALL = (
    View("prompts", TABLES["prompts"].doc, (_RUN, _ARTIFACT, *TABLES["prompts"].columns), ("prompts",)),
    View("vocabulary", TABLES["vocabulary"].doc, (_RUN, _ARTIFACT, *TABLES["vocabulary"].columns), ("vocabulary",)),
    View("drafts", TABLES["drafts"].doc, (_RUN, _ARTIFACT, *TABLES["drafts"].columns), ("drafts",)),
    View(  # its old column `reward` is always null, and would hide that of `rewards` in a join
        "rollouts",
        TABLES["rollouts"].doc,
        (_RUN, _ROUND, _ARTIFACT, *_columns(TABLES["rollouts"], without=("reward",))),
        ("rollouts",),
    ),
    View("contexts", TABLES["contexts"].doc, (_RUN, _ROUND, _ARTIFACT, *TABLES["contexts"].columns), ("contexts",)),
    View(
        "context_columns",
        TABLES["context_columns"].doc,
        (_RUN, _ARTIFACT, *TABLES["context_columns"].columns),
        ("context_columns",),
    ),
    View(
        "rewards",
        "One row per judged sample of a round's rollouts; a null reward counts for no group.",
        (
            _RUN,
            _ROUND,
            _ARTIFACT,
            TABLES["rewards"].columns[0],
            Column("prompt_id", _STR, "the prompt that the sample answers"),
            Column("sample_index", _INT, "0 .. num_generations-1"),
            *TABLES["rewards"].columns[1:],
        ),
        ("rewards",),
    ),
    View(
        "groups",
        "One row per prompt and round of a run: the rewards of its samples.",
        (
            _RUN,
            _ROUND,
            Column("artifact", _STR, "key of the rewards"),
            Column("prompt_id", _STR, "the prompt that the samples answer"),
            Column("n", _LONG, "samples with a reward"),
            Column("n_failed", _LONG, "samples whose judge failed; they are left out of all else"),
            Column("mean", _DOUBLE, "mean reward; null without any", nullable=True),
            Column("std", _DOUBLE, "standard deviation (n - 1 in the denominator); null below two", nullable=True),
            Column("low", _DOUBLE, "least reward", nullable=True),
            Column("high", _DOUBLE, "largest reward", nullable=True),
            Column("all_equal", pa.bool_(), "whether no two rewards differ: no advantage, no signal"),
        ),
        ("rewards",),
    ),
    View(
        "supervision",
        "All signals of a run's rollouts, joined by sample_id; null where a signal was not asked for.",
        (
            _RUN,
            _ROUND,
            Column("artifact", _STR, "key of the rollouts that the signals describe"),
            TABLES["rollouts"].columns[0],
            _TEACHER,
            *(column for signal in SIGNALS for column in _signal_columns(TABLES[signal]).values()),
        ),
        ("rollouts", "prompts", *SIGNALS),
    ),
    View(
        "tokens",
        "One row per completion token of a run's rollouts.",
        (
            _RUN,
            _ROUND,
            Column("artifact", _STR, "key of the rollouts"),
            TABLES["rollouts"].columns[0],
            Column("prompt_id", _STR, "the prompt that its sample answers"),
            _TEACHER,
            Column("position", _LONG, "index of the token in the completion, from 0; of its text see text_offset"),
            Column("token_id", _INT, "the student's token id"),
            Column(
                "token", _STR, "its text; where it is no text alone its bytes, <0xE4><0xB8>, or its name", nullable=True
            ),
            Column("before", _STR, f"the text before it, at most {CONTEXT} characters", nullable=True),
            Column("after", _STR, f"the text after it, at most {CONTEXT} characters", nullable=True),
            Column("sampling_logprob", _FLOAT, "under the distribution sampled from", nullable=True),
            Column("student_logprob", _FLOAT, "of the rollout-time student", nullable=True),
            Column("teacher_logprob", _FLOAT, "of the teacher", nullable=True),
            Column(
                "gap",
                _FLOAT,
                "student_logprob - teacher_logprob: the token's part in the reverse KL; sampling_logprob where the student did"
                " not score (supervise.student: none)",
                nullable=True,
            ),
            Column("student_entropy", _FLOAT, "nats", nullable=True),
            Column("teacher_entropy", _FLOAT, "nats", nullable=True),
            Column(
                "teacher_mass",
                _FLOAT,
                "the teacher's probability of the stored list: its own likeliest tokens, else the student's",
                nullable=True,
            ),
            Column("mask_reasons", _INT, TABLES["mask"].columns[1].doc.removeprefix("T "), nullable=True),
            Column(
                "reasons", _STR, f"the same in words: {', '.join(_IN_WORDS.values())}; empty for none", nullable=True
            ),
            Column(
                "text_offset",
                _LONG,
                "characters of completion_text before the token's text (substr counts from 1); null in completions whose text is"
                " not that of their tokens. Parts of one character have the place of the character",
                nullable=True,
            ),
            Column("text_length", _LONG, "characters of completion_text that it is, or is a part of", nullable=True),
        ),
        ("rollouts", "prompts", *SIGNALS, "vocabulary"),
    ),
    View(
        "training_steps",
        TABLES["training_steps"].doc,
        (_RUN, _ROUND, _STAGE, _ARTIFACT, *_columns(TABLES["training_steps"], without=("round",))),
        ("training_steps",),
    ),
    View(
        "evaluations",
        TABLES["evaluations"].doc,
        (_RUN, _ROUND, _ARTIFACT, _TEACHER, *TABLES["evaluations"].columns),
        ("evaluations", "prompts"),
    ),
    View(
        "set_evaluations",
        "One row per completion of a named evaluation set (evaluate.sets, `opd evaluate --prompts`).",
        (_RUN, _ROUND, Column("set_name", _STR, "its name"), _ARTIFACT, *TABLES["evaluations"].columns),
        ("evaluations",),
    ),
    *(
        View(name, TABLES[name].doc, (_RUN, _ROUND, _ARTIFACT, *TABLES[name].columns), (name,))
        for name in ("harness_results", "harness_samples")
    ),
    View(
        "teacher_steps",
        TABLES["teacher_steps"].doc,
        (_RUN, _ROUND, _STAGE, _ARTIFACT, *_columns(TABLES["teacher_steps"], without=("round",))),
        ("teacher_steps",),
    ),
    View(
        "artifacts",
        "One row per committed artifact.",
        (
            Column("stage", _STR, "what made it"),
            _ARTIFACT,
            Column("created", _STR, "when it was committed"),
            Column(
                "seconds", _DOUBLE, "wall time of the stage that made it; artifacts of one stage share it: sum `stages`"
            ),
            Column("rows", _LONG, "rows of all its tables"),
            Column("bytes", _LONG, "of its files in the store; 0 where its data was removed"),
            Column("content", _STR, "JSON: named digests of what it holds"),
            Column("inputs", _STR, "JSON: named digests of what went in"),
            Column("identity", _STR, "JSON: the configuration that decided it"),
            Column("meta", _STR, "JSON: counts and metrics"),
            Column("evicted", _STR, "when `opd gc` removed its data; null where it is there", nullable=True),
        ),
    ),
    View(
        "stages",
        "One row per stage of a run's round: the view for sums of time. A stage can make several artifacts.",
        (
            Column("run", _STR, "the run"),
            Column("round", _INT, "0 is the student before distillation"),
            Column("stage", _STR, "the run's name of the stage (train, warmup, warmup_teacher)"),
            _ARTIFACT_OF_STAGE,
            Column("state", _STR, "done, cached (found in the store), running, failed, pending"),
            Column("seconds", _DOUBLE, "wall time; 0 where cached, null before its end", nullable=True),
            Column("rows", _LONG, "rows of all its artifacts", nullable=True),
            Column("started", _STR, "when it began; null where cached", nullable=True),
            Column("error", _STR, "first line of its error", nullable=True),
            Column("artifacts", pa.map_(_STR, _STR), "what it made: artifacts.stage -> artifacts.artifact"),
        ),
    ),
    View(
        "differences",
        "One row per metric of two evaluations of a store: the paired difference on the prompts that both have.",
        (
            Column("run", _STR, "a run"),
            Column("round", _INT, "its round"),
            _ARTIFACT,
            Column("other_run", _STR, "the run that is subtracted; it can be the same"),
            Column("other_round", _INT, "its round"),
            Column("metric", _STR, ", ".join(FIGURES)),
            Column("difference", _DOUBLE, "metric of run and round minus that of the other"),
            Column("se", _DOUBLE, "its standard error, clustered by prompt; null for a single prompt", nullable=True),
            Column("low", _DOUBLE, "lower end of the 95% interval", nullable=True),
            Column("high", _DOUBLE, "upper end", nullable=True),
            Column("prompts", _LONG, "prompts that both have"),
            Column("told_apart", pa.bool_(), "whether the interval leaves 0 out"),
        ),
        ("evaluations",),
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


class Views:
    """The views of a store whose manifests declare `extra` tables beside this program's own.

    Each of them has a view of its own name. One with a `sample_id` is a signal: its columns are in `supervision` too, and those
    with one number per token (lists, not lists of lists) in `tokens`. A table that has the name of a view is left out."""

    def __init__(self, extra: Mapping[str, TableSchema] | None = None) -> None:
        self.extra = {name: schema for name, schema in sorted((extra or {}).items()) if name not in VIEWS}
        self.schemas = TABLES | self.extra
        self._signals = [name for name, schema in self.extra.items() if "sample_id" in schema.names]
        self.all = dict(VIEWS)
        for name, schema in self.extra.items():
            columns = (_RUN, _ROUND, _ARTIFACT, *_columns(schema, without=("run", "round", "artifact")))
            self.all[name] = View(name, f"{schema.doc} Version {schema.version}.", columns, (name,))
        for name in ("supervision", "tokens"):
            view = self.all[name]
            added = [c for signal in self._signals for c in self._added(name, signal).values()]
            self.all[name] = replace(
                view, columns=(*view.columns, *added), tables=tuple(dict.fromkeys((*view.tables, *self._signals)))
            )

    def _added(self, view: str, signal: str) -> dict[str, Column]:
        """By name in the signal's table: its columns in `supervision` or `tokens`."""
        columns = _signal_columns(self.extra[signal])
        if view == "supervision":
            return columns
        return {
            name: Column(column.name, column.type.value_type, column.doc.removeprefix("T "), True)
            for name, column in columns.items()
            if pa.types.is_list(column.type) and not pa.types.is_list(column.type.value_type)
        }

    def wanted(self, sql: str) -> set[str]:
        """Views whose names occur anywhere in a statement: at least those it reads."""
        text = sql.casefold()
        return {name for name in self.all if name in text}

    def sql(self, name: str, rows_wanted: bool, used: Collection[str] | None = None) -> str:
        """`CREATE VIEW` over the datasets registered as `<table>@`; or, needing none, the same columns without rows. `used`:
        the columns of `tokens` that a statement reads, by default all; the others are null, and nothing is read for them."""
        columns, view = self.all[name].columns, _identifier(name)
        if not rows_wanted:
            return f"CREATE VIEW {view} AS SELECT {_casts(columns, null=True)} WHERE false"
        if name in ("artifacts", "rounds", "stages"):
            rows = f"SELECT * FROM {_identifier(name + '@')}"
        elif name == "supervision":
            rows = self._supervision()
        elif name == "tokens":
            rows = self._tokens(set(used) if used is not None else {column.name for column in columns})
        elif name == "differences":
            rows = self._differences()
        elif name == "rewards":
            rows = self._rewards()
        elif name == "groups":
            rows = self._groups()
        elif name == "evaluations":
            rows = f"SELECT * FROM ({self._rows(name)}) {self._teachers()}"
        elif name == "set_evaluations":
            of_set = (
                f"SELECT *, substr(stage, {len(_OF_SET) + 1}) AS set_name FROM ({self._rows('evaluations', sets=True)})"
            )
            rows = f"{of_set} WHERE starts_with(stage, '{_OF_SET}')"
        else:
            rows = self._rows(name)
        return f"CREATE VIEW {view} AS SELECT {_casts(columns)} FROM ({rows})"

    def _rows(self, table: str, sets: bool = False) -> str:
        """A table's dataset under the views' names. Without `sets` what named evaluation sets have in it is left out."""
        names = self.schemas[table].names
        layout = packed_schema(self.schemas[table])
        made = parts(layout.names) if layout is not None else {}
        columns = [
            _unpacked(name, made[name]) if name in made else _identifier(name)
            for name in names
            if name not in ("run", "round", "stage", "artifact")
        ]
        own_round = 'coalesce(use_round, "round")' if "round" in names else "use_round"
        use = f'use_run AS run, {own_round} AS "round", use_stage AS stage, use_artifact AS artifact'
        rows = f"SELECT {use}, {', '.join(columns)} FROM {_identifier(table + '@')}"
        label = _LABELS_OF_SETS.get(table)
        return rows if label is None or sets else f"{rows} WHERE NOT coalesce(starts_with(use_stage, '{label}'), false)"

    def _rewards(self) -> str:
        """With the prompt and the index of each sample, which its id has: rewards stay where rollouts were removed."""
        return (
            f"SELECT *, regexp_extract(sample_id, '{_SAMPLE_ID}', 1) AS prompt_id,"
            f" regexp_extract(sample_id, '{_SAMPLE_ID}', 2) AS sample_index FROM ({self._rows('rewards')})"
        )

    def _groups(self) -> str:
        return (
            'SELECT run, "round", artifact, prompt_id, count(reward) AS n, count(*) - count(reward) AS n_failed,'
            " avg(reward) AS mean, stddev_samp(reward) AS std, min(reward) AS low, max(reward) AS high,"
            " coalesce(min(reward) = max(reward), true) AS all_equal"
            f" FROM ({self._rewards()}) GROUP BY ALL"
        )

    def _with_signals(self, signals: Sequence[str], taught: bool = True) -> str:
        """The runs' rollouts, each beside its signals of the same round; nulls where a signal is not there. `taught`: with the
        name of the teacher.

        Run and round are join keys, so that a filter on them reaches the signals' shards too."""
        joins = " ".join(
            f'LEFT JOIN ({self._rows(s)}) AS {_identifier(s)} USING (run, "round", sample_id)' for s in signals
        )
        rollouts = f"FROM (SELECT * FROM ({self._rows('rollouts')}) WHERE run IS NOT NULL) AS rollouts"
        return f"{rollouts} {self._teachers() if taught else ''} {joins}"

    def _teachers(self) -> str:
        """A join that adds the name of the teacher to what has a run and a prompt_id."""
        return (
            "LEFT JOIN (SELECT run, prompt_id, any_value(teacher_id) AS teacher"
            f" FROM ({self._rows('prompts')}) GROUP BY ALL) AS taught USING (run, prompt_id)"
        )

    def _supervision(self) -> str:
        columns, signals = ['run, "round", rollouts.artifact, sample_id, teacher'], (*SIGNALS, *self._signals)
        for signal in signals:
            for name, column in _signal_columns(self.schemas[signal]).items():
                columns.append(f"{_identifier(signal)}.{_identifier(name)} AS {_identifier(column.name)}")
        return f"SELECT {', '.join(columns)} {self._with_signals(signals)}"

    def tables(self, name: str, used: Collection[str] | None = None) -> set[str]:
        """The tables that a view reads; of `tokens` those behind the `used` columns, by default all."""
        if name != "tokens" or used is None:
            return set(self.all[name].tables)
        needed, lists = _needed(used), self._token_lists()
        found = {"rollouts", *(lists[column][0] for column in needed & lists.keys())}
        return (
            found | ({"prompts"} if "teacher" in needed else set()) | ({"vocabulary"} if "token" in needed else set())
        )

    def _token_lists(self) -> dict[str, tuple[str, str]]:
        """What `tokens` is exploded from, beside the ids: by column, the table and its column of lists."""
        lists = {
            "sampling_logprob": ("rollouts", "sampling_logprobs"),
            "student_logprob": ("sampled", "student_logprobs"),
            "teacher_logprob": ("sampled", "teacher_logprobs"),
            "student_entropy": ("sampled", "student_entropy"),
            "teacher_entropy": ("sampled", "teacher_entropy"),
            "teacher_tail": ("teacher_topk", "tail_logmass"),
            "student_list_tail": ("student_topk", "teacher_tail_logmass"),
            "mask_reasons": ("mask", "mask_reasons"),
        }
        for signal in self._signals:
            lists |= {column.name: (signal, name) for name, column in self._added("tokens", signal).items()}
        return lists

    def _tokens(self, used: set[str]) -> str:
        """Lists are exploded side by side; the texts come from the vocabulary that the run prepared."""
        lists = self._token_lists()
        mass = "1 - exp(CASE WHEN NOT isnan({0}) THEN {0} END)"
        words = ", ".join(
            f"CASE WHEN mask_reasons & {int(bit)} > 0 THEN '{text}' END" for bit, text in _IN_WORDS.items()
        )
        made = {
            "gap": "coalesce(student_logprob, sampling_logprob) - teacher_logprob",
            "teacher_mass": f"coalesce({mass.format('teacher_tail')}, {mass.format('student_list_tail')})",
            "reasons": f"CASE WHEN mask_reasons IS NOT NULL THEN concat_ws(', ', {words}) END",
            "before": f"right(left(completion_text, text_offset), {CONTEXT})",
            "after": f"substr(completion_text, text_offset + text_length + 1, {CONTEXT})",
        }
        needed = _needed(used)
        exploded = {
            name: f"{_identifier(lists[name][0])}.{_identifier(lists[name][1])}" for name in lists if name in needed
        }
        exploded["token_id"] = "rollouts.completion_token_ids"
        of_sample = {"run": "run", "round": '"round"', "artifact": "rollouts.artifact", "sample_id": "sample_id"}
        of_sample["prompt_id"] = "prompt_id"
        if "teacher" in used:
            of_sample["teacher"] = "teacher"
        if needed & {"text_offset", "text_length"}:
            of_sample["completion_text"] = "completion_text"
            found = "places(run, completion_token_ids, completion_text)"
            exploded |= {"text_offset": f"{found}.start", "text_length": f"{found}.length"}
        signals = [
            s for s in (*SIGNALS, *self._signals) if any(lists[name][0] == s for name in exploded.keys() & lists)
        ]
        rows = ", ".join(
            [
                *of_sample.values(),
                "generate_subscripts(rollouts.completion_token_ids, 1) - 1 AS position",
                *(f"unnest({values}) AS {_identifier(name)}" for name, values in exploded.items()),
            ]
        )
        there = {*of_sample, *exploded, "position"}
        columns = []
        for column in self.all["tokens"].columns:
            name = _identifier(column.name)
            if column.name in used & made.keys():
                columns.append(f"{made[column.name]} AS {name}")
            elif column.name == "token" and "token" in used:
                columns.append("token")
            else:
                columns.append(name if column.name in there else f"NULL AS {name}")
        of_id = (
            "LEFT JOIN (SELECT run, id AS token_id,"
            " any_value(CASE WHEN text IS NULL THEN part_name(token) ELSE text END) AS token"
            f" FROM ({self._rows('vocabulary')}) WHERE tokenizer = 'student' GROUP BY ALL) USING (run, token_id)"
        )
        return (
            f"SELECT {', '.join(columns)} FROM (SELECT {rows} {self._with_signals(signals, taught='teacher' in used)})"
            f" {of_id if 'token' in used else ''}"
        )

    def _differences(self) -> str:
        """The formulas of `storage.query.figures`. Filters on run and round reach the evaluations' shards."""
        shape = {mode: f"bool_or(mode = '{mode}') OVER (PARTITION BY run, \"round\")" for mode in MODES[:2]}
        rows = (
            'SELECT run, "round", artifact, prompt_id, mode, tokens, correct, reverse_kl_sum, finish_reason,'
            f" CASE WHEN {shape['kl']} THEN 'kl' WHEN {shape['sampled']} THEN 'sampled' ELSE 'greedy' END AS shape"
            f" FROM ({self._rows('evaluations')}) WHERE run IS NOT NULL"
        )
        parts = [
            ("accuracy_greedy", "correct::INTEGER", "1", "mode = 'greedy' AND correct IS NOT NULL"),
            ("accuracy_sampled", "correct::INTEGER", "1", "mode = 'sampled' AND correct IS NOT NULL"),
            ("reverse_kl", "reverse_kl_sum", "tokens", "mode = 'kl' AND isfinite(reverse_kl_sum)"),
            ("mean_length", "tokens", "1", "mode = shape"),
            ("clipped_ratio", "(finish_reason = 'length')::INTEGER", "1", "mode = shape"),
        ]
        sums = " UNION ALL ".join(
            f"SELECT run, \"round\", artifact, '{name}' AS metric, prompt_id, sum({total})::DOUBLE AS total,"
            f" sum({weight})::DOUBLE AS weight FROM rows_ WHERE {where} GROUP BY ALL"
            for name, total, weight, where in parts
        )
        pair = 'run, "round", artifact, other_run, other_round, metric'
        both = (
            'SELECT one.run, one."round", one.artifact, one.metric, other.run AS other_run, other."round" AS other_round,'
            " one.total AS y, one.weight AS w, other.total AS z, other.weight AS v"
            " FROM sums_ AS one JOIN sums_ AS other USING (metric, prompt_id)"
            ' WHERE (one.run, one."round") <> (other.run, other."round")'
        )
        moved = (
            f"SELECT {pair}, sum(y) OVER pair / sum(w) OVER pair AS value, sum(z) OVER pair / sum(v) OVER pair AS minus,"
            " (y - value * w) / sum(w) OVER pair - (z - minus * v) / sum(v) OVER pair AS d"
            f" FROM both_ WINDOW pair AS (PARTITION BY {pair})"
        )
        found = (
            f"SELECT {pair}, any_value(value) - any_value(minus) AS difference, count(*) AS prompts,"
            " CASE WHEN count(*) > 1 THEN sqrt(count(*) / (count(*) - 1) * sum(d * d)) END AS se"
            " FROM moved_ GROUP BY ALL"
        )
        return (
            f"WITH rows_ AS ({rows}), sums_ AS ({sums}), both_ AS ({both}), moved_ AS ({moved}), found_ AS ({found})"
            f" SELECT *, difference - {Z95} * se AS low, difference + {Z95} * se AS high,"
            " coalesce(low > 0 OR high < 0, false) AS told_apart FROM found_"
        )


def _needed(used: Collection[str]) -> set[str]:
    """The columns of `tokens` that these are, or are made from."""
    return {*used, *(part for column in used for part in _MADE_FROM.get(column, ()))}


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
        for shard in opened[key]:
            fragments.append(shard.format.make_fragment(shard.path, shard.filesystem, _partition(use)))
    columns = pa.schema([*_USE, *_either_layout(schema)])
    if not fragments:
        return pads.dataset(columns.empty_table())
    return pads.FileSystemDataset(fragments, columns, fragments[0].format, fragments[0].filesystem)


def _either_layout(schema: TableSchema) -> list[pa.Field]:
    """A table's columns; where it may be packed, those of both layouts, of which a file has one."""
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
        for field, value in zip(_USE, values, strict=True)
    ]
    return functools.reduce(operator.and_, terms)


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


def _unpacked(name: str, part: Part) -> str:
    """A declared column of a table whose files may be packed."""
    if part.function is None:
        return _identifier(name)
    arguments = ", ".join(_identifier(argument) for argument in part.arguments)
    return f"coalesce({_identifier(name)}, {part.function}({arguments})) AS {_identifier(name)}"


def unpack_functions(schemas: Iterable[TableSchema]) -> dict[str, tuple[Callable[..., Any], list[Any], str]]:
    """By name: the functions that views over these tables call, the types of their arguments and of their result."""
    found = {}
    for schema in schemas:
        layout = packed_schema(schema)
        if layout is None:
            continue
        result = {column.name: duckdb_type(column.type) for column in schema.columns}
        given = {column.name: duckdb_type(column.type) for column in layout.columns}
        for name, (function, arguments) in parts(layout.names).items():
            if function is not None:
                found[function] = (FUNCTIONS[function], [given[argument] for argument in arguments], result[name])
    return found


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
