"""Stage `prepare`: prompts from files or a generator, filtered, rendered and tokenised, in three disjoint splits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.artifacts.artifact import Artifact
from storage.artifacts.digests import table_digest, tokenizer_digest
from storage.errors import InputError
from storage.identity import canonical_json, digest_of
from storage.schemas import schema_for
from storage.store import ArtifactSpec, Builder, Store
from tasks.inputs.completions import depends_on_context
from tasks.inputs.contexts import missing_column, privileged_columns, teacher_prompt, users_turn
from tasks.inputs.prompts import SPLITS, PrepareConfig
from tasks.inputs.rendering import BATCH, Reader, RenderedPrompt, Renderer
from tasks.inputs.rows import PRIVILEGED, Row
from tasks.inputs.shipped import load_tokenizer, read_otherwise
from tasks.inputs.sources import read_rows, source_identity
from tasks.inputs.tokenizers import TokenizerAudit, TokenizerPolicy, audit_tokenizers, vocabulary_rows
from tasks.routing import ROUTED_COLUMNS, all_routes, learned_by, own_prompts, taught_by, teacher_field
from tasks.signals.signal import STOP_IDS
from tasks.stage import LOADING, Context, Work

VERSION = 1
SHARD_ROWS = 20_000
CHECKED = "changed_since_0_1"
"""Entry of the meta data by which prompts of this version are told from those of 0.1.0, which may be wrong."""
NO_CONTEXTS: Mapping[str, str] = {}
KEPT = "context_columns"
"""Table, and content, of what the stage `context` reads of the prompts; there only where it runs."""
SAMPLED = "train"
"""The split that rollouts answer."""


def prepare_work(
    config: PrepareConfig,
    student_model: Artifact,
    teacher_model: Artifact | Mapping[str, Artifact] | None,
    *,
    mixed: bool = False,
    memo: Path | None = None,
    store: Store | None = None,
    contexts: Mapping[str, str | Mapping[str, str]] = NO_CONTEXTS,
    context_columns: Mapping[str, bool] | None = None,
) -> Work:
    """Work with the output `prepare`: tables `prompts` and `vocabulary`. `teacher_model`: the teacher, or several by name. Of
    several every prompt for training and evaluation names its own; `mixed`: all of them read every prompt.

    Content: `prompts:train` and so on (digest of the rows of each configured split) and `audit`; where prompts name their
    teachers also what `tasks.routing` lists, and audit and vocabulary by teacher (`audit:NAME`). Meta: prompts
    and `filtered` (by reason) per split, `warnings`, `longest_prompt` in tokens, `audit`. `memo`: folder that
    remembers hashes of unchanged files. `store`: where the models' folders are found; what versions up to 0.1.0 made of
    them otherwise gets another key. `contexts`: split -> template of what the teacher reads (tasks/inputs/contexts.py), or with
    several teachers that of each which has one.
    `context_columns`: what the stage `context` reads of the training prompts, beside their text (`contexts.kept_columns`), for
    the table of this name. None: that stage does not run.
    Raises InputError for an unreadable source, here or when built."""
    identity = json.loads(canonical_json(config))
    if contexts:
        identity["contexts"] = dict(contexts)
    if context_columns is not None:
        identity[KEPT] = dict(context_columns)
    contents = {split: source_identity(source, memo) for split, source in config.sources().items()}
    inputs = {"tokenizer": _tokenizer_content(student_model)}
    several = dict(sorted(teacher_model.items())) if isinstance(teacher_model, Mapping) else {}
    one = None if isinstance(teacher_model, Mapping) else teacher_model
    teachers: dict[str | None, Artifact] = {} if one is None else {None: one}
    teachers |= {name: model for name, model in several.items()}  # noqa: C416  (for its wider type of key)
    if one is not None:
        inputs["teacher_tokenizer"] = _tokenizer_content(one)
        # The audit contains padding rows and stop ids, which come from the configs.
        inputs["architectures"] = canonical_json([_architecture(student_model), _architecture(one)])
    elif mixed:
        inputs["teacher_tokenizer"] = _one_tokenizer(several)
        inputs["architectures"] = canonical_json(
            [_architecture(student_model), *sorted({_architecture(m) for m in several.values()})]
        )
    else:
        for name, model in several.items():
            inputs[f"teacher_tokenizer:{name}"] = _tokenizer_content(model)
            inputs[f"architectures:{name}"] = canonical_json([_architecture(student_model), _architecture(model)])
    models = (student_model, *teachers.values()) if store is not None else ()
    folders = [store.folder(model) for model in models if store is not None]
    changes = changed_since_0_1(config, folders, memo)
    marks = {name: value for name, (value, _) in changes.items()}
    spec = ArtifactSpec.of("prepare", VERSION, {**identity, **contents, **marks}, inputs)

    def build(builders: dict[str, Builder], context: Context) -> None:
        if "prepare" not in builders:
            return
        for _, reason in changes.values():
            context.say("prepare", reason)
        student = context.store.materialize(student_model)
        readers = {name: context.store.materialize(model) for name, model in teachers.items()}
        prepared = prepare(config, student, readers, context, mixed, contexts, context_columns)
        for split, source in config.sources().items():
            if source_identity(source, memo) != contents[split]:
                raise InputError(f"{split}: {getattr(source, 'path', source)} changed while it was read; run again")
        _commit(builders["prepare"], prepared, changes)

    return Work(stage="prepare", outputs={"prepare": spec}, build=build)


def changed_since_0_1(
    config: PrepareConfig, folders: Iterable[Path | None], memo: Path | None
) -> dict[str, tuple[str, str]]:
    """Field of the identity -> (its value, a sentence for the user), where versions up to 0.1.0 gave other prompts.

    `folders`: the student's, and the teacher's if there is one. Empty where nothing changed, so that keys stay the same."""
    found: dict[str, tuple[str, str]] = {}
    known = [folder for folder in folders if folder is not None]
    with suppress(InputError):  # a tokenizer that does not load is reported by the stage that reads it
        for folder in known:
            if LOADING not in found and (difference := read_otherwise(folder, memo)) is not None:
                how = "is used as its file says. transformers' class for it reads it otherwise"
                found[LOADING] = ("file", f"{folder}: the tokenizer in this folder {how}: {difference}")
        if config.warmup is not None and known and depends_on_context(known[0], config, memo):
            why = "alone they can get other tokens (a leading space, say)"
            found["completions"] = ("in context", f"completions are tokenised together with their prompts; {why}")
    return found


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`."""

    prompts: pa.Table
    vocabulary: pa.Table
    filtered: dict[str, dict[str, int]]
    warnings: list[str]
    audits: dict[str | None, TokenizerAudit]
    """By teacher's name; None: the only one, or a mixture."""
    context_columns: pa.Table | None = None


