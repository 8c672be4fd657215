"""`teacher.context`: a template over the columns of a prompt that makes what the teacher reads in the prompt's place, with
information that the student does not get (a solution, a hint).

The text becomes a user's turn. It never comes behind the generation prompt, so student and teacher both read a completion from
the beginning of the assistant's turn, and its tokens are the same for both."""

from __future__ import annotations

import string
from typing import Any

from storage.errors import InputError, did_you_mean
from tasks.inputs.rows import PRIVILEGED, Row

COLUMNS = ("prompt", "answer", *PRIVILEGED)
"""What a template can name."""


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
            raise ValueError(f"context: {{{name}}} is no column of the prompts; {hint}")
        found[name] = None
    return tuple(found)


def privileged_columns(template: str | None) -> tuple[str, ...]:
    """The columns that a source must be read for because of the template."""
    return () if template is None else tuple(name for name in columns_of(template) if name in PRIVILEGED)


def teacher_prompt(row: Row, template: str) -> str | list[dict[str, Any]]:
    """What the teacher reads in the place of the row's prompt.

    The template's text is the last user's turn; `{prompt}` is what that turn was. A template without `{prompt}` is put below
    that turn's text, after an empty line. A system prompt and earlier turns stay as they are. InputError by row: a column is
    null or blank, the row has a teacher_prompt of its own, or its conversation does not end with a user's turn."""
    if row.teacher_prompt is not None:
        raise InputError(
            f"{row.where}: has a teacher_prompt, and teacher.context makes one; remove the column or the context"
        )
    last = {"role": "user", "content": row.prompt} if isinstance(row.prompt, str) else row.prompt[-1]
    if last["role"] != "user":
        raise InputError(
            f"{row.where}: teacher.context is put into the user's turn before the completion, but the conversation ends with"
            f" a turn of {last['role']!r}; give such rows a teacher_prompt instead"
        )
    names = columns_of(template)
    values: dict[str, str] = {"prompt": last["content"]}
    for name in names:
        if name == "prompt":
            continue
        value = getattr(row, name)
        if value is None or not value.strip():
            raise InputError(
                f"{row.where}: teacher.context uses {{{name}}}, which is missing here; give every row of train and eval one (the"
                f" source's columns: {{{name}: NAME}} says what it is called), or remove it from the template. Without a KL in"
                " the evaluation (evaluate.kl_prompts: 0) eval needs none"
            )
        values[name] = value
    text = template.format(**values)
    if "prompt" not in names:
        text = f"{last['content']}\n\n{text}"
    return text if isinstance(row.prompt, str) else [*row.prompt[:-1], {**last, "content": text}]
