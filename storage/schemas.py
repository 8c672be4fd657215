"""Every column of this program's own tables, declared once: Arrow type, nullability, meaning. Shards and DuckDB views come
from here. A plugin's table is declared by the plugin and recorded in the manifest of every artifact that holds it.

Missing is null, never 0.0. Lists hold no nulls; log-probabilities are natural logarithms, entropies are in nats.
T is the number of completion tokens, K the number of candidates stored per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import StoreError


class MaskReason(IntFlag):
    """Why a completion token may be left out of the loss; a policy turns reasons into the loss mask."""

    SPECIAL_TOKEN = 1
    TRUNCATED = 2
    TEACHER_PREFIX = 4
    UNMAPPED = 8
    INVALID_VALUE = 16


@dataclass(frozen=True)
class Column:
    """One column. `nullable` is about the cell; elements of lists are null only where `holes`."""

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    holes: bool = False


@dataclass(frozen=True)
class TableSchema:
    """One table. `version` rises when a column changes its meaning or type; it is written beside every shard. `prefixed`:
    its columns carry the table's name in the view `supervision`."""

    name: str
    doc: str
    columns: tuple[Column, ...]
    version: int = 1
    prefixed: bool = False

    @property
    def arrow(self) -> pa.Schema:
        return pa.schema([pa.field(column.name, column.type, column.nullable) for column in self.columns])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)


_STR, _BOOL, _INT, _LONG, _DOUBLE = pa.string(), pa.bool_(), pa.int32(), pa.int64(), pa.float64()
_INTS, _SHORTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.int16()), pa.list_(pa.float32())
_INTS_K, _FLOATS_K = pa.list_(_INTS), pa.list_(_FLOATS)


def _table(name: str, doc: str, *columns: Column, prefixed: bool = False) -> TableSchema:
    return TableSchema(name, doc, columns, prefixed=prefixed)


def _col(name: str, type: pa.DataType, doc: str) -> Column:
    return Column(name, type, doc)


def _opt(name: str, type: pa.DataType, doc: str, holes: bool = False) -> Column:
    return Column(name, type, doc, nullable=True, holes=holes)


_REASONS = ", ".join(f"{reason.value} {(reason.name or '').lower()}" for reason in MaskReason)
_SAMPLE_ID = _col("sample_id", _STR, "prompt_id/round/sample_index")

