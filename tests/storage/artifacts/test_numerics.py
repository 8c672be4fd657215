"""Which shards of an unfinished artifact were made at which settings."""

from __future__ import annotations

from pathlib import Path

from small_store import SPEC, rows

from storage.artifacts.numerics import BY_SHARD, ShardNumerics, differing, several
from storage.store import Store

ONE, TWO = {"threads": 1, "seqs": 8}, {"threads": 2, "seqs": 8}


def begin(folder: Path, settings: dict, *missing: int, count: int = 4) -> list[str]:
    return ShardNumerics(folder, "rollouts").begin(settings, missing, count)


def groups(folder: Path, count: int = 4) -> list:
    return ShardNumerics(folder, "rollouts").groups(count)


def test_shards_keep_what_they_were_made_at(tmp_path: Path) -> None:
    assert begin(tmp_path, ONE, 0, 1, 2, 3) == []
    assert begin(tmp_path, ONE, 2, 3) == []
    assert groups(tmp_path) == [(ONE, [0, 1, 2, 3])]
    assert ShardNumerics(tmp_path, "rollouts").provenance(4) == {"numerics": ONE}
    (said,) = begin(tmp_path, TWO, 2, 3)
    assert "2 of 4 shards were made with other settings (threads 1, 2)" in said and "opd replay" in said
    assert groups(tmp_path) == [(ONE, [0, 1]), (TWO, [2, 3])]
    assert begin(tmp_path, TWO, 3) == []
    assert begin(tmp_path, ONE, 3) != [] and groups(tmp_path) == [(ONE, [0, 1, 3]), (TWO, [2])]
    # one that is damaged is made again, at what holds then
    assert begin(tmp_path, TWO, 0) != [] and groups(tmp_path) == [(TWO, [0, 2]), (ONE, [1, 3])]
    assert begin(tmp_path, TWO, 1) == [] and groups(tmp_path) == [(TWO, [0, 1, 2]), (ONE, [3])]


def test_settings_of_an_attempt_that_made_nothing_are_not_named(tmp_path: Path) -> None:
    begin(tmp_path, ONE, 0, 1, 2, 3)
    assert begin(tmp_path, TWO, 0, 1, 2, 3) == []
    assert ShardNumerics(tmp_path, "rollouts").provenance(4) == {"numerics": TWO}
    assert begin(tmp_path, ONE) == []  # all shards are there, only the manifest was not
    assert ShardNumerics(tmp_path, "rollouts").provenance(4) == {"numerics": TWO}


def test_intermediate_shards_made_at_other_settings_are_made_again(store: Store) -> None:
    """A shard has one set of settings, those of its intermediate shards included."""
    with store.building(SPEC) as builder:
        between = builder.intermediate()
        assert builder.begin_shards("mask", ONE, [0, 1], 2) == []
        between.write_shard("mask", 0, rows(0))
        assert builder.begin_shards("mask", ONE, [0, 1], 2) == [] and between.read("mask", 0) is not None
        (said,) = builder.begin_shards("mask", TWO, [0, 1], 2)
        assert "made again" in said and "threads 1, 2" in said and between.read("mask", 0) is None


def test_what_has_no_record_that_can_be_believed_is_said_not_to_be_known(tmp_path: Path) -> None:
    begin(tmp_path, ONE, 0, 1, 2, 3)
    (record,) = tmp_path.iterdir()
    record.write_bytes(record.read_bytes().replace(b'"threads": 1', b'"threads": 3'))
    (said,) = begin(tmp_path, TWO, 3)
    assert "not recorded" in said and groups(tmp_path) == [(None, [0, 1, 2]), (TWO, [3])]
    told = several(ShardNumerics(tmp_path, "rollouts").provenance(4))
    assert told is not None and "shards 0, 1, 2 at settings that were not recorded; shards 3 at" in told


def test_what_is_told_of_several_sets() -> None:
    assert several({"numerics": ONE}) is None and several({}) is None
    told = several({BY_SHARD: [{"shards": [0, 2], "numerics": ONE}, {"shards": list(range(3, 12)), "numerics": TWO}]})
    assert told == "shards 0, 2 at threads 1; shards 3, 4, 5, 6, 7, 8 and 3 more at threads 2"
    assert differing([ONE, TWO | {"seqs": 4}]) == "seqs 8, 4; threads 1, 2"