def prepare(
    config: PrepareConfig,
    student: Path,
    teachers: Mapping[str | None, Path],
    context: Context,
    mixed: bool = False,
    contexts: Mapping[str, str | Mapping[str, str]] = NO_CONTEXTS,
    context_columns: Mapping[str, bool] | None = None,
) -> Prepared:
    """Read, filter, render and tokenise all splits with the tokenizers of checkpoint folders: the student's, and by name the
    teachers' (None: the only one). Raises InputError, naming the row, where several teachers do not have every prompt once."""
    audits = audited(student, teachers, config.tokenizers, mixed)
    for name, audit in audits.items():
        if audit.verdict != "identical":
            context.log(str(audit) if name is None else f"teachers.{name}: {audit}")
        require_audit(name, audit)
        for warning in audit.warnings:
            context.say("prepare", f"warning: {warning}" if name is None else f"warning: teachers.{name}: {warning}")
    own = load_tokenizer(student)
    loaded = {tokenizer_digest(student): own}
    readers: dict[str | None, Reader] = {}
    for name, audit in audits.items():
        folder = teachers[name] if name in teachers else next(iter(teachers.values()))  # of a mixture any
        digest = tokenizer_digest(folder)
        loaded[digest] = loaded.get(digest) or load_tokenizer(folder)
        readers[name] = Reader(loaded[digest], audit)
    renderer = Renderer(config, own, readers)
    taken = _Taken(config.equal_ids)
    stops = set(audits[None].stop_ids) if None in audits else set()  # with several teachers nothing is merged
    columns: dict[str, list[Any]] = {name: [] for name in schema_for("prompts").names}
    of_contexts: list[dict[str, str | None]] = []
    filtered: dict[str, dict[str, int]] = {}
    warnings: list[str] = []
    for split, source in config.sources().items():
        given = contexts.get(split)
        templates: list[str | None] = [*given.values()] if isinstance(given, Mapping) else [given]
        wanted = context_columns if split == SAMPLED else None
        named = [name for name in PRIVILEGED if any(name in privileged_columns(of) for of in templates)]
        privileged = named if wanted is None else [name for name in PRIVILEGED if name in wanted]
        rows, notes = read_rows(source, privileged)
        if wanted is not None:
            _require_kept(split, rows, wanted)
        rows = [_in_context(row, given) for row in rows]
        warnings += [f"{split}: {note}" for note in notes]
        for row in rows:
            renderer.require_teacher(split, row)
        left_out: Counter[str] = Counter()
        kept = 0
        for done, (row, prompt) in enumerate(renderer.render(rows), start=1):
            _refuse_inner_stop(row, prompt, stops)
            reason = taken.reason(split, row, prompt) or renderer.too_long(prompt)
            if reason is not None:
                left_out[reason] += 1
            else:
                kept += 1
                added = taken.add(split, row, prompt)
                for name, value in added.items():
                    columns[name].append(value)
                if wanted is not None:
                    of_contexts.append(_kept_of(row, wanted, added["prompt_id"]))
            if done % BATCH == 0 or done == len(rows):
                context.progress(done, len(rows), "prompts")
        warnings += [f"{split}: {note}" for note in renderer.notes.take()]
        filtered[split] = dict(sorted(left_out.items()))
        reasons = ", ".join(f"{count} {reason}" for reason, count in filtered[split].items())
        context.log(f"{split}: {kept} prompts" + (f"; left out: {reasons}" if reasons else ""))
        if kept == 0:
            raise InputError(
                f"{split}: none of {len(rows)} prompts is left ({reasons}); see prompts.max_prompt_length and the source"
            )
    for warning in warnings:
        context.log(f"warning: {warning}")
    vocabularies = [vocabulary_rows("student", renderer.student)]
    for name, reader in readers.items():
        vocabularies.append(vocabulary_rows("teacher" if name is None else f"teacher:{name}", reader.tokenizer))
    return Prepared(
        prompts=pa.table(columns, schema=schema_for("prompts")),
        vocabulary=pa.concat_tables([pa.table(rows, schema=schema_for("vocabulary")) for rows in vocabularies]),
        filtered=filtered,
        warnings=warnings,
        audits=audits,
        context_columns=None if context_columns is None else pa.Table.from_pylist(of_contexts, schema=schema_for(KEPT)),
    )


