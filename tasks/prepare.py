"""Stage `prepare`: prompts from files or a generator, filtered, rendered and tokenised, in three disjoint splits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from storage.artifacts.artifact import Artifact
from storage.artifacts.digests import table_digest, tokenizer_digest
from storage.errors import InputError, did_you_mean
from storage.identity import Identity, canonical_json, digest_of, omit_at
from storage.schemas import schema_for
from storage.store import ArtifactSpec, Builder, Store
from tasks.inputs.addition import AdditionSource
from tasks.inputs.completions import continued, depends_on_context
from tasks.inputs.contexts import privileged_columns, teacher_prompt
from tasks.inputs.rows import Row
from tasks.inputs.shipped import load_tokenizer, read_otherwise
from tasks.inputs.sources import FileSource, PromptSource, read_rows, source_identity
from tasks.inputs.templates import ClockRead, refuse_random, render
from tasks.inputs.tokenizers import TokenizerAudit, TokenizerPolicy, audit_tokenizers, vocabulary_rows
from tasks.routing import ROUTED_COLUMNS, all_routes, learned_by, own_prompts, taught_by
from tasks.signals.signal import STOP_IDS
from tasks.stage import LOADING, Context, Work

VERSION = 1
SPLITS: tuple[Literal["eval", "train", "warmup"], ...] = ("eval", "train", "warmup")
"""In order of precedence: a prompt that is in two splits stays in the first of them."""
SHARD_ROWS = 20_000
_BATCH = 1_000
_SHOWN_ROWS = 3
CHECKED = "changed_since_0_1"
"""Entry of the meta data by which prompts of this version are told from those of 0.1.0, which may be wrong."""
NO_CONTEXTS: Mapping[str, str] = {}
_TEMPLATE_ARGUMENTS = (
    "conversation",
    "messages",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)


class PrepareConfig(Identity):
    """Which prompts there are and how they are given to the models."""

    train: PromptSource | None = Field(None, description="prompts to write rollouts for")
    eval: PromptSource | None = Field(None, description="held-out prompts; none of them is left in train or warmup")
    warmup: PromptSource | None = Field(None, description="prompts with completions for supervised fine-tuning")
    chat_template: bool = Field(
        True, description="wrap a plain `prompt` as one user message; else tokenise it as it is"
    )
    chat_template_kwargs: dict[str, str | int | float | bool | None] = Field(
        {}, description="passed to the chat template (enable_thinking: false)"
    )
    add_generation_prompt: bool = Field(True, description="end the rendering where the assistant's turn begins")
    add_special_tokens: bool = Field(True, description="plain prompts without template: BOS as the tokenizer adds it")
    date: str | None = Field(
        None,
        json_schema_extra=omit_at(None),
        description="time at which a chat template that reads the clock is rendered (2026-01-31, or 2026-01-31T12:00:00); null:"
        " the day on which the run begins, which is kept for its resumes, forks and replays",
    )
    append_eos: bool = Field(True, description="end the tokens of a `completion` with the end of sequence")
    equal_ids: Literal["refuse", "leave_out", "rename"] = Field(
        "refuse",
        description="an id that a row of another split has too: `refuse` it; `leave_out` the row of the later split (eval"
        " comes first, then train, then warmup); `rename` it to SPLIT:ID there",
        json_schema_extra=omit_at("refuse"),
    )
    max_prompt_length: int = Field(1024, ge=1, description="tokens; longer prompts are left out and counted")
    max_teacher_prompt_length: int | None = Field(None, ge=1, description="the same for what the teacher reads")
    tokenizers: TokenizerPolicy = TokenizerPolicy()

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _TEMPLATE_ARGUMENTS:
            if name in value:
                raise ValueError(
                    f"chat_template_kwargs: {name!r} is set by this program, not by the template's arguments"
                )
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _iso_date(cls, value: Any) -> Any:
        if isinstance(value, date):  # YAML reads an unquoted date as one
            return value.isoformat()
        if isinstance(value, str):
            try:
                datetime.fromisoformat(value)
            except ValueError as error:
                raise ValueError(f"date: {value!r} is no date; write 2026-01-31 or 2026-01-31T12:00:00") from error
        return value

    @model_validator(mode="after")
    def _some_prompts(self) -> PrepareConfig:
        if not any(getattr(self, split) for split in SPLITS):
            raise ValueError("no prompts: give train, eval or warmup a source")
        return self

    def sources(self) -> dict[str, FileSource | AdditionSource]:
        """The configured splits, in order of precedence."""
        return {split: source for split in SPLITS if (source := getattr(self, split)) is not None}


def prepare_work(
    config: PrepareConfig,
    student_model: Artifact,
    teacher_model: Artifact | Mapping[str, Artifact] | None,
    *,
    mixed: bool = False,
    memo: Path | None = None,
    store: Store | None = None,
    contexts: Mapping[str, str] = NO_CONTEXTS,
) -> Work:
    """Work with the output `prepare`: tables `prompts` and `vocabulary`. `teacher_model`: the teacher, or several by name. Of
    several every prompt for training and evaluation names its own; `mixed`: all of them read every prompt.

    Content: `prompts:train` and so on (digest of the rows of each configured split) and `audit`; where prompts name their
    teachers also what `tasks.routing` lists, and audit and vocabulary by teacher (`audit:NAME`). Meta: prompts
    and `filtered` (by reason) per split, `warnings`, `longest_prompt` in tokens, `audit`. `memo`: folder that
    remembers hashes of unchanged files. `store`: where the models' folders are found; what versions up to 0.1.0 made of
    them otherwise gets another key. `contexts`: split -> template of what the teacher reads (tasks/inputs/contexts.py).
    Raises InputError for an unreadable source, here or when built."""
    identity = json.loads(canonical_json(config))
    if contexts:
        identity["contexts"] = dict(contexts)
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
        prepared = prepare(config, student, readers, context, mixed, contexts)
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


def prepare(
    config: PrepareConfig,
    student: Path,
    teachers: Mapping[str | None, Path],
    context: Context,
    mixed: bool = False,
    contexts: Mapping[str, str] = NO_CONTEXTS,
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
    readers: dict[str | None, _Reader] = {}
    for name, audit in audits.items():
        folder = teachers[name] if name in teachers else next(iter(teachers.values()))  # of a mixture any
        digest = tokenizer_digest(folder)
        loaded[digest] = loaded.get(digest) or load_tokenizer(folder)
        readers[name] = _Reader(loaded[digest], audit)
    renderer = _Renderer(config, own, readers)
    taken = _Taken(config.equal_ids)
    stops = set(audits[None].stop_ids) if None in audits else set()  # with several teachers nothing is merged
    columns: dict[str, list[Any]] = {name: [] for name in schema_for("prompts").names}
    filtered: dict[str, dict[str, int]] = {}
    warnings: list[str] = []
    for split, source in config.sources().items():
        template = contexts.get(split)
        rows, notes = read_rows(source, privileged_columns(template))
        if template is not None:
            rows = [replace(row, teacher_prompt=teacher_prompt(row, template)) for row in rows]
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
                for name, value in taken.add(split, row, prompt).items():
                    columns[name].append(value)
            if done % _BATCH == 0 or done == len(rows):
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
    )


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


@dataclass(frozen=True)
class _Prompt:
    """A row, rendered and tokenised."""

    text: str
    token_ids: list[int]
    teacher_token_ids: list[int] | None
    completion_token_ids: list[int] | None


def _refuse_inner_stop(row: Row, prompt: _Prompt, stops: set[int]) -> None:
    """InputError for a completion that has a merged stop id before its end: the student would learn it as an ordinary token."""
    if stops and prompt.completion_token_ids is not None:
        for place, token in enumerate(prompt.completion_token_ids[:-1]):
            if token in stops:
                raise InputError(
                    f"{row.where}: token {place} of its completion is the stop id {token}, before the completion's end. An"
                    " ordinary token there (a turn's end, say) cannot be merged with the stop ids; shorten the completion, or set"
                    " prompts.tokenizers.stop_ids: mask"
                )


@dataclass(frozen=True)
class _Reader:
    """A teacher: its tokenizer, and how that differs from the student's."""

    tokenizer: Any
    audit: TokenizerAudit

    @property
    def renders(self) -> bool:
        return self.audit.teacher_renders

    @property
    def tokenises(self) -> bool:
        """Otherwise both tokenizers give the same tokens."""
        return self.renders or self.audit.verdict == "masked"


