"""The SQL of the views: of this program's own tables, and of those that a store's manifests declare."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from storage.artifacts.packed import packed_schema, parts
from storage.query.differences import differences
from storage.query.sql import casts, identifier, unpacked
from storage.query.views import (
    ARTIFACT,
    CONTEXT,
    IN_WORDS,
    ROUND,
    RUN,
    SIGNALS,
    VIEWS,
    View,
    columns_of,
    signal_columns,
)
from storage.schemas import TABLES, Column, TableSchema

_SAMPLE_ID = "^(.*)/[^/]*/([0-9]+)$"
"""prompt_id (which may have slashes), round, sample_index."""
_OF_SET = "evaluate_"
_LABELS_OF_SETS = {"evaluations": _OF_SET, "prompts": "prepare_", "vocabulary": "prepare_"}
"""By table: how the labels of stages begin that belong to a named evaluation set."""
_MADE_FROM = {
    "gap": ("student_logprob", "sampling_logprob", "teacher_logprob"),
    "teacher_mass": ("teacher_tail", "student_list_tail"),
    "reasons": ("mask_reasons",),
    "before": ("text_offset",),
    "after": ("text_offset",),
}
"""Columns of `tokens` that are computed: what they need of what is exploded."""


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
            columns = (RUN, ROUND, ARTIFACT, *columns_of(schema, without=("run", "round", "artifact")))
            self.all[name] = View(name, f"{schema.doc} Version {schema.version}.", columns, (name,))
        for name in ("supervision", "tokens"):
            view = self.all[name]
            added = [c for signal in self._signals for c in self._added(name, signal).values()]
            self.all[name] = replace(
                view, columns=(*view.columns, *added), tables=tuple(dict.fromkeys((*view.tables, *self._signals)))
            )

    def _added(self, view: str, signal: str) -> dict[str, Column]:
        """By name in the signal's table: its columns in `supervision` or `tokens`."""
        columns = signal_columns(self.extra[signal])
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
        columns, view = self.all[name].columns, identifier(name)
        if not rows_wanted:
            return f"CREATE VIEW {view} AS SELECT {casts(columns, null=True)} WHERE false"
        if name in ("artifacts", "rounds", "stages"):
            rows = f"SELECT * FROM {identifier(name + '@')}"
        elif name == "supervision":
            rows = self._supervision()
        elif name == "tokens":
            rows = self._tokens(set(used) if used is not None else {column.name for column in columns})
        elif name == "differences":
            rows = differences(self._rows("evaluations"))
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
        return f"CREATE VIEW {view} AS SELECT {casts(columns)} FROM ({rows})"

    def _rows(self, table: str, sets: bool = False) -> str:
        """A table's dataset under the views' names. Without `sets` what named evaluation sets have in it is left out."""
        names = self.schemas[table].names
        layout = packed_schema(self.schemas[table])
        made = parts(layout.names) if layout is not None else {}
        columns = [
            unpacked(name, made[name]) if name in made else identifier(name)
            for name in names
            if name not in ("run", "round", "stage", "artifact")
        ]
        own_round = 'coalesce(use_round, "round")' if "round" in names else "use_round"
        use = f'use_run AS run, {own_round} AS "round", use_stage AS stage, use_artifact AS artifact'
        rows = f"SELECT {use}, {', '.join(columns)} FROM {identifier(table + '@')}"
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
            f'LEFT JOIN ({self._rows(s)}) AS {identifier(s)} USING (run, "round", sample_id)' for s in signals
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
            for name, column in signal_columns(self.schemas[signal]).items():
                columns.append(f"{identifier(signal)}.{identifier(name)} AS {identifier(column.name)}")
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
            f"CASE WHEN mask_reasons & {int(bit)} > 0 THEN '{text}' END" for bit, text in IN_WORDS.items()
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
            name: f"{identifier(lists[name][0])}.{identifier(lists[name][1])}" for name in lists if name in needed
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
                *(f"unnest({values}) AS {identifier(name)}" for name, values in exploded.items()),
            ]
        )
        there = {*of_sample, *exploded, "position"}
        columns = []
        for column in self.all["tokens"].columns:
            name = identifier(column.name)
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


def _needed(used: Collection[str]) -> set[str]:
    """The columns of `tokens` that these are, or are made from."""
    return {*used, *(part for column in used for part in _MADE_FROM.get(column, ()))}