def _in_context(row: Row, given: str | Mapping[str, str] | None) -> Row:
    """The row with what its teacher reads, where there is a template: of the only teacher, or of each by name."""
    name = row.teacher_id if isinstance(given, Mapping) else None
    template = given.get(name or "") if isinstance(given, Mapping) else given
    if template is None:
        return row
    return replace(row, teacher_prompt=teacher_prompt(row, template, field=f"{teacher_field(name)}.context"))


def _require_kept(split: str, rows: Sequence[Row], kept: Mapping[str, bool]) -> None:
    """InputError for a row that cannot have a context, that lacks a column which every template names, and for a column that no
    row has."""
    for row in rows:
        users_turn(row)
        for name, required in kept.items():
            if required and not (getattr(row, name) or "").strip():
                raise missing_column(row, name)
    for name in kept:
        if not any((getattr(row, name) or "").strip() for row in rows):
            raise InputError(
                f"{split}: teacher.context uses {{{name}}}, which no row has; say what it is called (the source's columns:"
                f" {{{name}: NAME}}), or leave the template out"
            )


def _kept_of(row: Row, kept: Mapping[str, bool], prompt_id: str) -> dict[str, str | None]:
    """A row of the table `context_columns`."""
    prompt = json.dumps(row.prompt, ensure_ascii=False)
    return {"prompt_id": prompt_id, "prompt": prompt, **{name: getattr(row, name) for name in kept}}


def audited(
    student: Path, teachers: Mapping[str | None, Path], policy: TokenizerPolicy, mixed: bool = False
) -> dict[str | None, TokenizerAudit]:
    """The comparison of the student's tokenizer with each teacher's, by name. Of a mixture (`mixed`) that with the teacher of the
    fewest rows, as None: its teachers have one tokenizer, and it is computed over the ids that all have."""
    audits = {name: audit_tokenizers(student, folder, policy) for name, folder in teachers.items()}
    return {None: min(audits.values(), key=lambda audit: audit.teacher.rows)} if mixed else audits