_ALL = (
    _table(
        "prompts",
        "Prompts as given to the models, after filtering.",
        _col("prompt_id", _STR, "the user's id, or derived from the text"),
        _col("split", _STR, "train, eval or warmup"),
        _col("text", _STR, "as given to the tokenizer, chat template applied"),
        _opt("messages", _STR, "JSON of the messages; null where the prompt came as text"),
        _col("token_ids", _INTS, "the student's tokens of the prompt"),
        _opt("teacher_token_ids", _INTS, "the teacher's tokens; null means equal to token_ids"),
        _opt("answer", _STR, "what the verifier compares with"),
        _opt("completion", _STR, "target of supervised fine-tuning"),
        _opt("completion_token_ids", _INTS, "tokens of that target, end of sequence included"),
        _opt("teacher_id", _STR, "which teacher; null means the only one"),
    ),
    _table(
        "vocabulary",
        "The tokenizers' vocabularies, so that SQL can read tokens.",
        _col("tokenizer", _STR, "student, teacher, or teacher:NAME where there are several"),
        _col("id", _INT, "token id"),
        _col("token", _STR, "the tokenizer's own name of the token"),
        _opt("text", _STR, "what it decodes to alone; null where that is no valid text"),
        _col("special", _BOOL, "special token"),
    ),
    _table(
        "context_columns",
        "What the stage `context` reads of a training prompt; there only where teacher.context has a context for each sample.",
        _col("prompt_id", _STR, "the prompt"),
        _col("prompt", _STR, "JSON: its text, or its list of messages"),
        _opt("answer", _STR, "null where no template names it, or the row has none"),
        _opt("solution", _STR, "as answer"),
        _opt("hint", _STR, "as answer"),
    ),
    _table(
        "rollouts",
        "One row per sample.",
        _SAMPLE_ID,
        _col("prompt_id", _STR, "the prompt it answers"),
        _col("sample_index", _INT, "0 .. num_generations-1"),
        _col("prompt_token_ids", _INTS, "tokens the sampler was given"),
        _col("completion_token_ids", _INTS, "T sampled tokens, the stop token included"),
        _col("sampling_logprobs", _FLOATS, "T values under the distribution sampled from: after temperature and top-p"),
        _col("behaviour", _STR, "who sampled: student, blended or teacher"),
        _col("prefix_length", _INT, "leading tokens that the teacher wrote"),
        _col("finish_reason", _STR, "stop or length"),
        _col("seed", _LONG, "seed of this sample"),
        _col("completion_text", _STR, "decoded completion, special tokens left out"),
        _opt("reward", _DOUBLE, "null: rewards are in the table `rewards`"),
    ),
    _table(
        "rewards",
        "One row per sample that was judged, in the order of the rollouts.",
        _SAMPLE_ID,
        _opt("reward", _DOUBLE, "weighted sum over the verifiers; null where one that counts failed"),
        _opt(
            "parts",
            pa.list_(_DOUBLE),
            "reward of each verifier, unweighted, in the config's order; null as reward, of one with"
            " weight 0 also where it failed",
            holes=True,
        ),
        _opt("feedback", _STR, "text of the verifiers that gave one; null without"),
        _opt("segment_ends", _INTS, "half-open ends of segments in completion tokens, increasing; null without"),
        _opt("span_starts", _INTS, "first tokens of marked spans of the completion; null without"),
        _opt("span_ends", _INTS, "their half-open ends"),
        _opt("span_kinds", pa.list_(_STR), "their kinds"),
        _opt("failed", _STR, "why there is no reward; null where there is one"),
    ),
    _table(
        "drafts",
        "One row per completion that a teacher wrote, once, for rollouts to begin with or to consist of.",
        _col("sample_id", _STR, "prompt_id/draft/sample_index"),
        _col("prompt_id", _STR, "the training prompt it answers"),
        _col("sample_index", _INT, "0 .. per_prompt-1"),
        _col("prompt_token_ids", _INTS, "tokens the teacher was given"),
        _col("completion_token_ids", _INTS, "T tokens, the stop token included"),
        _col("sampling_logprobs", _FLOATS, "T values under the distribution sampled from, the teacher's"),
        _col("finish_reason", _STR, "stop or length"),
        _col("seed", _LONG, "seed of this sample"),
        _col("completion_text", _STR, "decoded completion, special tokens left out"),
    ),
    _table(
        "contexts",
        "One row per sample of the rollouts: what the teacher reads before its completion.",
        _SAMPLE_ID,
        _opt("prompt_token_ids", _INTS, "the teacher's tokens; null: no context, it reads the plain prompt"),
        _opt("sibling_id", _STR, "sample_id of the {sibling}; null without one"),
        _col("source", _STR, "what the template names: sibling, feedback, both, prompt (neither), or none"),
        _opt("reason", _STR, "why there is none: no sibling, no feedback, ..., too long; null where there is one"),
    ),
    _table(
        "sampled",
        "Signal: both models' log-probabilities of the tokens that were sampled (temperature 1, full vocabulary).",
        _SAMPLE_ID,
        _opt("student_logprobs", _FLOATS, "T values of the rollout-time student; null with supervise.student: none"),
        _opt("teacher_logprobs", _FLOATS, "T values of the teacher; null with supervise.teacher: none"),
        _opt("student_entropy", _FLOATS, "T entropies in nats; null as student_logprobs"),
        _opt("teacher_entropy", _FLOATS, "T entropies in nats; null as teacher_logprobs"),
        _opt(
            "behaviour_logprobs",
            _FLOATS,
            "T values of the scorer's student under the sampling distribution (temperature, top-p, top-k applied)",
        ),
    ),
    _table(
        "teacher_topk",
        "Signal: the teacher's K most likely tokens.",
        _SAMPLE_ID,
        _col("ids", _INTS_K, "T lists of at most K token ids, likeliest first"),
        _col("logprobs", _FLOATS_K, "the teacher's log-probabilities of these"),
        _col("valid", _SHORTS, "T counts of usable entries"),
        _col("tail_logmass", _FLOATS, "T log-probabilities of everything outside the list"),
        prefixed=True,
    ),
    _table(
        "student_topk",
        "Signal: the rollout-time student's K most likely tokens.",
        _SAMPLE_ID,
        _col("ids", _INTS_K, "T lists of at most K token ids, likeliest first"),
        _col("student_logprobs", _FLOATS_K, "the student's log-probabilities of these"),
        _col("teacher_logprobs", _FLOATS_K, "the teacher's log-probabilities of these"),
        _col("valid", _SHORTS, "T counts of usable entries"),
        _col("student_tail_logmass", _FLOATS, "T log-probabilities of the rest under the student"),
        _col("teacher_tail_logmass", _FLOATS, "T log-probabilities of the rest under the teacher"),
        prefixed=True,
    ),
    _table(
        "mask",
        "Signal: reasons to leave tokens out of the loss.",
        _SAMPLE_ID,
        _col("mask_reasons", _INTS, "T bit sets: " + _REASONS),
    ),
    _table(
        "training_steps",
        "One row per optimizer step. Token means over the global batch, loss mask applied.",
        _col("step", _LONG, "optimizer step over the whole run, from 1"),
        _col("round", _INT, "round it belongs to; 0 for warm-up"),
        _col("epoch", _INT, "pass over the round's rollouts, from 0"),
        _col("loss", _DOUBLE, "objective, mean per unmasked token"),
        _col("grad_norm", _DOUBLE, "before clipping"),
        _col("lr", _DOUBLE, "learning rate of the step"),
        _col("samples", _INT, "samples in the step"),
        _col("tokens", _LONG, "unmasked tokens in the step"),
        _col("seconds", _DOUBLE, "wall time of the step"),
        _opt("teacher_mass", _DOUBLE, "the teacher's probability on the support"),
        _opt("student_mass", _DOUBLE, "the live student's probability on the support"),
        _opt("overlap_ratio", _DOUBLE, "share of the teacher's top-K list in the live student's; null without it"),
        _opt("student_entropy", _DOUBLE, "live student, nats"),
        _opt("teacher_entropy", _DOUBLE, "teacher, nats"),
        _opt("clip_fraction", _DOUBLE, "share of tokens whose importance ratio was clipped"),
        _opt("outlier_fraction", _DOUBLE, "share of tokens outside the trust region: gated, dropped or capped"),
        _opt(
            "log_ratio_mean", _DOUBLE, "live student to rollout-time student, log; no KL where sampling was truncated"
        ),
        _opt("log_ratio_p05", _DOUBLE, "5th percentile of it"),
        _opt("log_ratio_p50", _DOUBLE, "median of it"),
        _opt("log_ratio_p95", _DOUBLE, "95th percentile of it"),
        _opt("reverse_kl", _DOUBLE, "KL(student || teacher) as the objective sees it"),
        _opt("importance_weight_mean", _DOUBLE, "after truncation"),
        _opt(
            "drift",
            _DOUBLE,
            "KL(rollout-time student || live student), estimated by k3 = r - 1 - log r over the sampled tokens, r the ratio of"
            " live to rollout-time probability; low where top-p or top-k kept tokens from being sampled",
        ),
        _opt("masked_tokens", _LONG, "tokens of the step's samples that were left out of the loss"),
    ),
    _table(
        "teacher_steps",
        "One row per optimizer step and teacher, where a run has several. Means over the teacher's unmasked tokens of the step.",
        _col("step", _LONG, "optimizer step over the whole run, from 1"),
        _col("round", _INT, "round it belongs to"),
        _col("teacher", _STR, "its name"),
        _col("samples", _INT, "its samples in the step"),
        _col("tokens", _LONG, "their unmasked tokens"),
        _opt("loss", _DOUBLE, "objective, mean per unmasked token; null without tokens"),
        _opt("reverse_kl", _DOUBLE, "KL(student || teacher) as the objective sees it"),
        _opt("teacher_mass", _DOUBLE, "the teacher's probability on the support"),
        _opt("teacher_entropy", _DOUBLE, "teacher, nats"),
    ),
    _table(
        "evaluations",
        "One row per held-out sample.",
        _col("prompt_id", _STR, "the prompt it answers"),
        _col("mode", _STR, "greedy, sampled, or kl (temperature 1, scored by both models)"),
        _col("sample_index", _INT, "0 .. samples-1"),
        _col("prompt_token_ids", _INTS, "tokens the sampler was given"),
        _col("completion_token_ids", _INTS, "T tokens, the stop token included"),
        _col("completion_text", _STR, "decoded completion, special tokens left out"),
        _col("finish_reason", _STR, "stop or length"),
        _opt("verifier", _STR, "what judged it; null where nothing did"),
        _opt("correct", _BOOL, "the verifier's verdict; null where it gave none"),
        _opt("reverse_kl_sum", _DOUBLE, "sum over T of the exact full-vocabulary KL(student || teacher)"),
        _col("tokens", _INT, "T"),
    ),
    _table(
        "harness_results",
        "What lm-eval reports of a student: one row per task, metric and filter.",
        _col("task", _STR, "task or group"),
        _col("metric", _STR, "acc, exact_match, ..."),
        _col("filter", _STR, "what lm-eval made of the answers before it judged them; none without one"),
        _col("value", _DOUBLE, "the metric over the documents"),
        _opt("se", _DOUBLE, "its standard error as lm-eval reports it; null where it reports none"),
        _col("n", _LONG, "documents; of a group those of its tasks"),
        _opt("num_fewshot", _INT, "examples before each question"),
        _col("task_version", _STR, "the task's own version"),
        _opt("higher_is_better", _BOOL, "null where lm-eval does not say it"),
    ),
    _table(
        "harness_samples",
        "One row per document of a task of lm-eval, filter and metric.",
        _col("task", _STR, "its task"),
        _col("doc_id", _LONG, "place of the document in the task's data, from 0"),
        _col("filter", _STR, "as in harness_results"),
        _col("metric", _STR, "as in harness_results"),
        _opt("value", _DOUBLE, "of this document; null where it is no number"),
        _col("request", _STR, "what the model read, of its first request"),
        _col("answers", _STR, "JSON: per request the completion, or [log-likelihood, whether it is the likeliest]"),
        _col("target", _STR, "what the task compares with"),
    ),
)

