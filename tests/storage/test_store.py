"""Building, committing, reading, planning."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from small_store import SHARDS, SPEC, STUDENT, build, build_student, fresh, rows

from storage.artifacts.shards import SIDECAR
from storage.disk.files import seal, unseal
from storage.errors import NotEnoughSpace, StoreError
from storage.store import ArtifactSpec, Store

GOLDEN = Path(__file__).with_name("golden_store")


def test_a_store_of_an_earlier_version_stays_cached(tmp_path: Path) -> None:
    """`golden_store` was written by the first version: same keys, same contents, nothing is built again."""
    root = shutil.copytree(GOLDEN, tmp_path / "golden", copy_function=shutil.copyfile)
    golden = Store(root)
    assert {(a.stage, a.key) for a in golden.list()} == {("mask", "df6588c709c6c114"), ("student", "02ebcb2333ad74d4")}
    artifact, written = build(golden)
    assert written == []
    assert golden.verify(artifact) == []
    student = build_student(golden)
    assert golden.materialize(student).parent.name == STUDENT.key == "02ebcb2333ad74d4"
    now = Store(tmp_path / "now")
    assert build(now)[0].content == artifact.content
    assert build_student(now).content == student.content


def test_what_is_committed_is_read_back(store: Store) -> None:
    assert store.get("mask", SPEC.key) is None
    artifact, written = build(store)
    assert written == [0, 1, 2]
    assert fresh(store).get("mask", SPEC.key) == artifact
    assert Store(store.root).list() == [artifact] == store.list("mask")
    assert store.list("rollout") == []
    assert (artifact.rows, artifact.meta, artifact.identity) == ({"mask": 120}, {"metrics": {"n": 1}}, SPEC.identity)
    expected = pa.concat_tables([rows(shard) for shard in range(SHARDS)])
    assert store.read_table(artifact, "mask").to_pydict() == expected.to_pydict()
    assert store.read_table(artifact, "mask", ["sample_id"]).column_names == ["sample_id"]
    assert store.read_shard(artifact, "mask", 1).to_pydict() == rows(1).to_pydict()
    assert store.arrow_dataset(artifact, "mask").to_table().to_pydict() == expected.to_pydict()
    assert store.verify(artifact) == []
    assert artifact.provenance["libraries"]["pyarrow"] == pa.__version__
    assert build(store) == (artifact, [])


def test_an_unfinished_artifact_is_resumed_by_shard(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.building(SPEC) as builder:
        builder.write_shard("mask", 0, rows(0))
        builder.write_shard("mask", 2, rows(2))
        raise KeyboardInterrupt
    assert store.get("mask", SPEC.key) is None
    assert store.list() == []
    artifact, written = build(store)
    assert written == [1]
    other = Store(store.root.with_name("other"))
    assert build(other)[0].content == artifact.content


def test_content_follows_the_rows_alone(store: Store) -> None:
    contents = [
        build(store, ArtifactSpec.of("mask", 1, {"n": salt}, {}), salt=salt // 2)[0].content for salt in range(4)
    ]
    assert contents[0] == contents[1] != contents[2] == contents[3]


def test_commit_refuses_gaps_and_says_which(store: Store) -> None:
    with store.building(SPEC) as builder:
        builder.write_shard("mask", 0, rows(0))
        builder.write_shard("mask", 2, rows(2))
        with pytest.raises(StoreError, match=r"lacks shards \[1\] of 3"):
            builder.commit()
        with pytest.raises(StoreError, match=r"lacks shards \[1, 3\] of 4"):
            builder.commit(tables={"mask": 4})
    assert store.get("mask", SPEC.key) is None


def test_an_empty_table_is_a_table(store: Store) -> None:
    with store.building(SPEC) as builder:
        artifact = builder.commit(tables={"mask": 0})
    assert store.read_table(artifact, "mask").num_rows == 0
    assert store.arrow_dataset(artifact, "mask").count_rows() == 0
    assert artifact.rows == {"mask": 0}


def test_commit_needs_the_lock(store: Store) -> None:
    with store.building(SPEC) as builder:
        builder.write_shard("mask", 0, rows(0))
    with pytest.raises(StoreError, match="lock was released"):
        builder.commit()


def test_wrong_use_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="not being built"):
        store.shard_writer("mask", SPEC.key).write_shard("mask", 0, rows(0))
    with pytest.raises(StoreError, match="stage"):
        ArtifactSpec.of("../mask", 1, {}, {})
    with pytest.raises(StoreError, match="key"):
        store.get("mask", "../../etc")
    with store.building(SPEC) as builder:
        with pytest.raises(StoreError, match="nonsense"):
            builder.write_shard("nonsense", 0, rows(0))
        with pytest.raises(StoreError, match="mask_reasons"):
            builder.write_shard("mask", 0, rows(0).drop_columns(["mask_reasons"]))
        with pytest.raises(StoreError, match="-1"):
            builder.write_shard("mask", -1, rows(0))
        with pytest.raises(StoreError, match="computed by the store"):
            builder.commit(tables={"mask": 0}, content={"mask": "mine"})
        artifact = builder.commit(tables={"mask": 0}, content={"mask:eval": "mine"})
    assert artifact.content["mask:eval"] == "mine"
    with pytest.raises(StoreError, match=r"no table 'rollouts'.*mask"):
        store.read_table(artifact, "rollouts")
    with pytest.raises(StoreError, match="no shard 0"):
        store.read_shard(artifact, "mask", 0)
    with pytest.raises(StoreError, match="no column 'loss'"):
        store.read_table(artifact, "mask", ["loss"])
    with pytest.raises(StoreError, match="no tree 'model'"):
        store.materialize(artifact)


def test_meta_is_plain_json_before_and_after(store: Store) -> None:
    with store.building(SPEC) as builder:
        builder.write_shard("mask", 0, rows(0))
        for bad in (float("nan"), {1, 2}):
            with pytest.raises(StoreError, match=r"meta must be plain JSON.*reverse_kl"):
                builder.commit(meta={"metrics": {"reverse_kl": bad}})
        artifact = builder.commit(meta={"source": Path("a/b"), "pair": (1, 2)}, provenance={"threads": 2})
    assert artifact.meta == {"source": "a/b", "pair": [1, 2]}
    assert artifact.provenance["threads"] == 2
    assert store.get("mask", SPEC.key) == artifact


def test_a_thread_that_holds_the_lock_does_not_wait_for_itself(store: Store) -> None:
    with store.building(SPEC), pytest.raises(StoreError, match="wait for itself"), store.building(SPEC):
        pass


def test_leftovers_of_a_killed_builder_are_removed(store: Store) -> None:
    with store.building(SPEC) as builder:
        builder.write_shard("mask", 0, rows(0))
        unfinished = builder.directory("model")
        (unfinished / "weights").write_bytes(b"x")
        record = builder.write_shard("mask", 1, rows(1))
        (builder.path / f"{record.file}{SIDECAR}").unlink()  # killed between rename and sidecar
        temporary = builder.path / ".tmp-mask-00002-0123456789ab.parquet"
        temporary.write_bytes(b"PAR1")
    with store.building(SPEC) as builder:
        assert not unfinished.exists()
        assert not temporary.exists()
        assert not (builder.path / record.file).exists()
        assert builder.missing("mask", SHARDS) == [1, 2]


def test_wall_time_is_no_part_of_what_steps_contain(store: Store) -> None:
    def steps(seconds: float) -> pa.Table:
        row = {"step": 1, "round": 0, "epoch": 0, "loss": 0.5, "grad_norm": 1.0, "lr": 1e-4, "samples": 8, "tokens": 99}
        return pa.Table.from_pylist([{**row, "seconds": seconds}])

    contents = []
    for n in range(2):
        with store.building(ArtifactSpec.of("train", 1, {"n": n}, {})) as builder:
            builder.write_shard("training_steps", 0, steps(1.5 + n))
            artifact = builder.commit()
        contents.append(artifact.content)
        assert store.read_table(artifact, "training_steps")["seconds"].to_pylist() == [1.5 + n]
        assert store.verify(artifact) == []
    assert contents[0] == contents[1]


def test_a_root_that_cannot_hold_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create a store"):
        Store(tmp_path / "file")


def test_space_is_asked_for_in_advance(store: Store) -> None:
    store.require_space(1)
    with pytest.raises(NotEnoughSpace, match="needed for rollouts"):
        store.require_space(2**62, "rollouts")


def test_quarantine_takes_nothing_of_the_users(store: Store, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for path in (mine, store.root / ".." / "mine"):
        with pytest.raises(StoreError, match="outside the store"):
            store.quarantine(path, "no")
    assert mine.read_text() == "precious"
    assert store.quarantine(store.root / "artifacts" / "gone", "a faster reader was here") is None


def test_a_newer_format_is_not_mistaken_for_damage(store: Store) -> None:
    build(store)
    path = store.root / "artifacts" / "mask" / SPEC.key / "manifest.json"
    path.write_bytes(seal({**unseal(path), "format": 99}))
    with pytest.raises(StoreError, match="newer"):
        store.get("mask", SPEC.key)
    with pytest.raises(StoreError, match="newer"), store.building(SPEC):
        pass
