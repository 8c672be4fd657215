"""A run whose own files are damaged: what is refused, what is rebuilt, and that nothing is collected meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from scripted_run import NAME, Trial, prepare_root
from small_store import flip

from flows.experiment import load_experiment, with_plugins
from flows.run.progress import SilentReporter
from flows.run.recovery import rebuilt_state
from flows.run.runner import fork_experiment, open_run, resume_experiment, run_experiment
from storage.disk.files import unseal
from storage.errors import CorruptArtifact, IdentityMismatch
from storage.runs import RECORDS, Run, RunState
from storage.store import Store
from storage.upkeep.gc import Collector


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a finished run of two rounds."""
    root = prepare_root(tmp_path_factory.mktemp("done") / "store")
    in_process.run(root)
    return root


@pytest.fixture
def root(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "store"))


def essence(state: RunState) -> dict[int, Any]:
    """What a state says of rounds, without times."""
    return {r.round: (r.student_sha256, r.metrics, {k: (s.key, s.artifacts, s.rows) for k, s in r.stages.items()})
            for r in state.rounds}  # fmt: skip


def resume(root: Path, name: str = NAME, **more: Any) -> tuple[list[str], int]:
    """What `opd resume` does: (what it noted, stages built)."""
    said: list[str] = []

    class Reporter(SilentReporter):
        def note(self, round: int, label: str, text: str) -> None:
            said.append(text)

    pool: Any = in_process.InProcess()
    e = resume_experiment(name, root, [])
    _, built = run_experiment(e, name=name, root=root, prefect=False, workers=pool, reporter=Reporter(), **more)
    return said, built


def test_a_bit_in_the_experiment_runs_no_other_experiment(root: Path) -> None:
    run = Run.open(root, NAME)
    path = run.directory / "experiment.yaml"
    before, whole = Trial(root.parent, root.parent).result(), run.experiment
    data = path.read_bytes()
    path.write_bytes(data.replace(b"lr: 0.001", b"lr: 0.003"))
    assert path.read_bytes() != data
    for use in (
        lambda: resume(root),
        lambda: fork_experiment(NAME, 1, root, []),
        lambda: Collector(Store(root)).plan(),
    ):
        with pytest.raises(CorruptArtifact, match=rf"experiment\.yaml: .*opd run CONFIG --name {NAME}"):
            use()
    with pytest.raises(
        IdentityMismatch, match=r"train\.lr: 0\.001 in the run, 0\.003 now"
    ):  # the damaged file as a config
        open_run(load_experiment(path), NAME, root)
    assert in_process.run(root) == []  # the original config: no stage is made again
    assert run.experiment == whole
    assert Trial(root.parent, root.parent).result() == before
    assert "experiment.yaml" in notes(root)


@pytest.mark.parametrize("field", ["checkpoint_minutes: 10", "rounds: 2"])
def test_runtime_and_policy_are_covered_too(root: Path, field: str) -> None:
    path = Run.open(root, NAME).directory / "experiment.yaml"
    data = path.read_bytes()
    assert field.encode() in data
    path.write_bytes(data.replace(field.encode(), field.replace("1", "3").replace("2", "6").encode()))
    with pytest.raises(CorruptArtifact, match=r"experiment\.yaml"):
        resume(root)


def test_the_experiment_of_another_run_is_refused(root: Path) -> None:
    e = scripted_run.experiment()
    other = open_run(e.model_copy(update={"seed": 5}), "other", root)
    shutil.copy(other.directory / "experiment.yaml", Run.open(root, NAME).directory)
    with pytest.raises(CorruptArtifact, match="another run's"):
        resume(root)


def test_a_lost_identity_is_written_again_and_two_lost_ones_are_refused(root: Path) -> None:
    run = Run.open(root, NAME)
    identity = run.identity
    flip(run.directory / "identity.json", 40)
    said, built = resume(root)
    assert built == 0 and run.identity == identity
    assert len(said) == 1 and "identity.json" in said[0]
    (run.directory / "identity.json").unlink()
    (run.directory / "experiment.yaml").unlink()
    with pytest.raises(CorruptArtifact, match="use another --name"):
        in_process.run(root)