COMPLETION_KL = "completion_kl"
_INTERMEDIATE = (
    _table(
        COMPLETION_KL,
        "Intermediate, in no manifest: the scorer's results for an evaluation's completions.",
        _SAMPLE_ID,
        _opt("reverse_kl_sum", _DOUBLE, "sum over T of the exact KL(student || teacher); null where it is not finite"),
    ),
)

TABLES: dict[str, TableSchema] = {table.name: table for table in _ALL}
_BY_NAME = TABLES | {table.name: table for table in _INTERMEDIATE}


_SCALARS = {"string": _STR, "bool": _BOOL, "int16": pa.int16(), "int32": _INT, "int64": _LONG}
_SCALARS |= {"float32": pa.float32(), "float64": _DOUBLE}


def type_name(type: pa.DataType) -> str:
    """A column's type as a manifest has it: a scalar of `_SCALARS`, with `[]` for each level of lists. StoreError for any other
    type."""
    if pa.types.is_list(type):
        return f"{type_name(type.value_type)}[]"
    for name, scalar in _SCALARS.items():
        if type == scalar:
            return name
    raise StoreError(f"column type {type}: tables hold {', '.join(_SCALARS)}, and lists of these")


def type_of(name: str) -> pa.DataType:
    """The Arrow type that `type_name` gave this name. ValueError for an unknown name."""
    if name.endswith("[]"):
        return pa.list_(type_of(name.removesuffix("[]")))
    if name not in _SCALARS:
        raise ValueError(f"unknown column type {name!r}; types are {', '.join(_SCALARS)}, and lists of these (int32[])")
    return _SCALARS[name]


