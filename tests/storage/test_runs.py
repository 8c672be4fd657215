import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKOUT
from pydantic import ValidationError

from storage.errors import CorruptArtifact, IdentityMismatch, InputError, RunBusy
from storage.runs import RECORDS, RoundState, Run, RunState, StageState

EXPERIMENT = {"seed": 1, "rollout": {"top_p": 0.9}, "rounds": 3}
IDENTITY = {"seed": 1, "rollout": {"top_p": 0.9, "stop": []}}


def test_a_run_is_found_again_as_it_was_saved(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)
    assert (run.experiment, run.identity, run.state.status) == (EXPERIMENT, IDENTITY, "new")
    state = run.state
    stage = StageState(key="ab", state="done", seconds=1.5, rows=8, artifacts={"rollout": "ab"})
    state.rounds.append(
        RoundState(round=0, metrics={"reverse_kl": None, "accuracy_greedy": 0.5}, stages={"r": stage, "a": stage})
    )
    state.status = "running"
    run.save(state)
    again = Run.open(tmp_path, "demo")
    assert again.state == state
    assert list(again.state.rounds[0].stages) == ["r", "a"]  # stages are shown in their order
    assert again.state.updated
    run.save_experiment({**EXPERIMENT, "rounds": 4})
    assert again.experiment["rounds"] == 4
    assert again.log_path("rollout").parent.is_dir()
    assert [found.name for found in Run.list(tmp_path)] == ["demo"]


def test_a_round_is_done_when_its_student_is_known_and_evaluated() -> None:
    def round(number: int, evaluation: StageState | None, student: str | None = "ab") -> RoundState:
        return RoundState(
            round=number, student_sha256=student, stages={} if evaluation is None else {"evaluate": evaluation}
        )

    done = StageState(state="done")
    assert RunState(name="demo").rounds_done == 0 and RunState(name="demo").last_trained is None
    left_out = RunState(name="demo", rounds=[round(0, done), round(1, done), round(2, None), round(3, None, None)])
    assert left_out.rounds_done == 2, "policy.evaluate_every leaves it out; round 3 has no student yet"
    assert [r.round for r in left_out.rounds if r.unevaluated] == [2]
    for last in (round(2, StageState(state="pending")), round(2, StageState(state="failed"))):
        state = RunState(name="demo", rounds=[round(0, done), round(1, StageState(state="cached")), last])
        assert state.rounds_done == 1 and state.last_trained is last
    state.rounds[2] = round(2, done, student=None)
    assert state.rounds_done == 1 and state.last_trained is state.rounds[1]


def test_creating_the_same_run_again_touches_nothing(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)
    run.save(RunState(name="demo", status="stopped"))
    again = Run.create(tmp_path, "demo", {**EXPERIMENT, "rounds": 9}, IDENTITY)
    assert again.state.status == "stopped"
    assert again.experiment["rounds"] == 3


def test_another_identity_is_refused_with_the_difference(tmp_path: Path) -> None:
    Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)
    with pytest.raises(IdentityMismatch) as error:
        Run.create(tmp_path, "demo", EXPERIMENT, {"seed": 1, "rollout": {"top_p": 1.0, "stop": []}, "k": 4})
    assert "rollout.top_p: 0.9 in the run, 1.0 now" in str(error.value)
    assert "k: absent in the run, 4 now" in str(error.value)
    assert "seed" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../evil", "a/b", "/etc", "-x", ".hidden", "a" * 65, "a\n", "a\0b", "ä", "a b", "a\\b"]
)
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    for use in (lambda: Run.open(tmp_path, name), lambda: Run.create(tmp_path, name, EXPERIMENT, IDENTITY)):
        with pytest.raises(InputError, match="run name"):
            use()
    assert list(tmp_path.iterdir()) == []


def failed_run(root: Path, made: dict[str, str]) -> Run:
    run = Run.create(root, "demo", EXPERIMENT, IDENTITY)
    state = run.state
    state.rounds = [RoundState(round=0, stages={name: StageState(state=how) for name, how in made.items()})]
    state.status, state.error = "failed", "no such file"
    run.save(state)
    return run


def test_a_run_that_failed_at_its_start_takes_another_config(tmp_path: Path) -> None:
    """A path that does not exist is in the config: with the name taken, the correction would need another one."""
    run = failed_run(tmp_path, {"model": "done", "model_teacher": "cached", "prepare": "failed"})
    Run.create(tmp_path, "demo", EXPERIMENT | {"seed": 2}, IDENTITY | {"seed": 2})
    assert (run.experiment["seed"], run.identity["seed"]) == (2, 2)
    assert (run.state.status, run.state.error, run.state.rounds) == ("new", None, [])


