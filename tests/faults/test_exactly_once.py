"""Each (round, prompt, sample) is used exactly once (row 3): shards written twice, shards asked for twice, killed workers.
`test_kill.py` checks the same after every kill of a whole run."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import in_process
import pytest
from fault_trials import Trials, both_forms
from scripted_run import NAME, ROUNDS, Trial, prepare_root

from storage.artifacts.shards import SIDECAR, ShardWriter
from storage.runs import Run
from storage.store import ArtifactSpec, Store
from tasks.workers.jobs import Schema

TABLES = {"rollout": "rollouts", "mask": "mask", "teacher_topk": "teacher_topk"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_root(tmp_path_factory.mktemp("once") / "store")


@pytest.fixture(scope="module")
def finished(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "store"
    shutil.copytree(start, root)
    in_process.run(root)
    return root


@pytest.fixture(scope="module")
def expected(finished: Path) -> dict:
    return Trial(finished.parent, finished.parent / "none").result()


def keys(root: Path, table: str) -> dict[int, Counter[str]]:
    """Round -> how often each sample is in the table that the run's round reads."""
    store, found = Store(root), {}
    for entry in Run.open(root, NAME).state.rounds[1:]:
        by_stage = {name: key for state in entry.stages.values() for name, key in state.artifacts.items()}
        (stage,) = [name for name, its in TABLES.items() if its == table]
        artifact = store.get(stage, by_stage[stage])
        assert artifact is not None
        found[entry.round] = Counter(store.read_table(artifact, table, ["sample_id"])["sample_id"].to_pylist())
    return found


def check(root: Path, expected: dict) -> None:
    result = Trial(root.parent, root.parent / "none").result()
    assert result == expected
    count_keys(root, result["used"])


def count_keys(root: Path, used: list) -> None:
    """Each sample is trained on once, and stands once in every table that its round reads; no other does."""
    planned = Counter((number, sample) for number, batch in used for sample in batch)
    assert set(planned.values()) == {1}, "trained on"
    for table in TABLES.values():
        found = keys(root, table)
        assert set(found) == set(range(1, ROUNDS + 1))
        for number, counts in found.items():
            assert counts == Counter(sample for at, sample in planned if at == number), table


@both_forms(short=2, full=100)
def test_shards_that_are_there_twice_count_once(
    start: Path, expected: dict, trials: Trials, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some shards are written twice under two names, each with its sidecar; some copies lose theirs; some are torn."""
    real = ShardWriter.write_shard

    def attempt(name: str) -> None:
        draw = random.Random(f"twice {name}")
        doubled = 0

        def twice(self: ShardWriter, table: str, shard: int, data: object, schema: object = None) -> object:
            nonlocal doubled
            record = real(self, table, shard, data, schema)  # type: ignore[arg-type]
            if table in TABLES.values() and draw.random() < 0.7:
                doubled += 1
                again = real(self, table, shard, data, schema)  # type: ignore[arg-type]
                match draw.choice(["whole", "no sidecar", "torn", "torn first"]):
                    case "no sidecar":
                        (self.path / f"{again.file}{SIDECAR}").unlink()
                    case "torn":
                        tear(self.path / again.file)
                    case "torn first":
                        tear(self.path / record.file)
                        return again
            return record

        root = tmp_path / name / "store"
        shutil.copytree(start, root)
        monkeypatch.setattr(ShardWriter, "write_shard", twice)
        in_process.run(root)
        monkeypatch.setattr(ShardWriter, "write_shard", real)
        assert doubled > 0
        check(root, expected)
        shutil.rmtree(root.parent)

    trials(3, "shards written twice (whole, torn, without sidecar)", map(str, range(count)), attempt)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@both_forms(short=2, full=100)
def test_shards_that_are_served_twice_count_once(
    start: Path, expected: dict, trials: Trials, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers wrote some shards and their answers were lost: the supervisor gives these shards out again."""
    real = in_process.InProcess.share

    def attempt(name: str) -> None:
        draw = random.Random(f"again {name}")

        def again(self: in_process.InProcess, role: str, job: Schema, items: list, *rest: object) -> tuple[list, list]:
            real(self, role, job, [item for item in items if draw.random() < 0.5])
            return real(self, role, job, items, *rest)

        root = tmp_path / name / "store"
        shutil.copytree(start, root)
        monkeypatch.setattr(in_process.InProcess, "share", again)
        in_process.run(root)
        monkeypatch.setattr(in_process.InProcess, "share", real)
        check(root, expected)
        shutil.rmtree(root.parent)

    trials(3, "shards served twice", map(str, range(count)), attempt)


def put_in_its_place(root: Path, table: str, number: int, rows: list[int]) -> None:
    """The round's artifact with this table is replaced by one of these rows, which the store wrote itself."""
    store, run = Store(root), Run.open(root, NAME)
    stage = next(name for name, its in TABLES.items() if its == table)
    state = run.state
    (place,) = [each.artifacts for each in state.rounds[number].stages.values() if stage in each.artifacts]
    old = store.get(stage, place[stage])
    assert old is not None
    with store.building(ArtifactSpec.of(stage, old.version, {"round": number, "rows": rows}, {})) as builder:
        builder.write_shard(table, 0, store.read_table(old, table).take(rows))
        new = builder.commit(tables={table: 1})
    place[stage] = new.key
    with run.lock():
        run.save(state)
    assert store.verify(new, move=False) == []


@pytest.mark.parametrize("table", TABLES.values())
@pytest.mark.parametrize(
    "rows", [[0, *range(8)], [0, 0, *range(2, 8)], [*range(7)]], ids=["twice", "instead", "missing"]
)
def test_a_key_that_is_not_there_once_would_be_seen(
    finished: Path, expected: dict, tmp_path: Path, table: str, rows: list[int]
) -> None:
    """All digests are right, and the count fails."""
    root = tmp_path / "store"
    shutil.copytree(finished, root)
    check(root, expected)
    for number in range(1, ROUNDS + 1):
        put_in_its_place(root, table, number, [*range(8)])
    count_keys(root, expected["used"])
    put_in_its_place(root, table, ROUNDS, rows)
    with pytest.raises(AssertionError, match=rf"^{table}\n"):
        count_keys(root, expected["used"])


def test_a_sample_that_is_trained_on_twice_would_be_seen(finished: Path, expected: dict) -> None:
    count_keys(finished, expected["used"])
    (number, batch), *rest = expected["used"]
    for used in ([(number, [*batch, batch[0]]), *rest], [*expected["used"], (number, batch)]):
        with pytest.raises(AssertionError, match=r"^trained on\n"):
            count_keys(finished, used)
