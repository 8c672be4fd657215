import itertools
import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from storage.artifacts.digests import (
    architecture_digest,
    file_sha256,
    table_digest,
    tensors_of,
    tokenizer_digest,
    weights_digest,
)
from storage.errors import CorruptArtifact, InputError

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("topk", pa.list_(pa.list_(pa.float32()))),
        ("flag", pa.bool_()),
        ("number", pa.float64()),
        ("pair", pa.struct([("a", pa.int16()), ("b", pa.string())])),
    ]
)
slowly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are shared
FLOAT32 = st.floats(width=32)
ROW = st.fixed_dictionaries(
    {
        "text": st.none() | st.text(max_size=5),
        "ids": st.none() | st.lists(st.integers(-5, 5), max_size=4),
        "topk": st.none() | st.lists(st.lists(FLOAT32, max_size=3), max_size=3),
        "flag": st.none() | st.booleans(),
        "number": st.none() | st.floats(),
        "pair": st.none() | st.fixed_dictionaries({"a": st.none() | st.integers(-9, 9), "b": st.none() | st.text()}),
    }
)
ROWS = st.lists(ROW, max_size=9)


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@slowly
@given(ROWS, st.lists(st.integers(0, 9), max_size=3), ROWS, ROWS)
def test_table_digest_ignores_how_rows_are_held(rows: list, cuts: list, before: list, after: list) -> None:
    whole = table(rows)
    digest = table_digest(whole)
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut <= len(rows))})
    chunked = pa.concat_tables(
        [whole.slice(start, end - start) for start, end in itertools.pairwise(bounds)] or [whole]
    )
    assert table_digest(chunked) == digest
    assert table_digest(table(before + rows + after).slice(len(before), len(rows))) == digest
    assert table_digest(whole.replace_schema_metadata({"made": "by"}).select(SCHEMA.names[::-1])) == digest
    large = whole.set_column(0, "text", whole["text"].cast(pa.large_string()))
    large = large.set_column(1, "ids", large["ids"].cast(pa.large_list(pa.int32())))
    assert table_digest(large) == digest
    assert table_digest(whole.set_column(0, "text", whole["text"].dictionary_encode())) == digest


@slowly
@given(ROWS, ROWS)
def test_table_digest_tells_different_rows_apart(one: list, other: list) -> None:
    # repr tells -0.0 from 0.0 and takes every NaN for the same, as the digest does
    same = repr(table(one).to_pylist()) == repr(table(other).to_pylist())
    assert (table_digest(table(one)) == table_digest(table(other))) == same


def test_table_digest_is_golden() -> None:
    """Stores of users hang on it: content digests enter keys."""
    rows = [
        {"text": "a", "ids": [1, 2], "topk": [[0.5], []], "flag": True, "number": -0.5, "pair": {"a": 1, "b": None}},
        {"text": None, "ids": None, "topk": [], "flag": None, "number": None, "pair": None},
    ]
    assert table_digest(table(rows)) == "7c50fd058413844a308c651d57175e512395788cb48b36dce3377574dc4a6fa8"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([[1], [2]]), pa.array([[1, 2], []])),
        (pa.array([None], pa.int32()), pa.array([0], pa.int32())),
        (pa.array([None], pa.list_(pa.int32())), pa.array([[]], pa.list_(pa.int32()))),
        (pa.array(["ab", ""]), pa.array(["a", "b"])),
        (pa.array([1], pa.int32()), pa.array([1], pa.int64())),
        (pa.array([1, 2]), pa.array([2, 1])),
    ],
)
def test_near_misses_differ(one: pa.Array, other: pa.Array) -> None:
    assert table_digest(pa.table({"x": one})) != table_digest(pa.table({"x": other}))


def test_bytes_under_a_null_play_no_part() -> None:
    valid = pa.py_buffer(bytes([0b01]))
    arrays = [
        pa.Array.from_buffers(pa.int32(), 2, [valid, pa.py_buffer(struct.pack("<2i", 7, hidden))]) for hidden in (0, 99)
    ]
    assert table_digest(pa.table({"x": arrays[0]})) == table_digest(pa.table({"x": arrays[1]}))


def test_every_nan_is_the_same_nan() -> None:
    payload = np.array([0x7FC00000, 0xFFC00001], dtype="<u4").view("<f4")
    assert table_digest(pa.table({"x": payload[:1]})) == table_digest(pa.table({"x": payload[1:]}))


def test_a_type_without_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError, match="decimal"):
        table_digest(pa.table({"x": pa.array([1], pa.decimal128(5))}))


TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.ones((4,), dtype=np.float16),
    "scalar": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 5), dtype=np.float32),
}


def save(folder: Path, *parts: list[str], tensors: dict[str, np.ndarray] = TENSORS) -> Path:
    folder.mkdir()
    for i, names in enumerate(parts):
        save_file({name: tensors[name] for name in names}, folder / f"model-{i}.safetensors", metadata={"i": str(i)})
    return folder


def test_weights_digest_ignores_the_split_and_sees_the_rest(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", list(TENSORS))
    digest = weights_digest(whole)
    assert weights_digest(save(tmp_path / "split", ["scalar", "b"], ["empty"], ["a"])) == digest
    changed = {
        "value": {**TENSORS, "b": TENSORS["b"] + 1e-7 * (TENSORS["b"] == 0)},
        "shape": {**TENSORS, "b": TENSORS["b"].reshape(3, 2)},
        "dtype": {**TENSORS, "b": TENSORS["b"].view(np.int32)},
        "name": {**{name: TENSORS[name] for name in ("a", "scalar", "empty")}, "c": TENSORS["b"]},
        "empty": {**TENSORS, "empty": np.zeros((5, 0), dtype=np.float32)},
    }
    digests = {weights_digest(save(tmp_path / what, list(t), tensors=t)) for what, t in changed.items()}
    assert len(digests | {digest}) == len(changed) + 1


def test_the_tensors_of_a_file_are_their_raw_bytes(tmp_path: Path) -> None:
    tensors = tensors_of(save(tmp_path / "m", list(TENSORS)) / "model-0.safetensors")
    assert {name: data for name, (_, data) in tensors.items()} == {n: t.tobytes() for n, t in TENSORS.items()}


def test_index_says_which_files_count(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", ["a", "b"])
    expected = weights_digest(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-0.safetensors"}}))
    save_file({"stale": TENSORS["a"]}, folder / "old.safetensors")
    assert weights_digest(folder) == expected
    (folder / "model-0.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-0\.safetensors"):
        weights_digest(folder)


def test_malformed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors"):
        weights_digest(tmp_path)
    with pytest.raises(InputError, match="gone: no such folder"):
        weights_digest(tmp_path / "gone")
    twice = save(tmp_path / "twice", ["a"], ["a", "b"])
    with pytest.raises(CorruptArtifact, match="'a'"):
        weights_digest(twice)
    good = (save(tmp_path / "good", ["a", "b"]) / "model-0.safetensors").read_bytes()
    bad = tmp_path / "bad"
    bad.mkdir()
    for data in (good[:-1], good[:20], b"", b"\xff" * 16, good[:8] + b"[" + good[9:], good.replace(b"[2,3]", b"[2,4]")):
        (bad / "model.safetensors").write_bytes(data)
        with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
            weights_digest(bad)


def test_tokenizer_digest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer_digest(tmp_path)
    (tmp_path / "README.md").write_text("not part of it")
    assert tokenizer_digest(tmp_path) == first
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(tmp_path) != first


def test_architecture_digest_forgets_the_library(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"rope_theta": 1e4, "transformers_version": "5.19"}))
    first = architecture_digest(tmp_path)
    path.write_text(json.dumps({"transformers_version": "6.0", "rope_theta": 1e4}))
    assert architecture_digest(tmp_path) == first
    path.write_text(json.dumps({"rope_theta": 1e6}))
    assert architecture_digest(tmp_path) != first
    path.write_text("[]")
    with pytest.raises(InputError, match=r"config\.json"):
        architecture_digest(tmp_path)


def test_memo_remembers_until_the_stat_changes(tmp_path: Path) -> None:
    path, memo = tmp_path / "file", tmp_path / "memo"
    path.write_bytes(b"one")
    old = time.time() - 100
    os.utime(path, (old, old))
    digest = file_sha256(path, memo)
    path.write_bytes(b"two")
    os.utime(path, (old, old))  # same inode, size and mtime: what the memo is keyed by, and all it promises
    assert file_sha256(path, memo) == digest
    assert file_sha256(path) != digest
    os.utime(path, (old + 1, old + 1))
    assert file_sha256(path, memo) == file_sha256(path)


def test_memo_does_not_trust_fresh_files_nor_torn_notes(tmp_path: Path) -> None:
    path, memo = tmp_path / "file", tmp_path / "memo"
    path.write_bytes(b"one")
    file_sha256(path, memo)
    assert not memo.exists()
    os.utime(path, (1, 1))
    digest = file_sha256(path, memo)
    (note,) = memo.iterdir()
    note.write_text(digest[:30])
    assert file_sha256(path, memo) == digest