def test_the_identity_is_compared_though_the_experiment_agrees(root: Path) -> None:
    run = Run.open(root, NAME)
    with run.lock():
        run.save_identity(run.identity | {"seed": 7})
    with pytest.raises(IdentityMismatch, match="seed: 7 in the run, 0 now"):
        resume(root)


def test_a_lost_state_is_made_again_as_it_was(root: Path) -> None:
    run = Run.open(root, NAME)
    before, result = essence(run.state), Trial(root.parent, root.parent).result()
    path = run.directory / "state.json"
    key = run.state.rounds[2].stages["train"].artifacts["student"]
    path.write_bytes(path.read_bytes().replace(key.encode(), key[::-1].encode()))
    with pytest.raises(CorruptArtifact, match=rf"state\.json: its checksum.*opd resume {NAME}"):
        Collector(Store(root)).plan()
    said, built = resume(root)
    assert built == 0 and essence(run.state) == before
    assert Trial(root.parent, root.parent).result() == result
    assert "state.json" in said[0] and "rounds 0 to 2" in said[1]
    assert Collector(Store(root)).plan().items == []
    assert "state.json" in notes(root) and "moved to quarantine" in run.log_path("run").read_text()


def test_a_made_up_state_knows_what_is_begun_and_what_lies_past_the_config(root: Path) -> None:
    """Else a collection could take the checkpoints of an unfinished round, or rounds made with --rounds."""
    store, e = Store(root), with_plugins(scripted_run.experiment())
    state = Run.open(root, NAME).state
    train = state.rounds[2].stages["train"].artifacts
    for stage in ("student", "trainer_state", "train"):
        (root / "artifacts" / stage / train[stage] / "manifest.json").unlink()
    found = rebuilt_state(NAME, with_plugins(scripted_run.experiment(1)), store)
    assert [r.round for r in found.rounds] == [0, 1, 2]
    assert found.rounds[1].student_sha256 == state.rounds[1].student_sha256 and found.rounds[2].student_sha256 is None
    assert found.rounds[2].stages["train"].artifacts == train and found.rounds[2].stages["train"].state == "pending"
    assert "evaluate" not in found.rounds[2].stages
    for stage in ("student", "trainer_state", "train"):
        shutil.rmtree(root / "artifacts" / stage / train[stage])
    assert "train" not in rebuilt_state(NAME, e, store).rounds[2].stages  # begun by nobody


@pytest.mark.parametrize("record", RECORDS)
def test_a_missing_file_is_damage(root: Path, record: str) -> None:
    run, before = Run.open(root, NAME), Trial(root.parent, root.parent).result()
    (run.directory / record).unlink()
    assert in_process.run(root) == []
    assert Trial(root.parent, root.parent).result() == before
    assert all(getattr(run, name.partition(".")[0]) for name in RECORDS)


def test_files_without_checksums_are_refused_with_a_way_on(root: Path) -> None:
    """As an unreleased version wrote them: another name finds every stage in the store."""
    run = Run.open(root, NAME)
    path = run.directory / "experiment.yaml"
    path.write_bytes(path.read_bytes().rpartition(b"# ")[0])
    identity = unseal(run.directory / "identity.json")["identity"]
    (run.directory / "identity.json").write_text(json.dumps(identity))
    with pytest.raises(CorruptArtifact, match="finished stages are found in the store"):
        in_process.run(root)
    pool: Any = in_process.InProcess()
    e = scripted_run.experiment()
    assert run_experiment(e, name="again", root=root, prefect=False, workers=pool)[1] == 0


def notes(root: Path) -> str:
    return " ".join(json.loads(path.read_text())["path"] for path in (root / "quarantine").glob("*.reason.json"))
