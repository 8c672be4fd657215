"""What is finished of a shard is read back as it was written, or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest
from small_store import SHARDS, SPEC, rows

from storage.artifacts.parts import Parts
from storage.store import Store

ITEMS = {f"p{i}/1/0": {"ids": list(range(i)), "logprobs": [-0.1 * i, -1e-45], "text": f"ä{i}\n\n"} for i in range(4)}


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    found = Parts(tmp_path / "table-00000.parts")
    assert found.read() == {}
    for name, item in ITEMS.items():
        found.add({name: item})
    return found


def test_items_come_back_as_they_were(parts):
    assert parts.read() == ITEMS
    parts.add({"a": 1, "b": None})
    assert parts.read() == ITEMS | {"a": 1, "b": None}
    parts.add({"a": 2})
    assert parts.read()["a"] == 1
    with pytest.raises(ValueError):
        parts.add({"c": math.inf})
    parts.remove()
    parts.remove()
    assert parts.read() == {}


def test_wherever_it_is_torn_what_is_read_is_whole_and_more_can_follow(parts):
    data = parts.path.read_bytes()
    counts = set()
    for end in range(len(data)):
        parts.path.write_bytes(data[:end])
        found = parts.read()
        assert found == {name: ITEMS[name] for name in list(ITEMS)[: len(found)]}
        counts.add(len(found))
        parts.add({"next": 7})
        assert parts.read() == found | {"next": 7}
    assert counts == {0, 1, 2, 3, 4}


def test_no_flipped_bit_is_believed(parts):
    data = parts.path.read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        parts.path.write_bytes(changed)
        found = parts.read()
        assert found.items() <= ITEMS.items() and len(found) >= len(ITEMS) - 2  # a line's end joins two


def test_parts_survive_a_killed_builder_and_go_with_their_shard(tmp_path):
    store = Store(tmp_path)
    with store.building(SPEC) as builder:
        builder.parts("mask", 0).add(ITEMS)
        builder.parts("mask", 1).add(ITEMS)
    with store.building(SPEC) as builder:
        assert builder.missing("mask", SHARDS) == [0, 1, 2]
        assert builder.parts("mask", 0).read() == ITEMS
        for shard in range(SHARDS):
            builder.write_shard("mask", shard, rows(shard))
        assert builder.parts("mask", 0).read() == {}
        builder.parts("mask", 1).add(ITEMS)  # as a writer killed between the shard and this leaves it
        builder.commit(tables={"mask": SHARDS})
    assert not list(tmp_path.rglob("*.parts"))
    assert isinstance(store.read_table(store.get("mask", SPEC.key), "mask"), pa.Table)
