"""Content digests: files, safetensors weights, tokenizers, rows of tables."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.disk.files import temporary_name
from storage.errors import CorruptArtifact, InputError
from storage.identity import canonical_json

_BLOCK = 1 << 20
_THREADS = 8
_WORTH_THREADS = 64 << 20
_RACY_SECONDS = 2.0  # a file written this recently may be written again within one tick of its mtime
_HEX = 64
_ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_UNESSENTIAL_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


T = TypeVar("T")
R = TypeVar("R")


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


def file_sha256(path: Path | str, memo: Path | None = None) -> str:
    """sha256 of a file. With `memo` (a directory) it is remembered by (path, inode, size, mtime)."""
    path = Path(path)
    return _remembered(memo, "file", [path], lambda: _hash_file(path))


def in_threads(do: Callable[[T], R], items: Sequence[T], size: int) -> list[R]:
    """`do` of each, in order; several at the same time where they are many bytes altogether: hashing holds no lock."""
    if len(items) < 2 or size < _WORTH_THREADS:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "digest") as pool:
        return list(pool.map(do, items))


def weights_digest(directory: Path | str, memo: Path | None = None) -> str:
    """Digest of a checkpoint's tensors: names, dtypes, shapes and bytes, independent of how they are split into files.

    Reads the files of the index, if there is one, else all `*.safetensors`.
    Raises InputError if there is no file, CorruptArtifact for a malformed file."""
    files = _safetensors_files(Path(directory))
    return _remembered(memo, "weights", files, lambda: _weights(files))


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """name -> ("dtype[shape]", raw bytes) of one safetensors file. CorruptArtifact for a malformed one."""
    data = path.read_bytes()
    return {name: (kind, data[start : start + length]) for name, kind, (_, start, length) in _header(path)}


def tokenizer_digest(directory: Path | str, memo: Path | None = None) -> str:
    """Digest of the files that define a tokenizer and its chat template. InputError if there are none."""
    directory = Path(directory)
    files = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    files += sorted(directory.glob("*.tiktoken")) + sorted(directory.glob("additional_chat_templates/*.jinja"))
    if not files:
        raise InputError(f"{directory}: no tokenizer files (looked for {', '.join(_TOKENIZER_FILES[:3])}, ...)")
    return files_digest({path.relative_to(directory).as_posix(): file_sha256(path, memo) for path in files})


def architecture_digest(directory: Path | str, name: str = "config.json") -> str:
    """Digest of a checkpoint's `config.json` (or `generation_config.json`), without fields that change no result (library
    version, own name, dtype)."""
    path = Path(directory) / name
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    essential = {name: value for name, value in config.items() if name not in _UNESSENTIAL_CONFIG}
    return _sha256(canonical_json(essential))


def files_digest(files: dict[str, str]) -> str:
    """Digest of a set of files, given as relative path -> sha256."""
    return _sha256(canonical_json(files))


def table_digest(table: pa.Table) -> str:
    """Digest of a table's rows in order: independent of chunking, slicing, column order and schema metadata, and of
    32 or 64 bit offsets. All NaNs are equal; the bytes under a null are ignored. TypeError for unsupported types."""
    digest = hashlib.sha256()
    digest.update(f"rows:{table.num_rows}".encode())
    for name in sorted(table.column_names):
        column = table.column(name)
        digest.update(canonical_json(["column", name]).encode())
        _feed(digest, column.type, column.chunks)
    return digest.hexdigest()


def combine_digests(parts: Sequence[tuple[int, str]]) -> str:
    """Digest of a table from (rows, row digest) of its shards, in order."""
    return _sha256(canonical_json([list(part) for part in parts]))


# --- files -----------------------------------------------------------------------------------------------------------


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(memo: Path | None, kind: str, files: Sequence[Path], compute: Any) -> str:
    if memo is None:
        return str(compute())
    stats = [(os.fspath(path.resolve()), path.stat()) for path in files]
    stamp = [[name, stat.st_ino, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    note = memo / f"{kind}-{_sha256(canonical_json(stamp))[:40]}"
    with suppress(OSError, ValueError):
        known = note.read_text("ascii")
        if len(known) == _HEX and int(known, 16) >= 0:
            return known
    digest = str(compute())
    if all(time.time() - stat.st_mtime > _RACY_SECONDS for _, stat in stats):
        with suppress(OSError):  # the memo is optional: a full or read-only disk must not stop the reader
            memo.mkdir(parents=True, exist_ok=True)
            temporary = memo / temporary_name()
            temporary.write_text(digest, "ascii")
            os.replace(temporary, note)
    return digest


# --- safetensors -----------------------------------------------------------------------------------------------------


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not an index of safetensors files ({error!r})") from error
        files = [directory / str(name) for name in names]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise InputError(f"{index}: names missing files: {', '.join(missing)}")
        return files
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; a checkpoint's folder is needed")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"{directory}: no *.safetensors; convert the checkpoint to safetensors first")
    return files


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads a checkpoint's weights from: those of the index, else model.safetensors alone.

    InputError if there are none under these names."""
    files, alone = _safetensors_files(directory), directory / "model.safetensors"
    if (directory / "model.safetensors.index.json").is_file():
        return files
    if alone in files:
        return [alone]
    raise InputError(
        f"{directory}: has {files[0].name}, but neither model.safetensors nor model.safetensors.index.json, so it is not known"
        " which files belong to the model; save it again with save_pretrained"
    )


def tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """name -> shape of every tensor in `weight_files`, from the files' headers. CorruptArtifact for a malformed one."""
    kinds = ((name, kind) for path in weight_files(directory) for name, kind, _ in _header(path))
    return {name: json.loads(kind[kind.index("[") :]) for name, kind in kinds}


