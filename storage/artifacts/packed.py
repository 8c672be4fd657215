"""Packed top-K lists: how the columns of such a table are laid out in its file where `encoding` is `packed`. Rows are packed
when they are written and unpacked when they are read (`shards`, `query.views`): readers, row digests and SQL see the declared
columns.

`ids` and `valid` are kept exactly. The log-probabilities x of a token's list and of its tail, which together are a distribution,
become whole steps of 1/64 nats below the largest of them, and an origin that restores their total mass:

    stored = origin - steps / 64        origin = log sum exp x - log sum exp(-steps / 64)

Each x is rounded by at most half a step, and the origin by no more. So |stored - x| <= 1/64, the sum over list and tail does not
change, and KL(x || stored) over list and tail is at most STEP^2 / 8 = 3.1e-5 nats: Hoeffding's lemma, for a distribution times
factors e^r with r in an interval of width STEP, normalised. Both hold up to the rounding of float32. Finite values more than 500
nats below the largest are stored 500 below it; -inf stays -inf, and NaN (a token without a usable list) stays NaN.

Columns of the file, each one list per sample. T are its tokens; E are the entries of its tokens' lists, one after another.

    packed_ids               int32[]    E ids
    packed_<model>steps      int16[]    E steps: of a token's first entry the steps, of others the difference from the one before
    valid                    int16[]    T counts of entries
    packed_<model>tail       int16[]    T steps of the tail
    packed_<model>origin     float32[]  T origins

`<model>` is `student_` or `teacher_` where a table has lists of both, else empty. 32,767 steps mean -inf. In Parquet the numbers
are split into planes of bytes (BYTE_STREAM_SPLIT) before zstd: high bytes and the differences of sorted lists vary little."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import StoreError
from storage.schemas import Column, TableSchema

STEPS_PER_NAT = 64
STEP = 1 / STEPS_PER_NAT
"""Nats; also the bound on the error of a log-probability."""
KL_BOUND = STEP**2 / 8
"""Nats; on KL(x || stored) over a list and its tail."""
IDS = "packed_ids"
_NO_MASS = 2**15 - 1
_FARTHEST = 500 * STEPS_PER_NAT
Lists: TypeAlias = pa.ChunkedArray | pa.Array
"""A column of lists."""
_FLOATS, _SHORTS, _INTS = pa.list_(pa.float32()), pa.list_(pa.int16()), pa.list_(pa.int32())


class _Model(NamedTuple):
    """Column names of one model's log-probabilities: as declared, and packed."""

    logprobs: str
    tail: str
    steps: str
    packed_tail: str
    origin: str


def _model(prefix: str) -> _Model:
    packed = f"packed_{prefix}"
    return _Model(f"{prefix}logprobs", f"{prefix}tail_logmass", f"{packed}steps", f"{packed}tail", f"{packed}origin")


def packed_schema(schema: TableSchema) -> TableSchema | None:
    """The layout of a table of top-K lists, whose columns are sample_id, ids, valid, and pairs of `<model>logprobs` and
    `<model>tail_logmass`. None for any other table."""
    types = {column.name: column.type for column in schema.columns}
    models = [_model(name.removesuffix("logprobs")) for name in schema.names if name.endswith("logprobs")]
    declared = {"sample_id": pa.string(), "ids": pa.list_(_INTS), "valid": _SHORTS}
    declared |= {model.logprobs: pa.list_(_FLOATS) for model in models} | {model.tail: _FLOATS for model in models}
    if types != declared or not models:
        return None
    made = {"sample_id": pa.string(), IDS: _INTS, **{model.steps: _SHORTS for model in models}, "valid": _SHORTS}
    made |= {model.packed_tail: _SHORTS for model in models} | {model.origin: _FLOATS for model in models}
    columns = tuple(Column(name, type, "see storage.artifacts.packed") for name, type in made.items())
    return TableSchema(schema.name, schema.doc, columns, schema.version)


def is_packed(names: Iterable[str]) -> bool:
    """Whether columns of these names are a packed table's."""
    return IDS in names


class Part(NamedTuple):
    """What a declared column is made from: a function of `FUNCTIONS` and its arguments, or one column that is kept."""

    function: str | None
    arguments: tuple[str, ...]


def parts(names: Iterable[str]) -> dict[str, Part]:
    """Of the column names of a packed table: by declared column, in declared order, what it is made from."""
    models = [_model(name.removeprefix("packed_").removesuffix("origin")) for name in names if name.endswith("origin")]
    found = {"sample_id": Part(None, ("sample_id",)), "ids": Part("unpack_ids", (IDS, "valid"))}
    found |= {model.logprobs: Part("unpack_logprobs", (model.steps, model.origin, "valid")) for model in models}
    found |= {"valid": Part(None, ("valid",))}
    return found | {model.tail: Part("unpack_tail", (model.packed_tail, model.origin)) for model in models}


def pack(schema: TableSchema, rows: pa.Table) -> pa.Table:
    """The packed columns of a table of top-K lists. StoreError for any other table, and where `valid` does not count the entries
    of the lists."""
    layout = packed_schema(schema)
    if layout is None:
        raise StoreError(f"table {schema.name!r}: only top-K lists can be packed, found {', '.join(schema.names)}")
    of_rows, counts = _flat(rows["valid"])
    edges = _edges(counts)
    columns: dict[str, Any] = {name: _whole(rows[name]) for name in ("sample_id", "valid")}
    columns[IDS] = _lists(edges[of_rows], _entries(schema, "ids", rows, counts))
    for name in schema.names:
        if name.endswith("logprobs"):
            model = _model(name.removesuffix("logprobs"))
            values, (_, tails) = _entries(schema, name, rows, counts), _flat(rows[model.tail])
            if len(tails) != len(counts):
                raise StoreError(
                    f"table {schema.name!r}, column {model.tail!r}: {len(tails)} values, {len(counts)} tokens"
                )
            steps, tail, origin = _quantised(values, tails, edges)
            columns[model.steps] = _lists(edges[of_rows], steps)
            columns[model.packed_tail], columns[model.origin] = _lists(of_rows, tail), _lists(of_rows, origin)
    return pa.table([columns[name] for name in layout.names], schema=layout.arrow)


