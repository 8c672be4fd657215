"""Chat templates: rendering at a fixed time, and what in a template makes a rendering unrepeatable."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from storage.errors import InputError

_SHAPES: tuple[tuple[str, ...], ...] = (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"),
)  # fmt: skip
"""Roles of the conversations on which a template is tried."""
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
"""Jinja's own sources of randomness: the filter `random` and the function `lipsum`."""


_TWO_TIMES = ("2001-02-03T04:05:06", "2033-11-22T17:48:59")
"""Times that differ in every field that a template may print."""


class ClockRead(InputError):
    """A template printed the time, and no time was given."""


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    date: str | None,
    add_generation_prompt: bool = True,
    arguments: dict[str, Any] | None = None,
) -> str:
    """The text of a conversation. `arguments` are the template's own; `date` (ISO 8601) is the time that it reads.

    Raises ClockRead if the text depends on the time and `date` is None, and jinja2's errors."""

    def at(time: str) -> tuple[str, bool]:
        read = []

        def strftime_now(form: str) -> str:
            read.append(form)
            return datetime.fromisoformat(time).strftime(form)

        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            strftime_now=strftime_now,
            **(arguments or {}),
        )
        return str(text), bool(read)

    if date is not None:
        return at(date)[0]
    text, read = at(_TWO_TIMES[0])
    if read and at(_TWO_TIMES[1])[0] != text:
        raise ClockRead(
            "the chat template reads the clock, and this run has no date to render it at: it began with a version that"
            " recorded none, or the template reads the clock for some prompts only. Start a run under another --name with"
            " prompts.date set (2026-01-31)"
        )
    return text


def reads_clock(tokenizer: Any, arguments: dict[str, Any]) -> bool:
    """Whether the template gives another text at another time, tried on short conversations of several shapes."""
    for roles in _SHAPES if tokenizer.chat_template is not None else ():
        messages = [{"role": role, "content": f"{role} says x"} for role in roles]
        try:
            render(tokenizer, messages, date=None, arguments=arguments)
        except ClockRead:
            return True
        except Exception:  # not a shape for this template; its own prompts are reported when they are rendered
            continue
    return False


def refuse_random(tokenizer: Any) -> None:
    """InputError for a template that draws random values: its prompts could not be made a second time."""
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
        if found := _RANDOM.search(template):
            raise InputError(
                f"the chat template draws random values ({found.group().strip(' |(')}), so its prompts could not be made a"
                " second time; remove that from the template"
            )