class _Renderer:
    """Renders rows to texts and tokenises them. `teachers`: by name; None: the one that reads all prompts."""

    def __init__(self, config: PrepareConfig, student: Any, teachers: Mapping[str | None, _Reader]) -> None:
        self.config = config
        self.student = student
        self.teachers = teachers
        self.notes = _Notes()
        for side in (student, *(reader.tokenizer for reader in teachers.values() if reader.renders)):
            refuse_random(side)

    def _reader(self, row: Row) -> _Reader | None:
        """The teacher of a row; None where there is none."""
        return self.teachers.get(None) or self.teachers.get(row.teacher_id)

    def require_teacher(self, split: str, row: Row) -> None:
        """InputError where several teachers share the prompts, and the row names none of them. A row of the split `warmup` may
        name none."""
        if not self.teachers or None in self.teachers or row.teacher_id in self.teachers:
            return
        known = [name for name in self.teachers if name is not None]
        if row.teacher_id is not None:
            hint = did_you_mean(row.teacher_id, known, f"the teachers are {', '.join(known)}")
            raise InputError(f"{row.where}: teacher_id {row.teacher_id!r} is not the name of a teacher; {hint}")
        if split != "warmup":
            raise InputError(
                f"{row.where}: no teacher_id, but there are several teachers; each row of {split} names one of"
                f" {', '.join(known)} (prompts.{split}.columns: {{teacher_id: COLUMN}} reads another column)"
            )

    def render(self, rows: list[Row]) -> Iterator[tuple[Row, _Prompt]]:
        """Every row with its tokens, in order."""
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            texts = [self._text(row, row.prompt, self.student) for row in batch]
            token_ids = self._tokens(self.student, texts, batch)
            teacher_ids = self._teacher_tokens(batch, texts, token_ids)
            targets = self._completions(batch, texts)
            for index, row in enumerate(batch):
                self._note_bos(self.student, row, token_ids[index])
                reader = self._reader(row)
                if reader is not None and teacher_ids[index] is not None:
                    self._note_bos(reader.tokenizer, row, teacher_ids[index] or [])
                yield row, _Prompt(texts[index], token_ids[index], teacher_ids[index], targets[index])

    def _completions(self, rows: list[Row], texts: list[str]) -> list[list[int] | None]:
        """Tokens of the completions, as the student would have to write them after the prompt."""
        chosen = [index for index, row in enumerate(rows) if row.completion is not None]
        result: list[list[int] | None] = [None] * len(rows)
        if not chosen:
            return result
        end = [self.student.eos_token_id] if self.config.append_eos else []
        if end == [None]:
            raise InputError(
                f"{rows[chosen[0]].where}: append_eos: the student's tokenizer has no end of sequence to put after the"
                " completion; set prompts.append_eos: false"
            )
        pairs = [(texts[index], rows[index].completion or "") for index in chosen]
        for index, (tokens, whole) in zip(chosen, continued(self.student, pairs), strict=True):
            if not whole:
                self.notes.add(
                    "a token spans the end of the prompt and the beginning of the completion, so the completion was tokenised"
                    " alone; let one of them begin or end with a space or line break that belongs to it",
                    rows[index],
                )
            result[index] = tokens + end
        return result

    def _note_bos(self, tokenizer: Any, row: Row, ids: list[int]) -> None:
        bos = tokenizer.bos_token_id
        if bos is None:
            return
        plain = isinstance(row.prompt, str) and not self.config.chat_template
        if ids[:2] == [bos, bos]:
            adds = "the tokenizer adds another; set prompts.add_special_tokens: false"
            template = "the chat template adds another; remove it from the text"
            self.notes.add(f"the text begins with BOS ({tokenizer.bos_token!r}) and {adds if plain else template}", row)
        elif not plain and isinstance(row.prompt, str) and row.prompt.startswith(tokenizer.bos_token):
            self.notes.add(
                f"the prompt begins with BOS ({tokenizer.bos_token!r}) and is put into the chat template; if it is rendered"
                " already, set prompts.chat_template: false and prompts.add_special_tokens: false",
                row,
            )

    def too_long(self, prompt: _Prompt) -> str | None:
        """The reason to leave out a prompt that is too long, or None."""
        if len(prompt.token_ids) > self.config.max_prompt_length:
            return "overlong"
        limit = self.config.max_teacher_prompt_length
        if limit is not None and len(prompt.teacher_token_ids or prompt.token_ids) > limit:
            return "overlong for the teacher"
        return None

    def _text(self, row: Row, prompt: str | list[dict[str, Any]], tokenizer: Any) -> str:
        if isinstance(prompt, str) and not self.config.chat_template:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if tokenizer.chat_template is None:
            raise InputError(
                f"{row.where}: the tokenizer has no chat template; set prompts.chat_template: false and use plain prompts"
            )
        try:
            return render(
                tokenizer,
                messages,
                date=self.config.date,
                add_generation_prompt=self.config.add_generation_prompt,
                arguments=self.config.chat_template_kwargs,
            )
        except ClockRead as error:
            raise InputError(f"{row.where}: {error}") from error
        except Exception as error:  # jinja2's errors, and any other from a template's expressions
            raise InputError(f"{row.where}: the chat template rejects it ({type(error).__name__}: {error})") from error

    def _tokens(self, tokenizer: Any, texts: list[str], rows: list[Row]) -> list[list[int]]:
        """Token ids. Rendered templates contain BOS already; plain texts get the special tokens that the tokenizer adds."""
        plain = [isinstance(row.prompt, str) and not self.config.chat_template for row in rows]
        result: list[list[int]] = [[] for _ in texts]
        for special in (False, True):
            chosen = [index for index, raw in enumerate(plain) if (raw and self.config.add_special_tokens) == special]
            if chosen:
                ids = tokenizer([texts[index] for index in chosen], add_special_tokens=special).input_ids
                for index, tokens in zip(chosen, ids, strict=True):
                    result[index] = tokens
        return result

    def _teacher_tokens(self, rows: list[Row], texts: list[str], student: list[list[int]]) -> list[list[int] | None]:
        """The teacher's tokens where they differ from the student's, else None."""
        result: list[list[int] | None] = [None] * len(rows)
        for reader in self.teachers.values():
            mine = [i for i, row in enumerate(rows) if self._reader(row) is reader]
            wanted = [i for i in mine if reader.tokenises or rows[i].teacher_prompt is not None]
            if not wanted:
                continue
            renderer = reader.tokenizer if reader.renders else self.student
            own = {i: rows[i].teacher_prompt or rows[i].prompt for i in wanted}
            rendered = [
                texts[i]
                if renderer is self.student and rows[i].teacher_prompt is None
                else self._text(rows[i], own[i], renderer)
                for i in wanted
            ]
            tokens = self._tokens(reader.tokenizer, rendered, [rows[i] for i in wanted])
            for i, ids in zip(wanted, tokens, strict=True):
                result[i] = ids if ids != student[i] else None
        return result