@pytest.mark.parametrize("held", [False, True])
def test_a_run_that_made_something_or_goes_on_keeps_its_config(tmp_path: Path, held: bool) -> None:
    run = failed_run(tmp_path, {"model": "done", "prepare": "done", "warmup": "failed" if held else "done"})
    if held:
        state = run.state
        state.status = "running"
        run.save(state)
    with pytest.raises(IdentityMismatch, match="seed: 1 in the run, 2 now"):
        Run.create(tmp_path, "demo", EXPERIMENT | {"seed": 2}, IDENTITY | {"seed": 2})
    assert run.experiment == EXPERIMENT


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "9", "a..b", "a" * 64])
def test_ordinary_names_work(tmp_path: Path, name: str) -> None:
    Run.create(tmp_path, name, EXPERIMENT, IDENTITY)
    assert [run.name for run in Run.list(tmp_path)] == [name]


def test_symlinked_runs_are_refused(tmp_path: Path) -> None:
    elsewhere = Run.create(tmp_path / "other", "real", EXPERIMENT, IDENTITY).directory
    Run.create(tmp_path, "mine", EXPERIMENT, IDENTITY)
    (tmp_path / "runs" / "linked").symlink_to(elsewhere)
    with pytest.raises(InputError, match="symbolic link"):
        Run.open(tmp_path, "linked")
    with pytest.raises(InputError, match="symbolic link"):
        Run.create(tmp_path, "linked", EXPERIMENT, IDENTITY)
    assert [run.name for run in Run.list(tmp_path)] == ["mine"]


@pytest.mark.parametrize("stage", ["../x", "a/b", "", ".", "A", "-a"])
def test_logs_stay_in_the_run(tmp_path: Path, stage: str) -> None:
    with pytest.raises(InputError, match="stage"):
        Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY).log_path(stage)


def test_an_unknown_run_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs: none"):
        Run.open(tmp_path, "demo")
    Run.create(tmp_path, "demonstration", EXPERIMENT, IDENTITY)
    with pytest.raises(InputError, match="did you mean 'demonstration'"):
        Run.open(tmp_path, "demonstratoin")


def test_a_held_run_is_busy_at_once_and_names_the_holder(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)
    script = "import sys; from storage.runs import Run\nwith Run.open(sys.argv[1], 'demo').lock(): print(); input()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert f"pid {other.pid} on" in (run.holder() or "")
        with pytest.raises(RunBusy, match="demo") as error, run.lock():
            pass
        assert error.value.exit_code == 75
        assert f"pid {other.pid}" in error.value.holder
        other.communicate("\n", timeout=30)
    assert run.holder() is None
    with run.lock():
        info = run.holder_info()
        assert info is not None
        assert info.pid == os.getpid()


def test_damaged_records_are_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)
    (run.directory / "state.json").write_text('{"name": "demo", "stat')
    with pytest.raises(CorruptArtifact, match=r"state\.json"):
        _ = run.state
    (run.directory / "experiment.yaml").write_text("a: [")
    with pytest.raises(
        CorruptArtifact, match=r"experiment\.yaml: its last line is not a checksum.*opd run CONFIG --name demo"
    ):
        _ = run.experiment
    (run.directory / "identity.json").write_text("{")
    with pytest.raises(CorruptArtifact, match=r"identity\.json"):
        Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)


@pytest.mark.parametrize("record", RECORDS)
def test_no_bit_of_a_run_can_change_unnoticed(tmp_path: Path, record: str) -> None:
    run = Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)
    state = run.state
    state.rounds.append(RoundState(round=0, stages={"r": StageState(state="done", artifacts={"rollout": "ab" * 8})}))
    run.save(state)
    path, part = run.directory / record, record.partition(".")[0]
    good, value = path.read_bytes(), getattr(run, part)
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CorruptArtifact, match=record):
            getattr(run, part)
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptArtifact, match=record):
            getattr(run, part)
    path.write_bytes(good)
    assert getattr(run, part) == value


@pytest.mark.parametrize("record", RECORDS)
def test_files_of_another_run_and_missing_ones_are_refused(tmp_path: Path, record: str) -> None:
    one, other = (Run.create(tmp_path, name, EXPERIMENT, IDENTITY) for name in ("one", "other"))
    (one.directory / record).write_bytes((other.directory / record).read_bytes())
    with pytest.raises(CorruptArtifact, match=rf"runs/one/{record}.*opd r(un CONFIG --name|esume) one"):
        getattr(one, record.partition(".")[0])
    (one.directory / record).unlink()
    assert [run.name for run in Run.list(tmp_path)] == ["one", "other"]  # a run that lost a file is still one
    with pytest.raises(CorruptArtifact, match=rf"runs/one/{record}"):
        getattr(Run.open(tmp_path, "one"), record.partition(".")[0])


def test_a_figure_that_is_no_number_is_saved_as_none(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "demo", EXPERIMENT, IDENTITY)
    state = run.state
    state.rounds.append(RoundState(round=0, metrics={"loss": float("nan")}))
    run.save(state)
    assert run.state.rounds[0].metrics == {"loss": None}


def test_states_are_checked_when_set() -> None:
    stage = StageState()
    with pytest.raises(ValidationError, match="state"):
        stage.state = "finished"  # type: ignore[assignment]
