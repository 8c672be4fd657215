"""Prompt sources: files of the user's, or a generator. Reads rows and checks their form, not their content."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from storage.artifacts.digests import file_sha256
from storage.errors import InputError
from storage.identity import Identity, canonical_json, digest_of, omit_at
from tasks.inputs.addition import AdditionSource, additions
from tasks.inputs.records import (
    PARQUET,
    arrow_batches,
    data_files,
    field_values,
    files_left_out,
    is_saved_dataset,
    json_records,
    plain_values,
    records,
)
from tasks.inputs.rows import (
    COLUMNS,
    KNOWN_ROLES,
    PRIVILEGED,
    SCALARS,
    DuplicateKeys,
    Row,
    is_messages_json,
    names_of,
    number_text,
    refuse_duplicate_keys,
    row_of,
)

if TYPE_CHECKING:
    import pyarrow as pa


class FileSource(Identity):
    """Rows of a JSONL or Parquet file, of a folder of these, or of a folder written by `datasets.save_to_disk`.

    Columns: prompt (text, or a list of messages) or messages (list of {role, content}, or its JSON); optionally answer, id,
    completion, teacher_prompt (text or messages), teacher_id, and for `teacher.context` solution and hint. Null, NaN and missing
    mean the same. In a folder, names that begin with a dot are left out."""

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
            if column not in COLUMNS + PRIVILEGED:
                known = ", ".join(COLUMNS + PRIVILEGED)
                raise ValueError(f"columns: {column!r} is not a column of prompts; columns: {known}")
        return value


PromptSource = Annotated[FileSource | AdditionSource, Field(discriminator="kind")]


READING = "reading"
"""Field of a source's identity: see `corrected`."""


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
    digest = digest_of(content)
    identity: dict[str, Any] = {"kind": "file", "content": digest, "columns": source.columns, "limit": source.limit}
    if source.last_turn_is_completion:
        identity["last_turn_is_completion"] = True
    if reading := corrected(source):
        identity[READING] = reading
    return identity


def read_rows(source: FileSource | AdditionSource, privileged: Sequence[str] = ()) -> tuple[list[Row], list[str]]:
    """All rows of a source, and warnings about unused columns. `privileged`: which of `PRIVILEGED` are read.

    Raises InputError, naming file and line (of Parquet and datasets: row), for malformed rows and undecodable text."""
    if isinstance(source, AdditionSource):
        named = ((f"addition {index}", values) for index, values in enumerate(additions(source)))
        return [row_of(where, values) for where, values in named], []
    ours = _wanted(source, privileged)
    rows: list[Row] = []
    seen: set[str] = set()
    tops = {name for theirs in ours.values() for name in (theirs, theirs.split(".")[0])}
    notes = _RowNotes()
    for where, values, names in records(source.path, ours):
        if source.limit is not None and len(rows) >= source.limit:
            break
        seen.update(names)
        if isinstance(values, DuplicateKeys) and values.keys_twice & tops:
            refuse_duplicate_keys(where, "", values)
        row = {column: _lookup(values, theirs) for column, theirs in ours.items()}
        rows.append(row_of(where, row, tuple(names), source.last_turn_is_completion, source.columns))
        notes.look(rows[-1])
    if not rows:
        raise InputError(f"{source.path}: no rows; it needs at least one, with a prompt or messages")
    for column, theirs in source.columns.items():
        if theirs not in seen and theirs.split(".")[0] not in seen:
            raise InputError(
                f"{source.path}: no row has the column {theirs!r} (columns.{column}); found {names_of(seen)}"
            )
    unread = [f"{source.path}: column {name!r} is not read" for name in sorted(seen - tops)]
    return rows, [*unread, *notes.texts(), *files_left_out(source.path)]


class _RowNotes:
    """What in rows is allowed, and probably not meant; each with the first row."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def look(self, row: Row) -> None:
        if isinstance(row.prompt, str):
            if is_messages_json(row.prompt):
                text = "prompt is the JSON of messages, and is used as text; columns: {messages: prompt} makes it a conversation"
                self._first.setdefault(text, row.where)
            return
        for message in row.prompt:
            if message["role"] not in KNOWN_ROLES:
                text = f"the role {message['role']!r} is none of {', '.join(KNOWN_ROLES)}; the template may not know it"
                self._first.setdefault(text, row.where)

    def texts(self) -> list[str]:
        return [f"{where}: {text}" for text, where in self._first.items()]


def corrected(source: FileSource) -> list[str]:
    """What of a source is read in another way than by version 0.1.0, which entered no key: `columns` (a column that `columns`
    gives to another one was read under its own name too), `nulls` (Arrow's nulls in tool calls were kept), `numbers` (integral
    doubles, NaN and single-precision numbers). Empty for most sources; their keys stay."""
    found = set()
    ours = _wanted(source)
    if {"answer", "id", "completion", "teacher_prompt", "teacher_id"} - ours.keys():
        found.add("columns")
    if source.path.is_dir() and is_saved_dataset(source.path):
        found |= _corrected_arrow(source, ours, source.path)
    else:
        for file in data_files(source.path):
            found |= (
                _corrected_arrow(source, ours, file)
                if file.suffix.lower() in PARQUET
                else _corrected_json(source, ours, file)
            )
    return sorted(found)


def _corrected_arrow(source: FileSource, ours: Mapping[str, str], path: Path) -> set[str]:
    import pyarrow as pa

    found, rows = set(), 0
    for batch, _ in arrow_batches(path, ours):
        if source.limit is not None:
            batch = batch.slice(0, max(0, source.limit - rows))
        rows += batch.num_rows
        for column, theirs in ours.items():
            top, *parts = [theirs] if theirs in batch.column_names else theirs.split(".")
            values = field_values(batch[top], parts) if top in batch.column_names else None
            if values is None:
                continue
            if column in SCALARS and pa.types.is_floating(values.type):
                pairs = zip(values.to_pylist(), plain_values(column, values), strict=True)
                if any(old is not None and str(old) != number_text(new) for old, new in pairs):
                    found.add("numbers")
            if column in ("messages", "teacher_prompt") and _has_nested_nulls(values.combine_chunks()):
                found.add("nulls")
    return found


def _corrected_json(source: FileSource, ours: Mapping[str, str], path: Path) -> set[str]:
    names = [ours[column] for column in SCALARS if column in ours]
    keys = {key for name in names for key in (name, name.rpartition(".")[2])}
    spelled = b"|".join(re.escape(json.dumps(key, ensure_ascii=False).encode()) for key in sorted(keys))
    number = re.compile(b"(?:" + spelled + rb")\s*:\s*-?(?:\d+\.\d|\d+[eE]|NaN|Infinity)")
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            return set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if number.search(content) is None:
                return set()
    for count, (_, values, _) in enumerate(json_records(path)):
        if source.limit is not None and count >= source.limit:
            break
        floats = (value for name in names if isinstance(value := _lookup(values, name), float))
        if any(str(value) != number_text(value) for value in floats):
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


def _wanted(source: FileSource, privileged: Sequence[str] = ()) -> dict[str, str]:
    """Our column -> its name in the file. A name that `columns` gives to another column is not read under its own as well."""
    given = set(source.columns.values())
    return {
        column: source.columns.get(column, column)
        for column in (*COLUMNS, *privileged)
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
