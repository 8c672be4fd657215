"""Runs go to a remote and come back byte for byte; nothing committed is replaced, and damage is found by its file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_store import flip, forget_memory

from storage.artifacts.artifact import MANIFEST, load_manifest
from storage.artifacts.verify import Verified, verify_store
from storage.disk.files import seal, unsealed
from storage.disk.locks import alone
from storage.disk.remote import PART, Remote, RemoteError, remote_of
from storage.errors import CorruptArtifact, IdentityMismatch, InputError, RunBusy
from storage.runs import RECORDS, Run, StageState
from storage.store import ArtifactSpec, Store
from storage.upkeep.gc import Collector, evict
from storage.upkeep.pull import pull
from storage.upkeep.push import push
from storage.upkeep.remote_layout import FORMAT, LISTED, MARKER


@pytest.fixture(params=["file", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    """An empty folder of this machine, or of a file system without atomic renames."""
    yield Remote(f"file://{tmp_path / 'a remote'}" if request.param == "file" else "memory://a/remote")
    if request.param == "memory":
        forget_memory()


@pytest.fixture
def store(example_store: Path) -> Store:
    return Store(example_store)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


def contents(remote: Remote) -> dict[str, bytes | None]:
    return {name: remote.read(name) for name in remote.sizes("")}


def files(root: Path) -> dict[str, tuple[bytes, int]]:
    """Everything of the artifacts and of the runs' records, with times, as planning looks at them."""
    found = [p for p in (root / "artifacts").rglob("*") if p.is_file() and not p.name.endswith(".sidecar.json")]
    found += [root / "runs" / run.name / name for run in Run.list(root) for name in RECORDS]
    return {
        str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns if p.suffix == ".parquet" else 0) for p in found
    }


def runs(store: Store, *names: str) -> list[Run]:
    return [Run.open(store.root, name) for name in names]


def a_shard(store: Store, run: str = "demo", round: int = 1, label: str = "rollout", stage: str = "rollout") -> str:
    key = Run.open(store.root, run).state.rounds[round].stages[label].artifacts[stage]
    return min(f"artifacts/{stage}/{key}/{p.name}" for p in (store.root / "artifacts" / stage / key).glob("*.parquet"))


def test_all_runs_there_and_back(store: Store, remote: Remote, other: Store) -> None:
    sent = push(store, remote, Run.list(store.root))
    assert sent.runs == ["demo", "other"] and len(sent.artifacts) == 16 and sent.present == 0
    counted: list[int] = []
    fetched = pull(other, remote, None, moved=counted.append)
    assert fetched.runs == ["demo", "other"] and sum(counted) == fetched.bytes == sent.bytes > 0
    unused = {name for name in files(store.root) if name not in files(other.root)}
    assert len({name.split("/")[2] for name in unused}) == 1, "only what no run uses stays behind"
    assert all(files(store.root)[name] == content for name, content in files(other.root).items())
    found = Verified()
    verify_store(other.root, found, lambda name: None)
    assert found.problems == [] and found.artifacts == 16
    assert list((other.root / "memo").iterdir()) == [], "planning needs to hash nothing"
    before = contents(remote)
    again, back = push(store, remote, Run.list(store.root)), pull(other, remote, None)
    assert (again.runs, again.bytes, again.present) == (back.runs, back.bytes, back.present) == ([], 0, 16)
    assert contents(remote) == before


def test_one_run_and_what_it_needs(store: Store, remote: Remote, other: Store) -> None:
    assert push(store, remote, runs(store, "other")).runs == ["other"]
    assert pull(other, remote, ["other"], apply=False).runs == ["other"] and Run.list(other.root) == []
    pull(other, remote, ["other"])
    assert [run.name for run in Run.list(other.root)] == ["other"]
    assert {(a.stage, a.key) for a in other.list()} == {
        name
        for r in Run.open(store.root, "other").state.rounds
        for s in r.stages.values()
        for name in s.artifacts.items()
    }
    with pytest.raises(InputError, match="did you mean 'other'"):
        pull(other, remote, ["othr"])