def declared(table: str) -> TableSchema:
    """The table's declaration here. StoreError for a table that is not declared here."""
    if table not in _BY_NAME:
        raise StoreError(f"table {table!r} is not declared; there are {', '.join(sorted(TABLES))}")
    return _BY_NAME[table]


@cache
def schema_for(table: str) -> pa.Schema:
    """The Arrow schema of a table. StoreError for a table that is not declared here."""
    return declared(table).arrow


def validate_table(table: str, data: pa.Table, declaration: TableSchema | None = None) -> pa.Table:
    """`data` with exactly the declared columns, order and types; `declaration` is for a table that is not declared here.

    Nullable columns may be missing and become null; losslessly convertible types are converted. StoreError for an
    unknown column, a missing one, a type that does not convert, or a null in a column that is not nullable.
    """
    declaration = declaration or declared(table)
    schema = declaration.arrow
    unknown = [name for name in data.column_names if name not in schema.names]
    if unknown:
        raise StoreError(f"table {table!r}: unknown column {unknown[0]!r}; declared are {', '.join(schema.names)}")
    if len(set(data.column_names)) < len(data.column_names):
        raise StoreError(f"table {table!r}: a column is given twice in {data.column_names}")
    holes = {column.name for column in declaration.columns if column.holes}
    columns = [_conform_column(table, field, data, field.name in holes) for field in schema]
    return pa.table(columns, schema=schema)


def _conform_column(table: str, field: pa.Field, data: pa.Table, holes: bool) -> pa.ChunkedArray:
    where = f"table {table!r}, column {field.name!r}"
    if field.name not in data.column_names:
        if not field.nullable:
            raise StoreError(f"{where}: missing")
        return pa.chunked_array([pa.nulls(data.num_rows, field.type)])
    column = data.column(field.name)
    if column.type != field.type:
        try:
            column = column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise StoreError(f"{where}: expected {field.type}, found {column.type} ({error})") from error
    if column.null_count and not field.nullable:
        raise StoreError(f"{where}: {column.null_count} nulls, but every row needs a value")
    inner = column
    while pa.types.is_list(inner.type) and not holes:
        inner = pc.list_flatten(inner)
        if inner.null_count:
            raise StoreError(f"{where}: {inner.null_count} nulls inside lists; leave the whole cell null instead")
    return column
