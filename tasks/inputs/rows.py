"""Rows of prompts: the values of a record, checked and in one form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from storage.errors import InputError

COLUMNS = ("prompt", "messages", "answer", "id", "completion", "teacher_prompt", "teacher_id")
PRIVILEGED = ("solution", "hint")
"""Columns that are read only where `teacher.context` uses them."""
SCALARS = ("answer", "id", "teacher_id", *PRIVILEGED)
"""Columns whose numbers are written as text."""
CONVERSATIONS = ("prompt", "messages", "teacher_prompt")
"""Columns that may hold a list of messages."""
USUAL_NAMES = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat"),
    "prompt": ("question", "problem", "instruction", "query", "input", "text"),
}
"""Names that other programs give to our columns; errors suggest them for `columns`."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""Roles of ShareGPT's messages (`from`, `value`) that have another name here."""
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


_SHOWN = 80
_LARGEST_WRITTEN = 1e22
"""Integral doubles up to here are written with all digits."""


@dataclass(frozen=True)
class Row:
    """One prompt as read. `prompt` and `teacher_prompt` are text or a list of messages."""

    where: str
    """`file:line` or `file, row n`, for error messages."""
    prompt: str | list[dict[str, Any]]
    answer: str | None = None
    id: str | None = None
    completion: str | None = None
    teacher_prompt: str | list[dict[str, Any]] | None = None
    teacher_id: str | None = None
    solution: str | None = None
    hint: str | None = None


def names_of(columns: set[str] | tuple[str, ...]) -> str:
    """Names of columns, sorted, printable."""
    return ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in sorted(columns)) or "none"


def undecodable(character: int, found: str) -> str:
    return f"character {character} is {found}, which is not valid Unicode text; repair or remove this row"


class DuplicateKeys(dict[str, Any]):
    """A JSON object with a key that occurs twice. A reader keeps one of the values, and nobody knows whether the right one."""

    keys_twice: frozenset[str]


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = DuplicateKeys(found)
    twice.keys_twice = frozenset(name for name in names if names.count(name) > 1)
    return twice


