"""`teacher.context`: templates that make what the teacher reads in the prompt's place, with information that the student does not
get: a solution or a hint of the prompt, a correct sibling of the sample, feedback on it.

The text becomes a user's turn. It never comes behind the generation prompt, so student and teacher both read a completion from
the beginning of the assistant's turn, and its tokens are the same for both.

A single template over the columns of prompts is rendered by `prepare`, once. Where a template names a column that only the round
knows, and where there are several templates, the stage `context` renders one of them for each sample (tasks/context.py)."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from storage.errors import InputError, did_you_mean
from storage.identity import Identity
from tasks.inputs.rows import PRIVILEGED, Row

OF_PROMPTS = ("prompt", "answer", *PRIVILEGED)
OF_ROUNDS = ("sibling", "feedback", "verdict")
"""Columns that only the round knows: a correct completion of the same prompt, the judge's text, correct or incorrect."""
COLUMNS = (*OF_PROMPTS, *OF_ROUNDS)
"""What a template can name."""
JUDGED = frozenset(OF_ROUNDS)
"""Columns that need the judge's rewards or feedback."""
NOTHING: Mapping[str, str] = {}


class SiblingConfig(Identity):
    """Which completion {sibling} is: one of the same prompt and round that is correct (judge.success_threshold), another sample,
    and not the same text. Where the first does not fit into the teacher's context the next one is taken."""

    rule: Literal["first", "draw"] = Field(
        "first",
        description="first: the lowest sample_index (SDPO, SRPO); draw: an order of its own for every sample, from the seed",
    )
    strip_thinking: bool = Field(
        True, description="without what stands between <think> and </think>; one that is nothing else is no sibling"
    )


DEFAULT_THRESHOLD = 0.5


def columns_of(template: str) -> tuple[str, ...]:
    """The columns that a template names, in order. ValueError for an unknown one, and for what is no `{column}`."""
    found: dict[str, None] = {}
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"context: {template!r} is no template ({error}); write a literal brace as {{{{ or }}}}"
        ) from None
    for _, name, format, conversion in parts:
        if name is None:
            continue
        if name not in COLUMNS or format or conversion:
            hint = did_you_mean(
                name, COLUMNS, f"columns are {', '.join(COLUMNS)}; write a literal brace as {{{{ or }}}}"
            )
            raise ValueError(f"context: {{{name}}} is no column of the prompts or of the round; {hint}")
        found[name] = None
    return tuple(found)


def templates_of(context: str | Sequence[str] | None) -> tuple[str, ...]:
    """The templates of a `teacher.context`, in order."""
    return () if context is None else (context,) if isinstance(context, str) else tuple(context)


def per_sample(context: str | Sequence[str] | None) -> bool:
    """Whether the samples of a round have contexts of their own, made by the stage `context`."""
    several = context is not None and not isinstance(context, str)
    return several or bool(named_in(templates_of(context)) & JUDGED)


def named_in(templates: Sequence[str]) -> set[str]:
    """All columns that any of the templates names."""
    return {name for template in templates for name in columns_of(template)}


def kept_columns(templates: Sequence[str]) -> dict[str, bool]:
    """The columns of prompts that the stage `context` reads, beside the prompt itself -> whether every template names them, so
    that every row needs them."""
    each = [set(columns_of(template)) for template in templates]
    names = [name for name in OF_PROMPTS if name != "prompt" and any(name in of for of in each)]
    return {name: all(name in of for of in each) for name in names}


def privileged_columns(template: str | None) -> tuple[str, ...]:
    """The columns that a source must be read for because of the template."""
    return () if template is None else tuple(name for name in columns_of(template) if name in PRIVILEGED)


FIELD = "teacher.context"
"""Where the template of the only teacher is in a config."""


def users_turn(row: Row, field: str = FIELD) -> dict[str, Any]:
    """The turn that a context takes the place of. InputError by row, naming the template's `field`: it has a teacher_prompt of
    its own, or its conversation does not end with a user's turn."""
    if row.teacher_prompt is not None:
        raise InputError(f"{row.where}: has a teacher_prompt, and {field} makes one; remove the column or the context")
    last = {"role": "user", "content": row.prompt} if isinstance(row.prompt, str) else row.prompt[-1]
    if last["role"] != "user":
        raise InputError(
            f"{row.where}: {field} is put into the user's turn before the completion, but the conversation ends with"
            f" a turn of {last['role']!r}; give such rows a teacher_prompt instead"
        )
    return last


def lacking(row: Row, template: str, found: Mapping[str, str] = NOTHING) -> list[str]:
    """The columns that the template names and that neither the row nor `found` (those of the round) has; blank is missing."""
    values = {name: found.get(name) or getattr(row, name, None) for name in columns_of(template) if name != "prompt"}
    return [name for name, value in values.items() if value is None or not value.strip()]


def teacher_prompt(
    row: Row, template: str, found: Mapping[str, str] = NOTHING, field: str = FIELD
) -> str | list[dict[str, Any]]:
    """What the teacher reads in the place of the row's prompt. `found`: the columns of the round. `field`: the template's.

    The template's text is the last user's turn; `{prompt}` is what that turn was. A template without `{prompt}` is put below
    that turn's text, after an empty line. A system prompt and earlier turns stay as they are. InputError by row: a column is
    null or blank, and as `users_turn`."""
    last, names = users_turn(row, field), columns_of(template)
    if missing := lacking(row, template, found):
        raise missing_column(row, missing[0], field)
    values = {"prompt": last["content"]}
    values |= {name: found.get(name) or getattr(row, name) for name in names if name != "prompt"}
    text = template.format(**values)
    if "prompt" not in names:
        text = f"{last['content']}\n\n{text}"
    return text if isinstance(row.prompt, str) else [*row.prompt[:-1], {**last, "content": text}]


def missing_column(row: Row, name: str, field: str = FIELD) -> InputError:
    """The error about a row without a column that the template of `field` names."""
    return InputError(
        f"{row.where}: {field} uses {{{name}}}, which is missing here; give every row of train and eval one (the"
        f" source's columns: {{{name}: NAME}} says what it is called), or remove it from the template. Without a KL in"
        " the evaluation (evaluate.kl_prompts: 0) eval needs none"
    )


_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_OPENED_BEFORE = re.compile(r"\A(?:(?!<think>).)*?</think>", re.DOTALL)


def without_thinking(text: str) -> str:
    """The text without its thoughts. A thought that the prompt began ends with `</think>` alone, and one that was cut off has no
    end."""
    return _THOUGHT.sub("", _OPENED_BEFORE.sub("", text)).strip()