def require_audit(name: str | None, audit: TokenizerAudit) -> None:
    """InputError, naming the teacher, if the tokenizers do not match."""
    try:
        audit.require()
    except InputError as error:
        raise InputError(f"teachers.{name}: {error}" if name is not None else str(error)) from error


def _refuse_inner_stop(row: Row, prompt: RenderedPrompt, stops: set[int]) -> None:
    """InputError for a completion that has a merged stop id before its end: the student would learn it as an ordinary token."""
    if stops and prompt.completion_token_ids is not None:
        for place, token in enumerate(prompt.completion_token_ids[:-1]):
            if token in stops:
                raise InputError(
                    f"{row.where}: token {place} of its completion is the stop id {token}, before the completion's end. An"
                    " ordinary token there (a turn's end, say) cannot be merged with the stop ids; shorten the completion, or set"
                    " prompts.tokenizers.stop_ids: mask"
                )


class _Taken:
    """Prompts taken so far, in all splits."""

    def __init__(self, equal_ids: str) -> None:
        self._equal_ids = equal_ids
        self._text: dict[str, tuple[str, str | None]] = {}  # rendered text -> split and teacher_id
        self._place: dict[str, tuple[str, str]] = {}  # prompt id -> its split and its place in the source

    def reason(self, split: str, row: Row, prompt: RenderedPrompt) -> str | None:
        """The reason to leave this prompt out, or None."""
        last = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        if not last.strip() or not prompt.token_ids:
            return "empty"
        if prompt.text in self._text:
            earlier, teacher = self._text[prompt.text]
            same = "duplicate" if teacher == row.teacher_id else "duplicate with another teacher_id"
            return same if earlier == split else f"in {earlier}"
        if self._equal_ids == "leave_out" and (other := self._other_split(split, row.id)):
            return f"id in {other}"
        return None

    def _other_split(self, split: str, name: str | None) -> str | None:
        """The other split that has this id."""
        earlier = self._place[name][0] if name is not None and name in self._place else split
        return earlier if earlier != split else None

    def add(self, split: str, row: Row, prompt: RenderedPrompt) -> dict[str, Any]:
        """Adds a prompt; returns its row of the table."""
        if split == "warmup" and not row.completion:
            raise InputError(f"{row.where}: a warmup row needs a completion to learn")
        name = _name(row, prompt.text)
        if name == "":
            raise InputError(f"{row.where}: its id is empty; remove the id to get a generated one")
        if self._equal_ids == "rename" and self._other_split(split, row.id):
            name = f"{split}:{name}"
        if name in self._place:
            other, place = self._place[name]
            hint = (
                "" if other == split else "; prompts.equal_ids: leave_out or rename sets equal ids of two splits apart"
            )
            raise InputError(f"{row.where}: id {name!r} is also the id of another prompt ({place}){hint}")
        self._text[prompt.text], self._place[name] = (split, row.teacher_id), (split, row.where)
        return {
            "prompt_id": name,
            "split": split,
            "text": prompt.text,
            "messages": None if isinstance(row.prompt, str) else json.dumps(row.prompt, ensure_ascii=False),
            "token_ids": prompt.token_ids,
            "teacher_token_ids": prompt.teacher_token_ids,
            "answer": row.answer,
            "completion": row.completion,
            "completion_token_ids": prompt.completion_token_ids,
            "teacher_id": row.teacher_id,
        }


def _commit(builder: Builder, prepared: Prepared, changes: dict[str, tuple[str, str]]) -> None:
    tables = ("prompts", "vocabulary", *(() if prepared.context_columns is None else (KEPT,)))
    shards = {name: _write(builder, name, getattr(prepared, name)) for name in tables}
    prompts, audits = prepared.prompts, prepared.audits
    found: dict[str, pa.Table] = {split: prompts.filter(pc.equal(prompts["split"], split)) for split in SPLITS}
    dumped = {name: audit.record() for name, audit in audits.items()}
    named = {name: audit for name, audit in dumped.items() if name is not None}
    stops = list(audits[None].stop_ids) if None in audits else []
    builder.commit(
        content={
            **(
                _routed_content(prepared, found, named)
                if named
                else {
                    **{f"prompts:{split}": table_digest(found[split]) for split in prepared.filtered},
                    "audit": digest_of(dumped.get(None)),
                }
            ),
            **{name: value for name, (value, _) in changes.items() if name == LOADING},
            **({STOP_IDS: canonical_json(stops)} if stops else {}),
        },
        meta={
            "prompts": {split: rows.num_rows for split, rows in found.items()},
            "filtered": prepared.filtered,
            "warnings": prepared.warnings,
            "longest_prompt": max(_lengths(prompts["token_ids"])),
            "audit": dumped.get(None),
            **({"audits": named} if named else {}),
            CHECKED: {name: reason for name, (_, reason) in changes.items()},
        },
        tables=shards,
    )


