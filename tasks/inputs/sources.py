"""Prompt sources: files of the user's, or a generator. Reads rows and checks their form, not their content."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from storage.artifacts.digests import file_sha256
from storage.errors import RELATIVE, InputError
from storage.identity import Identity, canonical_json, omit_at
from tasks.inputs.addition import AdditionSource, additions

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("prompt", "messages", "answer", "id", "completion", "teacher_prompt", "teacher_id")
_SCALARS = ("answer", "id", "teacher_id")
"""Columns whose numbers are written as text."""
_CONVERSATIONS = ("prompt", "messages", "teacher_prompt")
"""Columns that may hold a list of messages."""
_USUAL_NAMES = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat"),
    "prompt": ("question", "problem", "instruction", "query", "input", "text"),
}
"""Names that other programs give to our columns; errors suggest them for `columns`."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""Roles of ShareGPT's messages (`from`, `value`) that have another name here."""
_JSONL, _PARQUET = (".jsonl", ".ndjson"), (".parquet",)
_BATCH_ROWS = 1000
_SHOWN = 80
_LARGEST_WRITTEN = 1e22
"""Integral doubles up to here are written with all digits."""


class FileSource(Identity):
    """Rows of a JSONL or Parquet file, of a folder of these, or of a folder written by `datasets.save_to_disk`.

    Columns: prompt (text, or a list of messages) or messages (list of {role, content}, or its JSON); optionally answer, id,
    completion, teacher_prompt (text or messages), teacher_id. Null, NaN and missing mean the same. In a folder, names that
    begin with a dot are left out."""

    kind: Literal["file"] = "file"
    path: Path = Field(description="file or folder; its content, not its path, enters the identity")
    columns: dict[str, str] = Field(
        {},
        description="our name -> name in the file, where they differ (prompt: question; answer: reward_model.ground_truth for"
        " a nested one); a column of the file that is named here is not read under its own name as well",
    )
    limit: int | None = Field(None, ge=1, description="read the first rows only")
    last_turn_is_completion: bool = Field(
        False,
        description="of a conversation that ends with an assistant's turn, that turn is the completion (ShareGPT)",
        json_schema_extra=omit_at(False),
    )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for column in value:
            if column not in COLUMNS:
                raise ValueError(f"columns: {column!r} is not a column of prompts; columns: {', '.join(COLUMNS)}")
        return value


_CONVERT = {
    ".json": "; write one JSON object per line: jq -c '.[]' FILE.json > FILE.jsonl (or rename it where it has that form)",
    ".csv": "; convert it: python -c \"import pandas; pandas.read_csv('FILE.csv').to_parquet('FILE.parquet')\"",
    ".gz": "; unpack it first",
    ".zst": "; unpack it first",
}
PromptSource = Annotated[FileSource | AdditionSource, Field(discriminator="kind")]


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


def source_identity(source: FileSource | AdditionSource, memo: Path | None = None) -> dict[str, Any]:
    """The source's part of a key: a generator's fields; for files their content instead of their path.

    Raises InputError if there is nothing readable at the path."""
    if isinstance(source, AdditionSource):
        return dict(json.loads(canonical_json(source)))
    files = data_files(source.path)
    base = source.path if source.path.is_dir() else source.path.parent
    listing = {file.relative_to(base).as_posix(): file_sha256(file, memo) for file in files}
    # The name of a single file is left out; in a folder the names determine the order.
    content = list(listing.values()) if source.path.is_file() else listing
    digest = hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()
    identity: dict[str, Any] = {"kind": "file", "content": digest, "columns": source.columns, "limit": source.limit}
    if source.last_turn_is_completion:
        identity["last_turn_is_completion"] = True
    if reading := corrected(source):
        identity["reading"] = reading
    return identity


def data_files(path: Path) -> list[Path]:
    """The files to read, in order. InputError if there are none or their type is unknown."""
    if not path.exists():
        raise InputError(f"{path}: no such prompt file or folder; {RELATIVE}")
    if path.is_file():
        if path.suffix not in _JSONL + _PARQUET:
            raise InputError(
                f"{path}: expected .jsonl or .parquet (or a dataset folder), found {path.suffix!r}{_CONVERT.get(path.suffix, '')}"
            )
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
        raise InputError(f"{path}: has several splits ({splits}); use the folder of one of them")
    patterns = ("*.arrow",) if _saved_dataset(path) else ("*.parquet", "*.jsonl", "*.ndjson")
    files = sorted({file for pattern in patterns for file in path.rglob(pattern) if file.is_file()})
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise InputError(f"{path}: no .parquet or .jsonl in this folder, and no dataset saved with save_to_disk")
    return files


