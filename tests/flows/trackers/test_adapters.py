"""Each adapter: what its package is told, and what TensorBoard's own reader finds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import flows.trackers as trackers
from flows.trackers import Point, Tracked, require_trackers
from storage.errors import ConfigError

FAKES = Path(__file__).parent.parent.parent / "support" / "fake_trackers"
POINTS = [
    Point("step", 3, {"train/loss": 0.25, "train/lr": 1e-3}),
    Point("step", 4, {"train/loss": 0.125, "train/lr": 1e-3}),
    Point("round", 1, {"eval/accuracy": 0.5}),
]


def run(folder: Path, id: str | None = None) -> Tracked:
    return Tracked("demo", "base", {"seed": 1, "train": {"lr": 1e-3, "lora": None}, "plugins": ["a"]}, folder, id)


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the fake package that the test names."""
    monkeypatch.syspath_prepend(FAKES)
    for name in [n for n in sys.modules if n.partition(".")[0] == request.param]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module(request.param)
    assert Path(str(module.__file__)).is_relative_to(FAKES)
    module.calls.clear()
    return module.calls


def test_tensorboard_reads_back_what_was_logged_over_two_calls(tmp_path: Path) -> None:
    config = trackers.tensorboard.TensorBoard()
    first = config.open(run(tmp_path))
    first.log(POINTS[:1])
    first.close("stopped")
    second = config.open(run(tmp_path, first.id))
    second.log(POINTS[1:])
    second.close("finished")
    read = EventAccumulator(str(tmp_path / "tensorboard" / "demo"))
    read.Reload()
    found = {(tag, e.step): e.value for tag in read.Tags()["scalars"] for e in read.Scalars(tag)}
    assert found == pytest.approx({(name, p.number): v for p in POINTS for name, v in p.values.items()})
    (text,) = read.Tensors("config")  # once, although there were two calls
    assert b'"lr": 0.001' in text.tensor_proto.string_val[0]
    assert b"train.lr" in read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
def test_wandb_has_an_axis_of_steps_and_one_of_rounds(calls: list[Any], tmp_path: Path) -> None:
    config = trackers.wandb.WandB(mode="offline")
    opened = config.open(run(tmp_path))
    opened.log(POINTS[1:])
    opened.close("failed")
    begun = calls[0][1]
    assert begun == {
        "name": "demo", "group": "base", "id": opened.id.partition(":")[0], "resume": "allow", "mode": "offline",
        "config": {"seed": 1, "train": {"lr": 1e-3, "lora": None}, "plugins": ["a"]},
    }  # fmt: skip
    assert ("define", "train/*", "step") in calls and ("define", "eval/*", "round") in calls
    assert [call[1] for call in calls if call[0] == "log"] == [
        {"train/loss": 0.125, "train/lr": 1e-3, "step": 4},
        {"eval/accuracy": 0.5, "round": 1},
    ]
    assert calls[-1] == ("finish", 1)
    assert config.open(run(tmp_path, opened.id)).id == opened.id and calls[-7][1]["id"] == begun["id"]


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
def test_wandb_continues_its_own_steps_where_no_service_does(calls: list[Any], tmp_path: Path) -> None:
    """Of two offline folders with equal steps only one would be uploaded."""
    offline = trackers.wandb.WandB(mode="offline")
    first = offline.open(run(tmp_path))
    first.log(POINTS[:2])
    first.close("stopped")
    second = offline.open(run(tmp_path, first.id))
    second.log(POINTS[2:])
    assert [call[2] for call in calls if call[0] == "log"] == [0, 1, 2]
    begun = [call[1]["id"] for call in calls if call[0] == "init"]
    assert begun[0] == begun[1] and second.id == f"{begun[0]}:3"


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
@pytest.mark.parametrize(
    "modes", [("online", "offline", "online", "offline"), ("offline", "online", "online", "offline")]
)
def test_wandb_counts_on_where_the_mode_changes_between_calls(
    calls: list[Any], modes: tuple[Literal["online", "offline"], ...], tmp_path: Path
) -> None:
    id: str | None = None
    for mode in modes:
        opened = trackers.wandb.WandB(mode=mode).open(run(tmp_path, id))
        opened.log(POINTS[:2])
        opened.close("stopped")
        id = opened.id
    assert [call[2] for call in calls if call[0] == "log"] == list(range(8))
    assert len({call[1]["id"] for call in calls if call[0] == "init"}) == 1


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
@pytest.mark.parametrize("count", ["", ":1"])
def test_wandb_goes_on_behind_what_the_service_has(calls: list[Any], count: str, tmp_path: Path) -> None:
    """Of an earlier version the id has no count, and of a killed call the count can be behind."""
    online = trackers.wandb.WandB(mode="online")
    first = online.open(run(tmp_path))
    first.log(POINTS)
    second = online.open(run(tmp_path, first.id.partition(":")[0] + count))
    second.log(POINTS[:1])
    assert [call[2] for call in calls if call[0] == "log"] == [0, 1, 2, 3]


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
def test_wandb_online_needs_a_key_before_the_run(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"trackers\.0: wandb: .*WANDB_API_KEY"):
        require_trackers([trackers.wandb.WandB()])
    require_trackers([trackers.wandb.WandB(mode="offline")])
    monkeypatch.setenv("WANDB_API_KEY", "k")
    require_trackers([trackers.wandb.WandB()])


@pytest.mark.parametrize("calls", ["mlflow"], indirect=True)
def test_mlflow_gets_parameters_once_and_metrics_in_batches(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = trackers.mlflow.MLflow()
    opened = config.open(run(tmp_path))
    opened.log([Point("step", n, {"train/loss": float(n)}) for n in range(1500)])
    opened.close("finished")
    assert calls[0] == ("client", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert calls[1] == ("create", "7", "demo", {"group": "base"})
    parameters = {p.key: p.value for p in calls[2][3]}
    assert parameters == {"seed": "1", "train.lr": "0.001", "train.lora": "null", "plugins": '["a"]'}
    assert [len(call[2]) for call in calls[3:-1]] == [1000, 500]
    assert [(m.key, m.value, m.step) for m in calls[3][2][:2]] == [("train/loss", 0.0, 0), ("train/loss", 1.0, 1)]
    assert calls[-1] == ("end", "r1", "FINISHED")
    calls.clear()
    config.open(run(tmp_path, "r1")).close("stopped")
    assert calls[1:] == [("update", "r1", "RUNNING"), ("end", "r1", "KILLED")]


@pytest.mark.parametrize("calls", ["mlflow"], indirect=True)
def test_mlflow_refuses_a_folder(calls: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"trackers\.0: mlflow: uri './mlruns' is a folder"):
        require_trackers([trackers.mlflow.MLflow(uri="./mlruns")])


@pytest.mark.parametrize("calls", ["trackio"], indirect=True)
def test_trackio_is_continued_by_name_and_keeps_standard_output_clean(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    config = trackers.trackio.Trackio()
    for id in (None, "demo"):
        opened = config.open(run(tmp_path, id))
        opened.log(POINTS[:1])
        opened.close("finished")
    assert [call[1]["resume"] for call in calls if call[0] == "init"] == ["never", "allow"]
    assert ("log", {"train/loss": 0.25, "train/lr": 1e-3}, 3) in calls
    assert capsys.readouterr().out == ""


def test_a_package_that_is_not_there_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackers\.0: tensorboard: .*pip install 'opdflow\[tensorboard\]'"):
        require_trackers([trackers.tensorboard.TensorBoard()])
