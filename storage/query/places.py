"""Where the tokens of a completion stand in its text, also where a token is several characters or a part of one.

A token's bytes come from the vocabulary: from its text where it has one alone; else from its name, `<0xE4>` (byte fallback of
sentencepiece) or the characters that byte-level vocabularies (GPT-2) write bytes with. The bytes of a completion's tokens must
decode to its text; otherwise its tokens have no place. A token that ends within a character stands at that character, as does the
token that completes it: they overlap."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PLACES = pa.struct([("start", pa.list_(pa.int32())), ("length", pa.list_(pa.int32()))])
"""Per completion: of each token the characters before it, and its own. Null where the tokens are not those of the text."""
PLACED = (["VARCHAR", "INTEGER[]", "VARCHAR"], 'STRUCT("start" INTEGER[], "length" INTEGER[])')
"""Types of the function that `places_of` makes, in DuckDB: of its arguments and of its result."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
"""What sentencepiece writes for a space."""


class Pieces:
    """The bytes of every id of one vocabulary."""

    def __init__(self, ids: list[int], tokens: list[str], texts: list[str | None], special: list[bool]) -> None:
        found: list[bytes | None] = [None] * (max(ids, default=-1) + 1)
        for place, token, text, is_special in zip(ids, tokens, texts, special, strict=True):
            found[place] = piece(token, text, is_special)
        self.bytes = pa.array(found, pa.large_binary())


def part_names(tokens: pa.Array) -> pa.Array:
    """How tokens are shown that are no text alone: their bytes as `<0xE4><0xB8>`, or their names where these are not known."""
    found = [(token, piece(token, None, False)) for token in tokens.to_pylist()]
    return pa.array(
        [t if data is None else "".join(f"<0x{byte:02X}>" for byte in data) for t, data in found], pa.string()
    )


def piece(token: str, text: str | None, special: bool) -> bytes | None:
    """The bytes that a token adds to a completion's text. None: not known."""
    if special:
        return b""
    if text is not None:
        spaced = token.replace(_SPACE, " ")
        return (spaced if spaced == f" {text}" else text).encode()  # decoded alone it has lost its space
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    values = [_byte_level().get(character, 256) for character in token]
    return bytes(values) if max(values, default=256) < 256 and not _is_text(bytes(values)) else None


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _byte_level() -> dict[str, int]:
    """The byte behind each character of byte-level vocabularies (GPT-2's bytes_to_unicode, the other way round)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in shown]
    return {chr(value): value for value in shown} | {chr(256 + n): value for n, value in enumerate(hidden)}


def places_of(pieces: Callable[[str], Pieces]) -> Callable[..., pa.Array]:
    """The function of DuckDB that gives `PLACES` from (run, completion_token_ids, completion_text); `pieces` of a run are asked
    for when one of its completions comes up."""

    def call(runs: pa.ChunkedArray, ids: pa.ChunkedArray, texts: pa.ChunkedArray) -> pa.Array:
        runs, ids, texts = (column.combine_chunks() for column in (runs, ids, texts))
        names = pc.unique(runs).to_pylist()
        if len(names) == 1:
            return _places(pieces(names[0]), ids, texts)
        found = pa.chunked_array(
            [_places(pieces(n), ids.filter(pc.equal(runs, n)), texts.filter(pc.equal(runs, n))) for n in names], PLACES
        ).combine_chunks()
        order = np.concatenate([np.flatnonzero(pc.equal(runs, n).to_numpy(zero_copy_only=False)) for n in names])
        return found.take(pa.array(np.argsort(order)))

    return call


def _places(pieces: Pieces, ids: pa.Array, texts: pa.Array) -> pa.Array:
    """`PLACES` of completions of one vocabulary. Edges count from the first token, byte or character of them all."""
    tokens = np.concatenate([[0], np.cumsum(ids.value_lengths().to_numpy(zero_copy_only=False))]).astype(np.int64)
    flat = ids.flatten().to_numpy()
    held = (flat >= 0) & (flat < len(pieces.bytes))
    taken = pieces.bytes.take(pa.array(np.where(held, flat, 0)))
    unknown = ~held | pc.is_null(taken).to_numpy(zero_copy_only=False)
    edges = np.concatenate([[0], np.cumsum(pc.fill_null(pc.binary_length(taken), 0).to_numpy())])
    data = b"" if not len(taken) else _content(pc.fill_null(taken, b""))
    begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # whether a character begins at a byte
    fit = np.zeros(len(ids), bool)
    for row, text in enumerate(texts.to_pylist()):
        first, end = edges[tokens[row]], edges[tokens[row + 1]]
        if not unknown[tokens[row] : tokens[row + 1]].any():
            fit[row] = _decodes(data[first:end], text, begins[first:end])
    before = np.concatenate([[0], np.cumsum(begins, dtype=np.int32)])  # characters that begin before a byte
    within = ~np.append(begins, True)[edges[:-1]] & (np.diff(edges) > 0)  # tokens that go on with a character
    own = np.repeat(before[edges[tokens[:-1]]], np.diff(tokens))
    start = np.maximum(before[edges[:-1]] - within, own)
    offsets = pa.array(tokens, pa.int32())
    both = (start - own, before[edges[1:]] - start)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32())) for values in both]
    return pa.StructArray.from_arrays(lists, names=PLACES.names, mask=pa.array(~fit))


def _content(values: pa.LargeBinaryArray) -> bytes:
    """All values, one after the other."""
    _, offsets, content = values.buffers()
    first, end = np.frombuffer(offsets, np.int64)[[values.offset, values.offset + len(values)]]
    return content.slice(first, end - first).to_pybytes() if content is not None else b""


def _decodes(data: bytes, text: str, begins: np.ndarray) -> bool:
    """Whether the bytes of a completion's tokens decode to its text. Clears `begins` where a byte that looks like the first of a
    character is none: among invalid bytes, which are one character together, and in the space that decoders strip."""
    if data == text.encode():
        return True
    found, invalid, place = "", [], 0
    while place < len(data):
        try:
            found += data[place:].decode()
            break
        except UnicodeDecodeError as error:
            found += data[place : place + error.start].decode() + "\N{REPLACEMENT CHARACTER}"
            invalid.append((place + error.start, place + error.end))
            place += error.end
    for first, end in invalid:
        begins[first], begins[first + 1 : end] = True, False
    if found == f" {text}":
        begins[0] = False
        return True
    return found == text
