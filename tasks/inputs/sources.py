"""Prompt sources: files of the user's, or a generator. Reads rows and checks their form, not their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from storage.artifacts.digests import file_sha256
from storage.errors import InputError
from storage.identity import Identity, canonical_json
from tasks.inputs.addition import AdditionSource, additions

COLUMNS = ("prompt", "messages", "answer", "id", "completion", "teacher_prompt", "teacher_id")
_JSONL, _PARQUET = (".jsonl", ".ndjson"), (".parquet",)
_SHOWN = 80


class FileSource(Identity):
    """Rows of a JSONL or Parquet file, of a folder of these, or of a folder written by `datasets.save_to_disk`.

    Columns: prompt (text) or messages (list of {role, content}, or its JSON); optionally answer, id, completion,
    teacher_prompt (text or messages), teacher_id. Null and missing mean the same."""

    kind: Literal["file"] = "file"
    path: Path = Field(description="file or folder; its content, not its path, enters the identity")
    columns: dict[str, str] = Field(
        {}, description="our name -> name in the file, where they differ (prompt: question)"
    )
    limit: int | None = Field(None, ge=1, description="read the first rows only")

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for column in value:
            if column not in COLUMNS:
                raise ValueError(f"columns: {column!r} is not a column of prompts; columns: {', '.join(COLUMNS)}")
        return value


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
    return {"kind": "file", "content": digest, "columns": source.columns, "limit": source.limit}


def data_files(path: Path) -> list[Path]:
    """The files to read, in order. InputError if there are none or their type is unknown."""
    if not path.exists():
        raise InputError(f"{path}: no such prompt file or folder (relative paths start from the working directory)")
    if path.is_file():
        if path.suffix not in _JSONL + _PARQUET:
            raise InputError(f"{path}: expected .jsonl or .parquet (or a dataset folder), found {path.suffix!r}")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
        raise InputError(f"{path}: has several splits ({splits}); use the folder of one of them")
    patterns = ("*.arrow",) if _saved_dataset(path) else ("*.parquet", "*.jsonl", "*.ndjson")
    files = sorted({file for pattern in patterns for file in path.rglob(pattern) if file.is_file()})
    if not files:
        raise InputError(f"{path}: no .parquet or .jsonl in this folder, and no dataset saved with save_to_disk")
    return files


def read_rows(source: FileSource | AdditionSource) -> tuple[list[Row], list[str]]:
    """All rows of a source, and warnings about unused columns.

    Raises InputError, naming file and line, for malformed rows."""
    if isinstance(source, AdditionSource):
        named = ((f"addition {index}", values) for index, values in enumerate(additions(source)))
        return [_row(where, values) for where, values in named], []
    ours = {column: source.columns.get(column, column) for column in COLUMNS}
    rows: list[Row] = []
    seen: set[str] = set()
    for where, values in _records(source.path):
        if source.limit is not None and len(rows) >= source.limit:
            break
        seen.update(values)
        rows.append(_row(where, {column: values.get(theirs) for column, theirs in ours.items()}, tuple(values)))
    if not rows:
        raise InputError(f"{source.path}: no rows")
    for column, theirs in source.columns.items():
        if theirs not in seen:
            raise InputError(
                f"{source.path}: no row has the column {theirs!r} (columns.{column}); found {_names(seen)}"
            )
    return rows, [f"{source.path}: column {name!r} is not read" for name in sorted(seen - set(ours.values()))]


def _names(columns: set[str]) -> str:
    return ", ".join(sorted(columns)) or "none"


def _saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.is_dir() and _saved_dataset(path):
        import datasets

        for index, values in enumerate(datasets.load_from_disk(str(path))):
            yield f"{path}, row {index}", values
        return
    for file in data_files(path):
        yield from _parquet_records(file) if file.suffix in _PARQUET else _json_records(file)


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                yield f"{path}, row {index}", values
                index += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                values = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error}), found {_show(line)}") from error
            if not isinstance(values, dict):
                raise InputError(f"{where}: every line must be a JSON object, found {_show(line)}")
            yield where, values


def _row(where: str, values: Mapping[str, Any], found: tuple[str, ...] = ()) -> Row:
    prompt, messages = values.get("prompt"), values.get("messages")
    if prompt is not None and messages is not None:
        raise InputError(f"{where}: has both a prompt and messages; keep one of them")
    if prompt is None and messages is None:
        raise InputError(f"{where}: neither a prompt nor messages; found {', '.join(found) or 'nothing'}")
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"{where}: prompt must be text, found {_show(prompt)}; put a conversation into messages")
    teacher = values.get("teacher_prompt")
    return Row(
        where=where,
        prompt=prompt if prompt is not None else _messages(where, "messages", messages),
        answer=_scalar(where, "answer", values.get("answer")),
        id=_scalar(where, "id", values.get("id")),
        completion=_text(where, "completion", values.get("completion")),
        teacher_prompt=teacher if teacher is None or _plain(teacher) else _messages(where, "teacher_prompt", teacher),
        teacher_id=_scalar(where, "teacher_id", values.get("teacher_id")),
    )


def _plain(value: Any) -> bool:
    return isinstance(value, str) and not value.lstrip().startswith("[{")


def _messages(where: str, column: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{where}: {column} is text but not JSON ({error}), found {_show(value)}") from error
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {column} must be a list of messages, found {_show(value)}")
    result = []
    for index, message in enumerate(value):
        good = isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        if not good:
            raise InputError(f"{where}: {column}[{index}] must have a role and a text content, found {_show(message)}")
        result.append({name: item for name, item in message.items() if item is not None})
    if result[-1]["role"] == "assistant":
        raise InputError(f"{where}: {column} ends with an assistant's turn; put that turn into completion")
    return result


def _text(where: str, column: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{where}: {column} must be text, found {_show(value)}")


def _scalar(where: str, column: str, value: Any) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _text(where, column, value)


def _show(value: Any) -> str:
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