def read_rows(source: FileSource | AdditionSource) -> tuple[list[Row], list[str]]:
    """All rows of a source, and warnings about unused columns.

    Raises InputError, naming file and line (of Parquet and datasets: row), for malformed rows and undecodable text."""
    if isinstance(source, AdditionSource):
        named = ((f"addition {index}", values) for index, values in enumerate(additions(source)))
        return [_row(where, values) for where, values in named], []
    ours = _wanted(source)
    rows: list[Row] = []
    seen: set[str] = set()
    for where, values, names in _records(source.path, ours):
        if source.limit is not None and len(rows) >= source.limit:
            break
        seen.update(names)
        row = {column: _lookup(values, theirs) for column, theirs in ours.items()}
        rows.append(_row(where, row, tuple(names), source.last_turn_is_completion))
    if not rows:
        raise InputError(f"{source.path}: no rows")
    for column, theirs in source.columns.items():
        if theirs not in seen and theirs.split(".")[0] not in seen:
            raise InputError(
                f"{source.path}: no row has the column {theirs!r} (columns.{column}); found {_names(seen)}"
            )
    read = {name for theirs in ours.values() for name in (theirs, theirs.split(".")[0])}
    return rows, [f"{source.path}: column {name!r} is not read" for name in sorted(seen - read)]


def corrected(source: FileSource) -> list[str]:
    """What of a source is read in another way than by version 0.1.0, which entered no key: `columns` (a column that `columns`
    gives to another one was read under its own name too), `nulls` (Arrow's nulls in tool calls were kept), `numbers` (integral
    doubles, NaN and single-precision numbers). Empty for most sources; their keys stay."""
    found = set()
    ours = _wanted(source)
    if {"answer", "id", "completion", "teacher_prompt", "teacher_id"} - ours.keys():
        found.add("columns")
    if source.path.is_dir() and _saved_dataset(source.path):
        found |= _corrected_arrow(source, ours, source.path)
    else:
        for file in data_files(source.path):
            found |= (
                _corrected_arrow(source, ours, file) if file.suffix in _PARQUET else _corrected_json(source, ours, file)
            )
    return sorted(found)


def _corrected_arrow(source: FileSource, ours: Mapping[str, str], path: Path) -> set[str]:
    import pyarrow as pa

    found, rows = set(), 0
    for batch, _ in _arrow_batches(path, ours):
        if source.limit is not None:
            batch = batch.slice(0, max(0, source.limit - rows))
        rows += batch.num_rows
        for column, theirs in ours.items():
            if theirs not in batch.column_names:
                continue
            values = batch[theirs]
            if column in _SCALARS and pa.types.is_floating(values.type):
                pairs = zip(values.to_pylist(), _plain_values(column, values), strict=True)
                if any(old is not None and str(old) != _number(new) for old, new in pairs):
                    found.add("numbers")
            if column in ("messages", "teacher_prompt") and _has_nested_nulls(values.combine_chunks()):
                found.add("nulls")
    return found


def _corrected_json(source: FileSource, ours: Mapping[str, str], path: Path) -> set[str]:
    names = [ours[column] for column in _SCALARS if column in ours]
    spelled = b"|".join(re.escape(json.dumps(name, ensure_ascii=False).encode()) for name in names)
    number = re.compile(b"(?:" + spelled + rb")\s*:\s*-?(?:\d+\.\d|\d+[eE]|NaN|Infinity)")
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            return set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if number.search(content) is None:
                return set()
    for count, (_, values, _) in enumerate(_json_records(path)):
        if source.limit is not None and count >= source.limit:
            break
        floats = (value for name in names if isinstance(value := values.get(name), float))
        if any(str(value) != _number(value) for value in floats):
            return {"numbers"}
    return set()


def _has_nested_nulls(values: pa.Array) -> bool:
    """Whether messages hold a struct with a null field, or a map, below their own fields."""
    import pyarrow as pa

    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return False
    messages = values.flatten()
    return pa.types.is_struct(messages.type) and any(_has_nulls(field) for field in messages.flatten())


