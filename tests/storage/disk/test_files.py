import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.disk.files import explain_full_disk, quarantine, replace_atomically, seal, unseal
from storage.errors import CorruptArtifact, NotEnoughSpace, RunBusy

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full
def test_a_full_disk_is_named_whoever_notices() -> None:
    with pytest.raises(NotEnoughSpace, match=r"disk is full.*free"), explain_full_disk(FULL):
        FULL.write_bytes(b"x")
    with (
        pytest.raises(NotEnoughSpace, match="disk is full"),
        explain_full_disk(FULL),
        pa.OSFile(str(FULL), "wb") as sink,
    ):
        pq.write_table(pa.table({"x": list(range(100_000))}), sink)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), explain_full_disk(tmp_path):
        tmp_path.write_bytes(b"x")


def test_replacing_leaves_no_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for data in (b"one", b"two"):
        replace_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_seal_notices_every_changed_character(tmp_path: Path) -> None:
    content = {"rows": 12, "files": ["a", "b"], "seconds": 0.5, "none": None}
    path = tmp_path / "sealed"
    good = seal(content)
    path.write_bytes(good)
    assert unseal(path) == content
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            assert unseal(path) == content, at  # white space became other white space
        except CorruptArtifact as error:
            assert str(path) in str(error)
    for data in (b"", b"[]", b"null", good[:-5], b"{}"):
        path.write_bytes(data)
        with pytest.raises(CorruptArtifact, match="sealed"):
            unseal(path)


def test_quarantine_keeps_the_bytes_and_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "artifacts" / "mask" / "k" / "shard"
    path.parent.mkdir(parents=True)
    for data in (b"one", b"two"):
        path.write_bytes(data)
        moved = quarantine(tmp_path, path, "bit rot")
        assert moved is not None
        assert moved.read_bytes() == data
        note = moved.with_name(moved.name + ".reason.json").read_text()
        assert "bit rot" in note
        assert "artifacts/mask/k/shard" in note
    assert not path.exists()


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RunBusy("run 'x' is held", "pid 1")))
    assert (str(error), error.holder, error.exit_code) == ("run 'x' is held", "pid 1", 75)