def unpack(rows: pa.Table, columns: Sequence[str], names: Sequence[str]) -> pa.Table:
    """The declared `columns`, in declared order, of packed rows that have the `parts` of these. `names`: the columns of the whole
    packed table."""
    found = {}
    for name, (function, arguments) in parts(names).items():
        if name in columns:
            given = [rows[argument] for argument in arguments]
            found[name] = given[0] if function is None else FUNCTIONS[function](*given)
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in found.items()])
    return pa.table(found, schema=schema)


def unpack_ids(ids: Lists, valid: Lists) -> pa.Array:
    """int32[][]: T lists of ids per row; null where `ids` is."""
    _, values = _flat(ids)
    return _nested(ids, valid, values)


def unpack_tail(tail: Lists, origin: Lists) -> pa.Array:
    """float32[]: T log-probabilities per row; null where `tail` is."""
    of_rows, steps = _flat(tail)
    return _lists(of_rows, _logprobs(steps.astype(np.int32), _flat(origin)[1]), _whole(tail).is_null())


def unpack_logprobs(steps: Lists, origin: Lists, valid: Lists) -> pa.Array:
    """float32[][]: T lists of log-probabilities per row; null where `steps` is."""
    counts = _flat(valid)[1]
    edges = _edges(counts)
    differences = _flat(steps)[1].astype(np.int32)
    there = np.flatnonzero(counts)  # tokens with entries
    if len(there):
        starts = edges[there]
        whole = np.add.reduceat(differences, starts)
        differences[starts[1:]] -= whole[:-1]  # the running sum begins again at each token
    return _nested(steps, valid, _logprobs(np.cumsum(differences, dtype=np.int32), np.repeat(_flat(origin)[1], counts)))


FUNCTIONS: dict[str, Callable[..., pa.Array]] = {
    "unpack_ids": unpack_ids,
    "unpack_logprobs": unpack_logprobs,
    "unpack_tail": unpack_tail,
}
"""By the name that SQL has for them."""


def _logprobs(steps: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """float32; exact but for one rounding, so equal on every machine."""
    found: np.ndarray = origin - steps.astype(np.float32) * np.float32(STEP)
    found[steps == _NO_MASS] -= np.float32(np.inf)
    return found


def _quantised(values: np.ndarray, tails: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(differences of steps per entry, steps of the tail and origin per token). Token n has the entries `edges[n]` to
    `edges[n + 1]`."""
    tokens = len(tails)
    if not tokens:
        return np.empty(0, np.int16), np.empty(0, np.int16), np.empty(0, np.float32)
    counts = np.diff(edges)
    entries = np.arange(len(values)) + np.repeat(np.arange(tokens), counts)
    last = edges[1:] + np.arange(tokens)
    first = edges[:-1] + np.arange(tokens)
    x = np.empty(len(values) + tokens)  # of each token its entries, then its tail
    x[entries], x[last] = values, tails
    top = np.maximum.reduceat(x, first)
    usable = np.isfinite(top)
    x -= np.repeat(np.where(usable, top, 0.0), counts + 1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        steps = np.minimum(np.rint(-x * STEPS_PER_NAT), _FARTHEST)
        steps[np.isneginf(x)] = _NO_MASS
        steps[~np.repeat(usable, counts + 1)] = 0
        steps = steps.astype(np.int32)
        mass = np.add.reduceat(np.exp(x), first)
        stored = np.add.reduceat(np.where(steps == _NO_MASS, 0.0, np.exp(steps * -STEP)), first)
        origin = np.where(usable, top + np.log(mass) - np.log(stored), np.where(np.isneginf(top), -np.inf, np.nan))
    of_entries = steps[entries]
    differences = np.diff(of_entries, prepend=0)
    there = edges[:-1][counts > 0]
    differences[there] = of_entries[there]
    return differences.astype(np.int16), steps[last].astype(np.int16), origin.astype(np.float32)


# --- columns of lists ------------------------------------------------------------------------------------------------


def _whole(column: Lists) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _flat(column: Lists) -> tuple[np.ndarray, np.ndarray]:
    """(edges of the rows, flat values) of a column of lists; null rows have none."""
    array = _whole(column)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return _edges(lengths), array.flatten().to_numpy(zero_copy_only=False)


def _entries(schema: TableSchema, name: str, rows: pa.Table, counts: np.ndarray) -> np.ndarray:
    """Flat entries of a column of T lists per row."""
    inner = _whole(rows[name]).flatten()
    lengths = pc.list_value_length(inner).to_numpy(zero_copy_only=False)
    if not np.array_equal(lengths, counts):
        raise StoreError(f"table {schema.name!r}, column {name!r}: its lists have other lengths than `valid` counts")
    entries: np.ndarray = inner.flatten().to_numpy(zero_copy_only=False)
    return entries


def _nested(rows: Lists, valid: Lists, entries: np.ndarray) -> pa.Array:
    of_rows, counts = _flat(valid)
    inner = _lists(_edges(counts), entries)
    return pa.ListArray.from_arrays(pa.array(of_rows, pa.int32()), inner, mask=_whole(rows).is_null())


def _lists(edges: np.ndarray, values: np.ndarray, mask: pa.Array | None = None) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), pa.array(values), mask=mask)


def _edges(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