def _has_nulls(values: pa.Array) -> bool:
    """Whether a struct in here has a null field, or a map is in here."""
    import pyarrow as pa

    if pa.types.is_struct(values.type):
        present = values.drop_null()
        return any(field.null_count > 0 or _has_nulls(field) for field in present.flatten())
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return _has_nulls(values.flatten())
    return pa.types.is_map(values.type) and len(values.drop_null()) > 0


def _wanted(source: FileSource) -> dict[str, str]:
    """Our column -> its name in the file. A name that `columns` gives to another column is not read under its own as well."""
    given = set(source.columns.values())
    return {
        column: source.columns.get(column, column)
        for column in COLUMNS
        if column in source.columns or column not in given
    }


def _lookup(values: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a field of a nested one (`reward_model.ground_truth`)."""
    if name in values:
        return values[name]
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _names(columns: set[str] | tuple[str, ...]) -> str:
    """Names of columns, sorted, printable."""
    return ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in sorted(columns)) or "none"


def _saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _records(path: Path, ours: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any], Sequence[str]]]:
    """(place, values, names of all columns) of every row. Of Arrow's tables only the wanted columns are read."""
    if path.is_dir() and _saved_dataset(path):
        yield from _arrow_records(path, ours)
        return
    for file in data_files(path):
        yield from _arrow_records(file, ours) if file.suffix in _PARQUET else _json_records(file)


def _arrow_batches(path: Path, ours: Mapping[str, str]) -> Iterator[tuple[pa.Table, Sequence[str]]]:
    """(the wanted columns, names of all columns) of a Parquet file or a saved dataset, batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def wanted(names: Sequence[str]) -> list[str]:
        theirs = set(ours.values())
        chosen = [name for name in names if name in theirs or any(one.startswith(f"{name}.") for one in theirs)]
        return chosen or list(names[:1])  # rows without columns have no count

    try:
        if path.is_dir():
            import datasets

            dataset = datasets.load_from_disk(str(path))
            chosen = dataset.select_columns(wanted(dataset.column_names)).with_format("arrow")
            for batch in chosen.iter(_BATCH_ROWS):
                yield batch, dataset.column_names
            return
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted(names)):
            yield pa.Table.from_batches([batch]), names
    except (pa.ArrowException, OSError) as error:
        kind = "dataset" if path.is_dir() else "Parquet file"
        raise InputError(f"{path}: not a readable {kind} ({error})") from error


def _arrow_records(path: Path, ours: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any], Sequence[str]]]:
    start, role = 0, {theirs: column for column, theirs in ours.items()}
    for batch, names in _arrow_batches(path, ours):
        columns: dict[str, list[Any]] = {}
        for name in batch.column_names:
            try:
                columns[name] = _plain_values(role.get(name, ""), batch[name])
            except UnicodeDecodeError:
                raise _not_utf8(path, start, name, batch[name]) from None
        for index in range(batch.num_rows):
            yield f"{path}, row {start + index}", {name: values[index] for name, values in columns.items()}, names
        start += batch.num_rows


def _plain_values(column: str, values: pa.ChunkedArray) -> list[Any]:
    """An Arrow column as Python values. Numbers in single precision keep their own digits, and structs lose the fields that
    Arrow added because another row has them: it stores one set of fields for all rows, and null where a row lacks one."""
    import numpy as np
    import pyarrow as pa

    found = values.to_pylist(maps_as_pydicts="strict")
    if column in _SCALARS and (pa.types.is_float32(values.type) or pa.types.is_float16(values.type)):
        single = np.float32 if pa.types.is_float32(values.type) else np.float16
        return [None if value is None else float(str(single(value))) for value in found]
    return [_without_nulls(value) for value in found] if column in _CONVERSATIONS else found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _not_utf8(path: Path, start: int, name: str, values: pa.ChunkedArray) -> InputError:
    for index, value in enumerate(values):
        try:
            value.as_py()
        except UnicodeDecodeError as error:
            character = len(error.object[: error.start].decode("utf-8"))
            found = f"byte 0x{error.object[error.start]:02x}"
            return InputError(f"{path}, row {start + index}: {name}: {_undecodable(character, found)}")
    return InputError(f"{path}: {name}: not UTF-8")


def _undecodable(character: int, found: str) -> str:
    return f"character {character} is {found}, which is not valid Unicode text; repair or remove this row"


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any], Sequence[str]]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{where}: the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                values = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error}), found {_show(line)}") from error
            if not isinstance(values, dict):
                raise InputError(f"{where}: every line must be a JSON object, found {_show(line)}")
            yield where, values, tuple(values)


def _row(where: str, values: Mapping[str, Any], found: tuple[str, ...] = (), split_last: bool = False) -> Row:
    values = {column: None if _is_nan(value) else value for column, value in values.items()}
    for column, value in values.items():
        _refuse_undecodable(where, column, value)
    prompt, messages = values.get("prompt"), values.get("messages")
    if prompt is not None and messages is not None:
        raise InputError(f"{where}: has both a prompt and messages; keep one of them")
    if prompt is None and messages is None:
        raise InputError(f"{where}: neither a prompt nor messages; found {_names(found)}{_way_out(found)}")
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise InputError(f"{where}: prompt must be text or a list of messages, found {_show(prompt)}")
    completion = _completion(where, values.get("completion"))
    if not isinstance(prompt, str):
        column, given = ("messages", messages) if prompt is None else ("prompt", prompt)
        prompt = _messages(where, column, given)
        if prompt[-1]["role"] == "assistant":
            prompt, completion = _split_last(where, column, prompt, completion, split_last)
    teacher = values.get("teacher_prompt")
    if not isinstance(teacher, (str, type(None))) or _is_messages_json(teacher):
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
            raise InputError(f"{where}: {column}: {_undecodable(error.start, what)}") from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_undecodable(where, f"{column}, a name", name)
            _refuse_undecodable(where, f"{column}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse_undecodable(where, f"{column}[{index}]", item)


def _way_out(found: tuple[str, ...]) -> str:
    """What to set where a column of the file looks like one of ours."""
    for ours, usual in _USUAL_NAMES.items():
        for name in usual:
            if name in found:
                more = ", last_turn_is_completion: true where they end with an answer" if ours == "messages" else ""
                return f"; name the column in the source: columns: {{{ours}: {name}}}{more}"
    return "; name the column in the source: columns: {prompt: NAME} or {messages: NAME}" if found else ""


def _is_messages_json(value: Any) -> bool:
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
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: {column} is text but not JSON ({error}), found {_show(value)}") from error
        _refuse_undecodable(where, column, value)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {column} must be a list of messages, found {_show(value)}")
    return [_message(where, f"{column}[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, place: str, message: Any) -> dict[str, Any]:
    """A message with a role and a text content. Fields that are null are left out."""
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
        role = _ROLES.get(message["from"], message["from"])
        message = {"role": role, "content": message.get("value"), **_rest(message, "from", "value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where}: {place} must have a role and a text content, found {_show(message)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined(where, f"{place}.content", content)
    if not isinstance(content, str):
        raise InputError(f"{where}: {place} must have a role and a text content, found {_show(message)}")
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
                f"{where}: {place}[{index}] must be a part of type text, found {_show(part)}; only text is read"
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
    if len(messages) == 1 or "tool_calls" in messages[-1]:
        what = "is nothing but an assistant's turn" if len(messages) == 1 else "ends with tool calls, which are no text"
        raise InputError(f"{where}: {column} {what}; remove this row")
    return messages[:-1], messages[-1]["content"]


def _completion(where: str, value: Any) -> str | None:
    """Text, or the text of a list with one message of the assistant's."""
    if isinstance(value, list) and len(value) == 1:
        message = _message(where, "completion[0]", value[0])
        if message["role"] == "assistant" and "tool_calls" not in message:
            return str(message["content"])
    return _text(where, "completion", value)


def _text(where: str, column: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{where}: {column} must be text, found {_show(value)}")


def _scalar(where: str, column: str, value: Any) -> str | None:
    if isinstance(value, bool):
        raise InputError(f"{where}: {column} must be text or a number, found {_show(value)}; write it as text")
    if isinstance(value, (int, float, Decimal)):
        return _number(value)
    return _text(where, column, value)


def _number(value: float | Decimal | None) -> str | None:
    """A number as text, an integral one without a point (a column of integers with a missing one becomes doubles); None for
    NaN and infinities, which mark missing values."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int) or (value == int(value) and abs(float(value)) < _LARGEST_WRITTEN):
        return str(int(value))
    return format(value.normalize(), "f") if isinstance(value, Decimal) else str(value)


def _show(value: Any) -> str:
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