def test_what_they_were_made_from_goes_too(store: Store, remote: Remote) -> None:
    """An artifact that no run names, whose content is in the key of one that a run names."""
    with store.building(ArtifactSpec.of("student", 1, {"number": 77}, {})) as builder:
        (builder.directory() / "config.json").write_text("{}")
        made = builder.commit()
    with store.building(ArtifactSpec.of("rollout", 1, {"number": 78}, {"student": made.content["model"]})) as builder:
        read = builder.commit(tables={})
    run = Run.open(store.root, "other")
    with run.lock():
        state = run.state
        state.rounds[1].stages["rollout"] = StageState(state="done", key=read.key, artifacts={"rollout": read.key})
        run.save(state)
    sent = push(store, remote, [run])
    assert {("student", made.key), ("rollout", read.key)} <= sent.artifacts.keys()


def test_a_run_that_goes_on_is_sent_again_and_never_back(store: Store, remote: Remote, other: Store) -> None:
    run = Run.open(store.root, "demo")
    whole = run.state
    with run.lock():
        earlier = whole.model_copy(deep=True)
        earlier.rounds = earlier.rounds[:2]
        run.save(earlier)
    push(store, remote, [run])
    pull(other, remote, ["demo"])
    with run.lock():
        run.save(whole)
    assert push(store, remote, [run]).runs == ["demo"]
    fetched = pull(other, remote, ["demo"])
    assert fetched.runs == ["demo"] and 0 < len(fetched.artifacts) < 16
    assert Run.open(other.root, "demo").state.rounds == whole.rounds
    with run.lock():
        run.save(earlier)
    before = contents(remote)
    plan = push(store, remote, [run])
    assert plan.runs == [] and "ahead at the remote" in plan.notes[0] and contents(remote) == before
    remote.fs.rm(remote.at("runs"), recursive=True)
    push(store, remote, [run])
    plan = pull(other, remote, ["demo"])
    assert plan.runs == [] and "ahead here" in plan.notes[0]
    assert Run.open(other.root, "demo").state.rounds == whole.rounds


def test_runs_that_parted_and_other_runs_of_a_name_are_refused(store: Store, remote: Remote, tmp_path: Path) -> None:
    push(store, remote, runs(store, "demo"))
    before = contents(remote)
    parted = tmp_path / "parted"
    shutil.copytree(store.root, parted)
    run = Run.open(parted, "demo")
    with run.lock():
        state = run.state
        state.rounds[2].student_sha256 = "ab" * 32
        run.save(state)
    with pytest.raises(InputError, match=r"gone another way.*student of round 2"):
        push(Store(parted), remote, [run])
    with pytest.raises(InputError, match="gone another way"):
        pull(Store(parted), remote, ["demo"])
    with run.lock():
        run.save_identity({"seed": 1})
    for act in (lambda: push(Store(parted), remote, [run]), lambda: pull(Store(parted), remote, ["demo"])):
        with pytest.raises(IdentityMismatch, match="another run 'demo'"):
            act()
    assert contents(remote) == before


def test_a_committed_artifact_is_never_replaced(store: Store, remote: Remote, other: Store) -> None:
    push(store, remote, runs(store, "demo"))
    shard = a_shard(store)
    where = f"{shard.rpartition('/')[0]}/{MANIFEST}"
    content = unsealed(where, remote.read(where) or b"")
    content["artifact"]["content"]["rollouts"] = "ab" * 32
    remote.replace(where, seal(content))
    remote.fs.rm(remote.at("runs"), recursive=True)
    before = contents(remote)
    with pytest.raises(RemoteError, match=r"is there with other content \(rollouts\).*never replaced"):
        push(store, remote, runs(store, "demo"))
    assert contents(remote) == before
    remote.fs.rm(remote.at(""), recursive=True)
    push(store, remote, runs(store, "demo"))
    pull(other, remote, ["demo"])
    path = other.root / where
    path.write_bytes(seal(content))
    kept = files(other.root)
    with pytest.raises(RemoteError, match=r"other content here than at .* \(rollouts\)"):
        pull(other, remote, ["demo"])
    assert files(other.root) == kept