_Tensor = tuple[Path, int, int]  # file, first byte, number of bytes


def _tensors(files: Sequence[Path]) -> dict[str, tuple[str, _Tensor]]:
    """name -> ("dtype[shape]", place), sorted by name."""
    found: dict[str, tuple[str, _Tensor]] = {}
    for path in files:
        for name, kind, place in _header(path):
            if name in found:
                raise CorruptArtifact(f"{path}: tensor {name!r} is in {found[name][1][0].name} as well")
            found[name] = (kind, place)
    return dict(sorted(found.items()))


def _weights(files: Sequence[Path]) -> str:
    digest, tensors = hashlib.sha256(), _tensors(files)
    places = [place for _, place in tensors.values()]
    hashes = in_threads(lambda place: _hash_tensor(*place), places, sum(length for _, _, length in places))
    for (name, (kind, _)), value in zip(tensors.items(), hashes, strict=True):
        digest.update(canonical_json([name, kind, value]).encode("ascii"))
    return digest.hexdigest()


def _header(path: Path) -> Iterator[tuple[str, str, _Tensor]]:
    """(name, "dtype[shape]", place) of each tensor. The format: u64 length, JSON header, tensor bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise CorruptArtifact(f"{path}: truncated, or not a safetensors file ({size} bytes)")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [(str(name), str(tensor["dtype"]), *_layout(tensor)) for name, tensor in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{path}: unreadable safetensors header ({error!r})") from error
    for name, dtype, shape, begin, end in entries:
        bits = _ITEM_BITS.get(dtype)
        expected = end - begin if bits is None else math.prod(shape) * bits // 8
        if not 0 <= begin <= end <= size - 8 - length or end - begin != expected:
            raise CorruptArtifact(f"{path}: tensor {name!r} {dtype}{shape} lies at {begin}..{end} of {size} bytes")
        yield name, f"{dtype}{shape}", (path, 8 + length + begin, end - begin)


def _layout(tensor: Any) -> tuple[list[int], int, int]:
    begin, end = tensor["data_offsets"]
    return [int(size) for size in tensor["shape"]], int(begin), int(end)


def _hash_tensor(path: Path, start: int, length: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0:
            block = file.read(min(length, _BLOCK))
            if not block:
                raise CorruptArtifact(f"{path}: shorter than its header states")
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()


# --- rows ------------------------------------------------------------------------------------------------------------


def _feed(digest: _Hash, kind: pa.DataType, chunks: list[Any]) -> None:
    """Feeds one column: type, length, validity, then lengths and values of the non-null entries, chunk after chunk."""
    if pa.types.is_dictionary(kind):
        return _feed(digest, kind.value_type, [chunk.dictionary_decode() for chunk in chunks])
    count = sum(len(chunk) for chunk in chunks)
    digest.update(f"{_tag(kind)}:{count}:".encode())
    if pa.types.is_null(kind):
        return None
    if any(chunk.null_count for chunk in chunks):
        digest.update(np.packbits(np.concatenate([_valid(chunk) for chunk in chunks])).tobytes())
    else:
        digest.update(b"valid")
    if pa.types.is_struct(kind):
        fields = sorted((kind.field(i).name, i) for i in range(kind.num_fields))
        for name, i in fields:
            digest.update(canonical_json(["field", name]).encode())
            _feed(digest, kind.field(i).type, [chunk.flatten()[i] for chunk in chunks])
    elif _is_list(kind):
        for chunk in chunks:
            digest.update(_lengths(pc.list_value_length(chunk)))
        _feed(digest, kind.value_type, [chunk.flatten() for chunk in chunks])
    elif _is_text(kind):
        for chunk in chunks:
            digest.update(_lengths(pc.binary_length(chunk)))
        for chunk in chunks:
            _feed_text(digest, chunk)
    else:
        for chunk in chunks:
            digest.update(_values(kind, chunk))
    return None


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return str(kind).removeprefix("large_") in ("string", "binary")


def _tag(kind: pa.DataType) -> str:
    if _is_list(kind):
        return "list"
    if pa.types.is_struct(kind):
        return f"struct{kind.num_fields}"
    if _is_text(kind):
        return str(kind).removeprefix("large_")
    if pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return str(kind)
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return str(kind)
    raise TypeError(f"table_digest: no canonical form for columns of type {kind}")


def _valid(array: Any) -> Any:
    return array.is_valid().to_numpy(zero_copy_only=False)


def _lengths(lengths: Any) -> bytes:
    return bytes(lengths.fill_null(0).to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def _feed_text(digest: _Hash, array: Any) -> None:
    kept = array.drop_null()
    wide = pa.types.is_large_string(kept.type) or pa.types.is_large_binary(kept.type)
    _, offsets, data = kept.buffers()
    if len(kept) == 0 or data is None:
        return
    bounds = np.frombuffer(offsets, dtype="<i8" if wide else "<i4")
    start, end = int(bounds[kept.offset]), int(bounds[kept.offset + len(kept)])
    digest.update(memoryview(data)[start:end])


def _values(kind: pa.DataType, array: Any) -> bytes:
    if pa.types.is_boolean(kind):
        return bytes(array.fill_null(False).to_numpy(zero_copy_only=False).astype("u1").tobytes())
    floating = bool(pa.types.is_floating(kind))
    width = kind.bit_width // 8
    dtype = np.dtype(f"<{'f' if floating else 'u'}{width}")
    buffer = array.buffers()[1]
    if len(array) == 0 or buffer is None:
        return b""
    values = np.frombuffer(buffer, dtype=dtype, count=len(array), offset=array.offset * width)
    if array.null_count:
        values = np.where(_valid(array), values, dtype.type(0))
    if floating:
        values = np.where(np.isnan(values), dtype.type(np.nan), values)
    return values.tobytes()
