"""The views that queries see: their names, meanings and columns, made from those of `storage.schemas`.

Their SQL: `storage.query.statements`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from storage.query.figures import FIGURES
from storage.schemas import TABLES, Column, MaskReason, TableSchema

_STR, _INT, _LONG, _FLOAT, _DOUBLE = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64()

SIGNALS = ("sampled", "teacher_topk", "student_topk", "mask")
ARTIFACT = Column("artifact", _STR, "key of the artifact that holds the row")
RUN = Column("run", _STR, "run that used the artifact; null for none", nullable=True)
ROUND = Column("round", _INT, "round of that run; null for none", nullable=True)
_STAGE = Column("stage", _STR, "the run's name of the stage (train, warmup, warmup_teacher)", nullable=True)
_ARTIFACT_OF_STAGE = Column("artifact", _STR, "key of its first artifact; null before it began", nullable=True)
_TEACHER = Column("teacher", _STR, "teacher_id of its prompt: its teacher where there are several", nullable=True)
_STAGE_STATE = pa.struct(
    [("stage", _STR), ("key", _STR), ("state", _STR), ("seconds", _DOUBLE), ("rows", _LONG), ("error", _STR)]
)
CONTEXT = 40
"""Characters of `before` and `after`."""
IN_WORDS = {reason: (reason.name or "").lower().replace("_", " ") for reason in MaskReason}
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


def columns_of(schema: TableSchema, without: Sequence[str] = ()) -> tuple[Column, ...]:
    return tuple(column for column in schema.columns if column.name not in without)


def signal_columns(schema: TableSchema) -> dict[str, Column]:
    """By name in the table: a signal's columns in `supervision`, all nullable."""
    return {
        column.name: Column(
            f"{schema.name}_{column.name}" if schema.prefixed else column.name, column.type, column.doc, True
        )
        for column in columns_of(schema, without=("sample_id",))
    }


_ALL = (
    View("prompts", TABLES["prompts"].doc, (RUN, ARTIFACT, *TABLES["prompts"].columns), ("prompts",)),
    View("vocabulary", TABLES["vocabulary"].doc, (RUN, ARTIFACT, *TABLES["vocabulary"].columns), ("vocabulary",)),
    View("drafts", TABLES["drafts"].doc, (RUN, ARTIFACT, *TABLES["drafts"].columns), ("drafts",)),
    View(  # its old column `reward` is always null, and would hide that of `rewards` in a join
        "rollouts",
        TABLES["rollouts"].doc,
        (RUN, ROUND, ARTIFACT, *columns_of(TABLES["rollouts"], without=("reward",))),
        ("rollouts",),
    ),
    View("contexts", TABLES["contexts"].doc, (RUN, ROUND, ARTIFACT, *TABLES["contexts"].columns), ("contexts",)),
    View(
        "context_columns",
        TABLES["context_columns"].doc,
        (RUN, ARTIFACT, *TABLES["context_columns"].columns),
        ("context_columns",),
    ),
    View(
        "rewards",
        "One row per judged sample of a round's rollouts; a null reward counts for no group.",
        (
            RUN,
            ROUND,
            ARTIFACT,
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
            RUN,
            ROUND,
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
            RUN,
            ROUND,
            Column("artifact", _STR, "key of the rollouts that the signals describe"),
            TABLES["rollouts"].columns[0],
            _TEACHER,
            *(column for signal in SIGNALS for column in signal_columns(TABLES[signal]).values()),
        ),
        ("rollouts", "prompts", *SIGNALS),
    ),
    View(
        "tokens",
        "One row per completion token of a run's rollouts.",
        (
            RUN,
            ROUND,
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
                "reasons", _STR, f"the same in words: {', '.join(IN_WORDS.values())}; empty for none", nullable=True
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
        (RUN, ROUND, _STAGE, ARTIFACT, *columns_of(TABLES["training_steps"], without=("round",))),
        ("training_steps",),
    ),
    View(
        "evaluations",
        TABLES["evaluations"].doc,
        (RUN, ROUND, ARTIFACT, _TEACHER, *TABLES["evaluations"].columns),
        ("evaluations", "prompts"),
    ),
    View(
        "set_evaluations",
        "One row per completion of a named evaluation set (evaluate.sets, `opd evaluate --prompts`).",
        (RUN, ROUND, Column("set_name", _STR, "its name"), ARTIFACT, *TABLES["evaluations"].columns),
        ("evaluations",),
    ),
    *(
        View(name, TABLES[name].doc, (RUN, ROUND, ARTIFACT, *TABLES[name].columns), (name,))
        for name in ("harness_results", "harness_samples")
    ),
    View(
        "teacher_steps",
        TABLES["teacher_steps"].doc,
        (RUN, ROUND, _STAGE, ARTIFACT, *columns_of(TABLES["teacher_steps"], without=("round",))),
        ("teacher_steps",),
    ),
    View(
        "artifacts",
        "One row per committed artifact.",
        (
            Column("stage", _STR, "what made it"),
            ARTIFACT,
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
            ARTIFACT,
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