def test_evicted_artifacts_are_records(store: Store, remote: Remote, other: Store, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(store.root, whole)
    folder = (store.root / a_shard(store)).parent
    evict(folder)
    sent = push(store, remote, runs(store, "demo"))
    assert sum(entry.evicted for entry in sent.artifacts.values()) == 1
    assert remote.names(str(folder.relative_to(store.root))) == [MANIFEST]
    pull(other, remote, ["demo"])
    artifact = other.require("rollout", folder.name)
    assert other.evicted(artifact) is not None
    kept = Store(whole)
    sent = push(kept, remote, runs(kept, "demo"))  # a store that has the data completes what is there
    assert list(sent.artifacts) == [("rollout", folder.name)]
    third = Store(tmp_path / "third")
    pull(third, remote, ["demo"])
    assert third.read_table(artifact, "rollouts").equals(kept.read_table(artifact, "rollouts"))
    pull(other, remote, ["demo"])
    assert other.evicted(artifact) is not None, "what is evicted here stays so"


def test_damage_there_is_found_by_file_and_mended(store: Store, remote: Remote, other: Store) -> None:
    push(store, remote, runs(store, "demo"))
    shard = a_shard(store)
    data = bytearray(remote.read(shard) or b"")
    data[len(data) // 2] ^= 1
    remote.fs.pipe_file(remote.at(shard), bytes(data))
    with pytest.raises(RemoteError, match="its bytes have sha256") as caught:
        pull(other, remote, ["demo"])
    assert shard in str(caught.value) and "\n" not in str(caught.value)
    assert Run.list(other.root) == [] and not (other.root / shard).exists()
    assert push(store, remote, runs(store, "demo")).present == 16  # listed as there
    push(store, remote, runs(store, "demo"), again=True)
    pull(other, remote, ["demo"])
    assert (other.root / shard).read_bytes() == (store.root / shard).read_bytes()
    remote.fs.rm_file(remote.at(shard))
    shutil.rmtree(other.root)
    with pytest.raises(RemoteError, match="missing"):
        pull(Store(other.root), remote, ["demo"])


def test_damage_here_is_not_sent_and_is_mended_by_a_pull(store: Store, remote: Remote) -> None:
    push(store, remote, runs(store, "other"))
    shard = a_shard(store)
    good = (store.root / shard).read_bytes()
    flip(store.root / shard, 300)  # with its time, as a disk does it
    remote.fs.rm(remote.at("artifacts"), recursive=True)
    remote.fs.rm(remote.at("runs"), recursive=True)
    with pytest.raises(CorruptArtifact, match="its bytes differ") as caught:
        push(store, remote, runs(store, "demo"))
    assert shard in str(caught.value) and remote.names("runs") == []
    assert remote.read(shard) is None
    (store.root / shard).write_bytes(good)
    push(store, remote, runs(store, "demo"))
    (store.root / shard).unlink()
    with pytest.raises(CorruptArtifact, match="opd resume demo"):
        push(store, remote, runs(store, "demo"))
    fetched = pull(store, remote, ["demo"])
    assert len(fetched.artifacts) == 1 and fetched.runs == [] and (store.root / shard).read_bytes() == good


def test_a_running_run(store: Store, remote: Remote, other: Store) -> None:
    demo, neighbour = runs(store, "demo", "other")
    push(store, remote, [demo])
    pull(other, remote, ["demo"])
    mine = Run.open(other.root, "demo")
    before = contents(remote)
    with alone(demo.directory / "run.lock"):
        with pytest.raises(RunBusy):
            push(store, remote, [demo, neighbour])
        assert contents(remote) == before
        plan = push(store, remote, [demo, neighbour], leave_out_busy=True)
        assert plan.runs == ["other"] and list(plan.left_out) == ["demo"]
    with alone(mine.directory / "run.lock"), pytest.raises(RunBusy):
        pull(other, remote, ["demo"])


def test_a_collection_during_a_pull_removes_nothing_of_it(store: Store, remote: Remote, other: Store) -> None:
    push(store, remote, runs(store, "demo"))
    seen: list[int] = []

    def collect(size: int) -> None:
        collector = Collector(other)
        plan = collector.plan()
        seen.append(len(plan.items))
        assert [item for item in collector.apply(plan) if item.kind in ("unused", "unfinished")] == []

    pull(other, remote, ["demo"], moved=collect, transfers=1)
    assert max(seen) > 0, "without the locks there was something to remove"
    assert len(other.list()) == 16


def test_other_content_of_the_remote_is_refused_before_anything_is_written(
    store: Store, remote: Remote, other: Store
) -> None:
    with pytest.raises(RemoteError, match="no store is there"):
        pull(other, remote, ["demo"])
    remote.replace("holiday/photo.jpg", b"x")
    for mark, said in (
        (None, "has other files .holiday."),
        (b"not sealed", "another store format"),
        (seal({"store": "something", "format": 1}), "another store format"),
        (seal({"store": "opdflow", "format": FORMAT + 1}), "newer than this program's"),
    ):
        if mark is not None:
            remote.replace(MARKER, mark)
        before = contents(remote)
        with pytest.raises(RemoteError, match=said):
            push(store, remote, runs(store, "demo"))
        assert contents(remote) == before
        with pytest.raises(RemoteError):
            pull(other, remote, None)
    assert other.list() == []


def test_a_push_that_has_not_ended_shows_no_run(store: Store, remote: Remote, other: Store) -> None:
    push(store, remote, runs(store, "demo", "other"))
    remote.fs.rm_file(remote.at(f"runs/demo/{RECORDS[-1]}"))
    assert pull(other, remote, None).runs == ["other"]
    with pytest.raises(InputError):
        pull(other, remote, ["demo"])
    push(store, remote, runs(store, "demo"))
    remote.replace(f"runs/demo/{LISTED}", b"{")
    with pytest.raises(RemoteError, match=r"runs/demo: the records of the run are damaged.*push it again"):
        pull(other, remote, ["demo"])


def test_large_files_are_streamed(remote: Remote, tmp_path: Path) -> None:
    """More than two parts, and not a whole number of them."""
    import hashlib

    data = b"0123456789abcdef" * ((2 * PART + PART // 2) // 16) + b"end"
    (tmp_path / "here").write_bytes(data)
    sha, sizes = hashlib.sha256(data).hexdigest(), list[int]()
    remote.upload(tmp_path / "here", "a/large", len(data), sha, sizes.append)
    assert sum(sizes) == len(data) and max(sizes) == PART
    remote.download("a/large", tmp_path / "b" / "back", tmp_path, len(data), sha)
    assert (tmp_path / "b" / "back").read_bytes() == data
    with pytest.raises(RemoteError, match="sha256"):
        remote.download("a/large", tmp_path / "b" / "other", tmp_path, len(data), "00" * 32)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["back"]
    with pytest.raises(CorruptArtifact):
        remote.upload(tmp_path / "here", "a/wrong", len(data), "00" * 32)
    assert remote.read("a/wrong") is None


def test_addresses() -> None:
    assert remote_of("memory:/bucket/a").url == remote_of("memory://bucket/a/").url == "memory://bucket/a"
    assert remote_of("some/folder").folder == Path.cwd() / "some/folder"
    assert remote_of("file:/tmp/x").folder == Path("/tmp/x")
    for address, said in (
        ("nothing://x/y", "unknown protocol 'nothing'; use s3://"),
        ("memory://", "names no bucket or folder"),
        ("gs://bucket/x", r"pip install 'opdflow\[gcs\]'"),
    ):
        with pytest.raises(RemoteError, match=said) as caught:
            remote_of(address)
        assert "\n" not in str(caught.value)


def test_a_store_is_not_pushed_into_itself(store: Store) -> None:
    for folder in (store.root, store.root / "backup"):
        with pytest.raises(InputError, match="this store itself"):
            push(store, Remote(f"file://{folder}"), runs(store, "demo"))
    assert load_manifest((store.root / a_shard(store)).parent) is not None
