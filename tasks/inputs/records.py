"""Records of prompt files (JSONL, Parquet, saved datasets): which files a path stands for, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import RELATIVE, InputError
from tasks.inputs.rows import CONVERSATIONS, SCALARS, json_object, shown, undecodable

if TYPE_CHECKING:
    import pyarrow as pa

JSONL, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
_BATCH_ROWS = 1000


_CONVERT = {
    ".json": "; write one JSON object per line: jq -c '.[]' FILE.json > FILE.jsonl (or rename it where it has that form)",
    ".csv": "; convert it: python -c \"import pandas; pandas.read_csv('FILE.csv').to_parquet('FILE.parquet')\"",
    ".gz": "; unpack it first",
    ".zst": "; unpack it first",
}


def data_files(path: Path) -> list[Path]:
    """The files to read, in order. InputError if there are none or their type is unknown."""
    if not path.exists():
        raise InputError(f"{path}: no such prompt file or folder; {RELATIVE}")
    if path.is_file():
        if path.suffix.lower() not in JSONL + PARQUET:
            raise InputError(
                f"{path}: expected .jsonl or .parquet (or a dataset folder), found {path.suffix!r}"
                f"{_CONVERT.get(path.suffix.lower(), '')}"
            )
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
        raise InputError(f"{path}: has several splits ({splits}); use the folder of one of them")
    endings = (".arrow",) if is_saved_dataset(path) else JSONL + PARQUET
    files = sorted(file for file in _below(path) if file.suffix.lower() in endings)
    if not files:
        others = "".join(f"; {note.partition(': ')[2]}" for note in files_left_out(path))
        raise InputError(
            f"{path}: no .parquet or .jsonl in this folder, and no dataset saved with save_to_disk{others}"
        )
    return files


def files_left_out(path: Path) -> Iterator[str]:
    """Files of a folder that look like data, in formats that are not read."""
    if path.is_file() or is_saved_dataset(path):
        return
    found = [file for file in _below(path) if file.suffix.lower() in _CONVERT]
    for ending in dict.fromkeys(file.suffix.lower() for file in found):
        names = [file.relative_to(path).as_posix() for file in found if file.suffix.lower() == ending]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{path}: {names[0]}{more} is not read{_CONVERT[ending]}"


def _below(path: Path) -> list[Path]:
    """All files in a folder, also behind links to folders, names that begin with a dot left out. InputError for a link whose
    target is missing."""
    found: list[Path] = []
    entered: set[Path] = set()

    def walk(folder: Path) -> None:
        if folder.resolve() in entered:
            return
        entered.add(folder.resolve())
        for child in sorted(folder.iterdir()):
            if child.name.startswith("."):
                continue
            if child.is_symlink() and not child.exists():
                raise InputError(
                    f"{child}: a link whose target is missing ({child.readlink()}); restore it, or remove the link"
                )
            if child.is_dir():
                walk(child)
            elif child.is_file():
                found.append(child)

    walk(path)
    return found


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def records(path: Path, ours: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any], Sequence[str]]]:
    """(place, values, names of all columns) of every row. Of Arrow's tables only the wanted columns are read."""
    if path.is_dir() and is_saved_dataset(path):
        yield from _arrow_records(path, ours)
        return
    for file in data_files(path):
        yield from _arrow_records(file, ours) if file.suffix.lower() in PARQUET else json_records(file)


def arrow_batches(path: Path, ours: Mapping[str, str]) -> Iterator[tuple[pa.Table, Sequence[str]]]:
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
    for batch, names in arrow_batches(path, ours):
        columns: dict[str, list[Any]] = {}
        for name in batch.column_names:
            try:
                columns[name] = plain_values(role.get(name, ""), batch[name])
                for theirs, column in role.items():
                    if theirs.startswith(f"{name}.") and theirs not in batch.column_names:
                        field = field_values(batch[name], theirs.split(".")[1:])
                        if field is not None:
                            columns[theirs] = plain_values(column, field)
            except UnicodeDecodeError:
                raise _not_utf8(path, start, name, batch[name]) from None
        for index in range(batch.num_rows):
            yield f"{path}, row {start + index}", {name: values[index] for name, values in columns.items()}, names
        start += batch.num_rows


def field_values(values: pa.ChunkedArray, parts: Sequence[str]) -> pa.ChunkedArray | None:
    """A field inside a column of structs, null where a struct above it is; None where the type has no such field."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for part in parts:
        if not pa.types.is_struct(values.type) or values.type.get_field_index(part) < 0:
            return None
        values = pc.struct_field(values, part)
    return values


def plain_values(column: str, values: pa.ChunkedArray) -> list[Any]:
    """An Arrow column as Python values. Numbers in single precision keep their own digits, and structs lose the fields that
    Arrow added because another row has them: it stores one set of fields for all rows, and null where a row lacks one."""
    import numpy as np
    import pyarrow as pa

    found = values.to_pylist(maps_as_pydicts="strict")
    if column in SCALARS and (pa.types.is_float32(values.type) or pa.types.is_float16(values.type)):
        single = np.float32 if pa.types.is_float32(values.type) else np.float16
        return [None if value is None else float(str(single(value))) for value in found]
    return [_without_nulls(value) for value in found] if column in CONVERSATIONS else found


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
            return InputError(f"{path}, row {start + index}: {name}: {undecodable(character, found)}")
    return InputError(f"{path}: {name}: not UTF-8")


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any], Sequence[str]]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{where}: the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                values = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=json_object)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error}), found {shown(line)}") from error
            if not isinstance(values, dict):
                raise InputError(f"{where}: every line must be a JSON object, found {shown(line)}")
            yield where, values, tuple(values)
