"""What trackers get of a run: names, exact values, what is missing after an earlier call, and nothing of a tracker's failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pytest
from places import TINY

from flows.experiment import load_experiment
from flows.run import tracking as module
from flows.run.progress import SilentReporter
from flows.run.tracking import FILE, tracking
from flows.trackers import Point, Tracked, Tracker, TrackerConfig
from flows.trackers.names import round_point, step_points
from storage.errors import ConfigError
from storage.runs import RoundState, Run, StageState
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store

METRICS = {
    "accuracy_greedy": 0.5, "accuracy_greedy_se": 0.1, "accuracy_greedy/math": 0.25, "reverse_kl": 0.2, "mean_length": None,
    "rollout_tokens": 640.0, "train_loss_last": 0.1,
}  # fmt: skip


def step(number: int, round: int) -> dict[str, Any]:
    fixed = {"epoch": 0, "grad_norm": 1.0, "lr": 0.1, "samples": 4, "tokens": 9, "seconds": 0.5}
    return {"step": number, "round": round, "loss": 1.0 / number, **fixed}


def trained(store: Store, round: int) -> Artifact:
    """A training of two steps."""
    rows = [step(2 * round - 1, round), step(2 * round, round)]
    with store.building(ArtifactSpec.of("train", 1, {"round": round}, {})) as builder:
        if builder.committed is not None:
            return builder.committed
        builder.write_shard("training_steps", 0, pa.Table.from_pylist(rows, schema_for("training_steps")))
        return builder.commit(tables={"training_steps": 1})


class Recording(TrackerConfig):
    """Keeps what it gets; `fails_after` batches it raises."""

    kind: Literal["recording"] = "recording"
    fails_after: int = 99
    module: ClassVar[str] = "json"
    opened: ClassVar[list[Tracked]] = []
    points: ClassVar[list[Point]] = []
    ended: ClassVar[list[str]] = []

    def open(self, run: Tracked) -> Tracker:
        self.opened.append(run)
        return _Open(self)


class _Open:
    id = "the id"

    def __init__(self, config: Recording) -> None:
        self.config, self.left = config, config.fails_after

    def log(self, points: Sequence[Point]) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("no space left on device")
        self.config.points.extend(points)

    def close(self, status: str) -> None:
        self.config.ended.append(status)


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rounds: list[int] = []

    def note(self, round: int, label: str, text: str) -> None:
        self.notes.append(text)

    def round_done(self, state: RoundState) -> None:
        self.rounds.append(state.round)


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    for kept in (Recording.opened, Recording.points, Recording.ended):
        kept.clear()


def called(root: Path, rounds: int, fails_after: int = 99, interrupted: bool = False) -> Notes:
    """One call of a run that trains `rounds` rounds of two steps."""
    e = load_experiment(TINY).model_copy(update={"trackers": (Recording(fails_after=fails_after),)})
    store, notes = Store(root), Notes()
    run = Run.create(root, "demo", e.model_dump(mode="json", exclude={"trackers"}), e.identity())
    with tracking(e, store, run, notes, lambda line: None) as reporter:
        for number in range(1, rounds + 1):
            made = trained(store, number)
            stage = StageState(state="done", seconds=2.0, artifacts={"train": made.key})
            reporter.stage(number, "train", StageState(state="running", artifacts={"train": made.key}))
            reporter.stage(number, "train", stage)
            reporter.round_done(RoundState(round=number, metrics=METRICS, stages={"train": stage}))
        if interrupted:
            raise KeyboardInterrupt
    return notes


def test_steps_and_rounds_come_under_known_names() -> None:
    (first,) = step_points(
        "train", [step(3, 1) | {"student_entropy": 0.5, "overlap_ratio": None, "grad_norm": float("nan")}]
    )
    assert (first.axis, first.number) == ("step", 3)
    assert first.values == pytest.approx({
        "train/epoch": 0, "train/loss": 1 / 3, "train/lr": 0.1, "train/samples": 4, "train/tokens": 9, "train/seconds": 0.5,
        "train/entropy": 0.5, "train/tokens_per_second": 18.0,
    })  # fmt: skip
    stages = {"rollout": StageState(seconds=1.0), "train": StageState(seconds=2.0), "evaluate": StageState()}
    point = round_point(RoundState(round=2, metrics=METRICS, stages=stages))
    assert (point.axis, point.number) == ("round", 2)
    assert point.values == pytest.approx({
        "eval/accuracy": 0.5, "eval/accuracy_se": 0.1, "eval/accuracy/math": 0.25, "eval/reverse_kl": 0.2,
        "rollout/tokens": 640, "time/rollout": 1.0, "time/train": 2.0, "time/round": 3.0,
    })  # fmt: skip


def test_a_later_call_continues_the_run_and_sends_only_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        called(tmp_path, 1, interrupted=True)
    before = len(Recording.points)
    notes = called(tmp_path, 2)
    assert [run.id for run in Recording.opened] == [None, "the id"]
    assert Recording.opened[0].config["train"]["lr"] == 1e-3 and "trackers" not in Recording.opened[0].config
    assert Recording.ended == ["stopped", "finished"]
    assert [(p.axis, p.number) for p in Recording.points] == [
        ("step", 1), ("step", 2), ("round", 1), ("step", 3), ("step", 4), ("round", 2),
    ]  # fmt: skip
    assert before == 3 and notes.rounds == [1, 2] and notes.notes == []


def test_a_tracker_that_fails_warns_once_and_the_next_call_sends_the_rest(tmp_path: Path) -> None:
    notes = called(tmp_path, 2, fails_after=1)
    assert notes.rounds == [1, 2]
    (warning,) = notes.notes
    assert "recording" in warning and "no space left on device" in warning
    called(tmp_path, 2)
    assert [(p.axis, p.number) for p in Recording.points] == [
        ("step", 1), ("step", 2), ("round", 1), ("step", 3), ("step", 4), ("round", 2),
    ]  # fmt: skip


def test_a_tracker_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)

    def hang(self: _Open, points: Sequence[Point]) -> None:
        never.wait()
        raise OSError("too late")

    monkeypatch.setattr(_Open, "log", hang)
    (warning,) = called(tmp_path, 1).notes
    never.set()
    assert "did not finish" in warning


def test_a_damaged_file_of_marks_sends_everything_again(tmp_path: Path) -> None:
    called(tmp_path, 1)
    (tmp_path / "runs" / "demo" / FILE).write_text("{")
    called(tmp_path, 1)
    assert len(Recording.points) == 6 and Recording.opened[1].id is None


def test_trackers_and_hooks_change_no_identity_and_may_change_between_calls(tmp_path: Path) -> None:
    plain = load_experiment(TINY)
    chosen = load_experiment(TINY, ["trackers=tensorboard", "hooks.on_round=[echo, done]"])
    assert chosen.identity() == plain.identity()
    assert [tracker.kind for tracker in chosen.trackers] == ["tensorboard"]
    both = load_experiment(TINY, ["trackers=[wandb, {kind: mlflow, experiment: e}]"])
    assert [tracker.kind for tracker in both.trackers] == ["wandb", "mlflow"]
    with pytest.raises(ConfigError, match="wandb is there twice"):
        load_experiment(TINY, ["trackers=[wandb, wandb]"])
    with pytest.raises(ConfigError, match="tensorbord"):
        load_experiment(TINY, ["trackers=[tensorbord]"])
