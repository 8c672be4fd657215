"""Renders the rows of prompt sources to texts with the models' chat templates, and tokenises them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import InputError, did_you_mean
from tasks.inputs.completions import continued
from tasks.inputs.prompts import PrepareConfig
from tasks.inputs.rows import Row
from tasks.inputs.templates import ClockRead, refuse_random, render
from tasks.inputs.tokenizers import TokenizerAudit

BATCH = 1_000
"""Rows that are tokenised together."""
_SHOWN_ROWS = 3


@dataclass(frozen=True)
class RenderedPrompt:
    """A row, rendered and tokenised."""

    text: str
    token_ids: list[int]
    teacher_token_ids: list[int] | None
    completion_token_ids: list[int] | None


@dataclass(frozen=True)
class Reader:
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


class Renderer:
    """Renders rows to texts and tokenises them. `teachers`: by name; None: the one that reads all prompts."""

    def __init__(self, config: PrepareConfig, student: Any, teachers: Mapping[str | None, Reader]) -> None:
        self.config = config
        self.student = student
        self.teachers = teachers
        self.notes = _Notes()
        for side in (student, *(reader.tokenizer for reader in teachers.values() if reader.renders)):
            refuse_random(side)

    def _reader(self, row: Row) -> Reader | None:
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

    def render(self, rows: list[Row]) -> Iterator[tuple[Row, RenderedPrompt]]:
        """Every row with its tokens, in order."""
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            texts = [self._text(row, row.prompt, self.student) for row in batch]
            token_ids = self._tokens(self.student, texts, batch)
            teacher_ids = self._teacher_tokens(batch, texts, token_ids)
            targets = self._completions(batch, texts)
            for index, row in enumerate(batch):
                self._note_bos(self.student, row, token_ids[index])
                reader = self._reader(row)
                if reader is not None and teacher_ids[index] is not None:
                    self._note_bos(reader.tokenizer, row, teacher_ids[index] or [])
                yield row, RenderedPrompt(texts[index], token_ids[index], teacher_ids[index], targets[index])

    def contexts(self, rows: list[Row]) -> list[list[int]]:
        """The tokens that the teacher reads of rows that have a teacher_prompt. InputError for one that has no teacher."""
        found = self._teacher_tokens(rows, [""] * len(rows), [[] for _ in rows])
        for row, ids in zip(rows, found, strict=True):
            if ids is None:
                raise InputError(f"{row.where}: it has no teacher, or no context")
        return [ids or [] for ids in found]

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

    def too_long(self, prompt: RenderedPrompt) -> str | None:
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