def refuse_duplicate_keys(where: str, place: str, value: Any) -> None:
    if isinstance(value, DuplicateKeys):
        keys = ", ".join(repr(name) for name in sorted(value.keys_twice))
        raise InputError(f"{where}: {place or 'the row'} has the key {keys} twice; remove one of them")
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_duplicate_keys(where, f"{place}.{name}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            refuse_duplicate_keys(where, f"{place}[{index}]", item)


def row_of(
    where: str,
    values: Mapping[str, Any],
    found: tuple[str, ...] = (),
    split_last: bool = False,
    columns: Mapping[str, str] = {},
) -> Row:
    """A row from the values of our columns. `found`: the names that the file's row has; `columns`: names of the file for ours.

    Raises InputError, naming `where` and column, for a row without a prompt and for values of a wrong kind."""
    values = {column: None if _is_nan(value) else value for column, value in values.items()}
    for column, value in values.items():
        _refuse_undecodable(where, column, value)
        refuse_duplicate_keys(where, column, value)
        if isinstance(value, bytes):
            raise InputError(f"{where}: {column} is bytes, not text; cast the column to string")
    prompt, messages = values.get("prompt"), values.get("messages")
    if prompt is not None and messages is not None:
        raise InputError(f"{where}: has both a prompt and messages; keep one of them")
    if prompt is None and messages is None:
        raise InputError(f"{where}: {_without_prompt(found, columns)}")
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise InputError(f"{where}: prompt must be text or a list of messages, found {shown(prompt)}")
    completion = _completion(where, values.get("completion"))
    if not isinstance(prompt, str):
        column, given = ("messages", messages) if prompt is None else ("prompt", prompt)
        prompt = _messages(where, column, given)
        if prompt[-1]["role"] == "assistant":
            prompt, completion = _split_last(where, column, prompt, completion, split_last)
    teacher = values.get("teacher_prompt")
    if not isinstance(teacher, (str, type(None))) or is_messages_json(teacher):
        teacher = _messages(where, "teacher_prompt", teacher)
        if teacher[-1]["role"] == "assistant":
            raise InputError(f"{where}: teacher_prompt ends with an assistant's turn; end it with the turn before")
    return Row(
        where=where,
        prompt=prompt,
        answer=_scalar(where, "answer", values.get("answer")),
        id=_scalar(where, "id", values.get("id")),
        completion=completion,
        teacher_prompt=teacher,
        teacher_id=_scalar(where, "teacher_id", values.get("teacher_id")),
        solution=_scalar(where, "solution", values.get("solution")),
        hint=_scalar(where, "hint", values.get("hint")),
    )


def _is_nan(value: Any) -> bool:
    """NaN marks a missing value, also of a column of text (pandas)."""
    return isinstance(value, (float, Decimal)) and value != value


def _refuse_undecodable(where: str, column: str, value: Any) -> None:
    """InputError for text that UTF-8 cannot hold: half of a surrogate pair, or bytes that were no UTF-8."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            what = f"U+{code:04X} (half of a surrogate pair)"
            if 0xDC80 <= code <= 0xDCFF:
                what = f"byte 0x{code - 0xDC00:02x} (not UTF-8), or U+{code:04X} (half of a surrogate pair)"
            raise InputError(f"{where}: {column}: {undecodable(error.start, what)}") from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_undecodable(where, f"{column}, a name", name)
            _refuse_undecodable(where, f"{column}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse_undecodable(where, f"{column}[{index}]", item)


def _without_prompt(found: tuple[str, ...], columns: Mapping[str, str]) -> str:
    theirs = {columns.get(name, name): name for name in ("prompt", "messages")}
    if null := next((name for name in theirs if name in found), None):
        return f"its {null} is null; remove this row"
    if named := next((name for name, ours in theirs.items() if ours in columns), None):
        return f"it has no column {named!r} (columns.{theirs[named]}); found {names_of(found)}"
    return f"neither a prompt nor messages; found {names_of(found)}{_way_out(found)}"


def _way_out(found: tuple[str, ...]) -> str:
    """What to set where a column of the file looks like one of ours."""
    for ours, usual in USUAL_NAMES.items():
        for name in usual:
            if name in found:
                more = ", last_turn_is_completion: true where they end with an answer" if ours == "messages" else ""
                return f"; name the column in the source: columns: {{{ours}: {name}}}{more}"
    return "; name the column in the source: columns: {prompt: NAME} or {messages: NAME}" if found else ""


def is_messages_json(value: Any) -> bool:
    """Whether text is the JSON of a list of messages."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return False
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(items, list) and all(isinstance(item, dict) and "role" in item for item in items)


def _messages(where: str, column: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=json_object)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: {column} is text but not JSON ({error}), found {shown(value)}") from error
        _refuse_undecodable(where, column, value)
        refuse_duplicate_keys(where, column, value)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {column} must be a list of messages, found {shown(value)}")
    return [_message(where, f"{column}[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, place: str, message: Any) -> dict[str, Any]:
    """A message with a role and a text content. Fields that are null are left out."""
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
        role = message["from"].lower()
        role = ROLES.get(role, role)
        message = {"role": role, "content": message.get("value"), **_rest(message, "from", "value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where}: {place} must have a role and a text content, found {shown(message)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined(where, f"{place}.content", content)
    if not isinstance(content, str):
        raise InputError(f"{where}: {place} must have a role and a text content, found {shown(message)}")
    result = {"role": message["role"], "content": content, **_rest(message, "role", "content")}
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {place} has a value that JSON cannot hold ({error})") from error
    return {name: result[name] for name in (*message, "content") if name in result}


def _rest(message: dict[str, Any], *without: str) -> dict[str, Any]:
    return {name: item for name, item in message.items() if item is not None and name not in without}


def _joined(where: str, place: str, parts: list[Any]) -> str:
    """The text of a content that is given as a list of parts."""
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise InputError(
                f"{where}: {place}[{index}] must be a part of type text, found {shown(part)}; only text is read"
            )
        texts.append(text)
    return "".join(texts)


def _split_last(
    where: str, column: str, messages: list[dict[str, Any]], completion: str | None, allowed: bool
) -> tuple[list[dict[str, Any]], str]:
    """The conversation without its last turn, and that turn's text."""
    if not allowed:
        raise InputError(
            f"{where}: {column} ends with an assistant's turn; put that turn into completion, or set"
            " last_turn_is_completion: true in the source"
        )
    if completion is not None:
        raise InputError(f"{where}: has a completion, and {column} ends with an assistant's turn; keep one of them")
    if len(messages) == 1 or messages[-1].get("tool_calls"):
        what = "is nothing but an assistant's turn" if len(messages) == 1 else "ends with tool calls, which are no text"
        raise InputError(f"{where}: {column} {what}; remove this row")
    return messages[:-1], messages[-1]["content"]


def _completion(where: str, value: Any) -> str | None:
    """Text, or the text of a list with one message of the assistant's."""
    if isinstance(value, list) and len(value) == 1:
        message = _message(where, "completion[0]", value[0])
        if message["role"] == "assistant" and not message.get("tool_calls"):
            return str(message["content"])
    return _text(where, "completion", value)


def _text(where: str, column: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{where}: {column} must be text, found {shown(value)}")


def _scalar(where: str, column: str, value: Any) -> str | None:
    if isinstance(value, bool):
        raise InputError(f"{where}: {column} must be text or a number, found {shown(value)}; write it as text")
    if isinstance(value, (int, float, Decimal)):
        return number_text(value)
    return _text(where, column, value)


def number_text(value: float | Decimal | None) -> str | None:
    """A number as text, an integral one without a point (a column of integers with a missing one becomes doubles); None for
    NaN and infinities, which mark missing values."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int) or (value == int(value) and abs(float(value)) < _LARGEST_WRITTEN):
        return str(int(value))
    return format(value.normalize(), "f") if isinstance(value, Decimal) else str(value)


def shown(value: Any) -> str:
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