def _routed_content(
    prepared: Prepared, found: Mapping[str, pa.Table], audits: Mapping[str, dict[str, Any]]
) -> dict[str, str]:
    """What the stages depend on where prompts name their teachers: see `tasks.routing`."""
    content = {}
    for split in prepared.filtered:
        rows = found[split]
        content[f"prompts:{split}"] = table_digest(rows.drop_columns(list(ROUTED_COLUMNS)))
        content[all_routes(split)] = table_digest(rows.select(["prompt_id", *ROUTED_COLUMNS]))
        for name in audits:
            own = rows.filter(taught_by([name], rows)).select(["prompt_id", "teacher_token_ids"])
            content[own_prompts(name, split)] = table_digest(own)
            if split == "warmup":
                learned = rows.filter(pc.or_kleene(pc.is_null(rows["teacher_id"]), taught_by([name], rows)))
                content[learned_by(name)] = table_digest(learned.drop_columns(list(ROUTED_COLUMNS)))
    for name, audit in audits.items():
        both = pa.array(["student", f"teacher:{name}"])
        vocabulary = prepared.vocabulary.filter(pc.is_in(prepared.vocabulary["tokenizer"], value_set=both))
        # the name in the table is not what the teacher's signals depend on
        renamed = pc.replace_substring(vocabulary["tokenizer"], f"teacher:{name}", "teacher")
        at = vocabulary.column_names.index("tokenizer")
        content[f"vocabulary:{name}"] = table_digest(vocabulary.set_column(at, "tokenizer", renamed))
        content[f"audit:{name}"] = digest_of(audit)
    return content


def places(config: PrepareConfig, split: str, student: Path) -> Iterator[tuple[str, str]]:
    """(prompt_id, file and line) of the rows of a split, those that are left out among them, for errors about prompts. A prompt
    that occurs twice has its first place."""
    tokenizer = load_tokenizer(student)
    renderer = Renderer(config, tokenizer, {})
    for row in reversed(read_rows(config.sources()[split])[0]):
        name = _name(row, renderer._text(row, row.prompt, tokenizer))
        yield from ((name, row.where), (f"{split}:{name}", row.where))


def _name(row: Row, text: str) -> str:
    """The prompt's id: the row's own, or the hash of the rendered prompt."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16] if row.id is None else row.id


def _write(builder: Builder, name: str, table: pa.Table) -> int:
    """Writes the missing shards; returns the number of shards of the table."""
    count = -(-table.num_rows // SHARD_ROWS)
    for shard in builder.missing(name, count):
        builder.write_shard(name, shard, table.slice(shard * SHARD_ROWS, SHARD_ROWS))
    return count


def _lengths(lists: pa.ChunkedArray) -> Iterable[int]:
    return pc.list_value_length(lists).to_pylist()


def _tokenizer_content(model: Artifact) -> str:
    if "tokenizer" not in model.content:
        raise InputError(f"{model}: this model has no tokenizer; save one beside its weights")
    return model.content["tokenizer"]


def _one_tokenizer(teachers: Mapping[str, Artifact]) -> str:
    """The tokenizer of a mixture's teachers. InputError where they have more than one."""
    (first, digest), *others = ((name, _tokenizer_content(model)) for name, model in teachers.items())
    for name, other in others:
        if other != digest:
            raise InputError(
                f"teachers.{name}: its tokenizer files differ from those of teachers.{first}; a mixture averages over one"
                " vocabulary, so take teachers with one tokenizer, or remove `mixture` and give each prompt a teacher_id"
            )
    return digest


def _architecture(model: Artifact) -> str:
    return model.content.get("architecture", "")