class _Notes:
    """Warnings about rows, each once, with the first rows that it is about."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}

    def add(self, text: str, row: Row) -> None:
        self._rows.setdefault(text, []).append(row.where)

    def take(self) -> list[str]:
        """The warnings so far, and none of them a second time."""
        found = []
        for text, rows in self._rows.items():
            more = f" and {len(rows) - _SHOWN_ROWS:,} more rows" if len(rows) > _SHOWN_ROWS else ""
            found.append(f"{', '.join(rows[:_SHOWN_ROWS])}{more}: {text}")
        self._rows = {}
        return found


class _Taken:
    """Prompts taken so far, in all splits."""

    def __init__(self, equal_ids: str) -> None:
        self._equal_ids = equal_ids
        self._text: dict[str, tuple[str, str | None]] = {}  # rendered text -> split and teacher_id
        self._place: dict[str, tuple[str, str]] = {}  # prompt id -> its split and its place in the source

    def reason(self, split: str, row: Row, prompt: _Prompt) -> str | None:
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

    def add(self, split: str, row: Row, prompt: _Prompt) -> dict[str, Any]:
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
    shards = {name: _write(builder, name, getattr(prepared, name)) for name in ("prompts", "vocabulary")}
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
    renderer = _Renderer(config, tokenizer, {})
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
