"""The options of `opd schedule` say when, or which of them is wrong."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import tzlocal
from places import TINY

from flows.cli.schedule import parse_every, times
from flows.cli.schedule import schedule as command
from flows.experiment import load_experiment
from flows.prefect_.schedule import serve
from flows.run.runner import open_run
from storage.errors import ConfigError, IdentityMismatch, InputError, OpdError
from storage.runs import RoundState, RunState, StageState


@pytest.mark.parametrize(
    ("text", "seconds"), [("6h", 21600), ("30m", 1800), ("45s", 45), ("1d", 86400), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_every(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "6", "h", "6 hours", "0s", "-1h", "1w", "h6", "9999999h"])
def test_what_is_no_duration_is_refused_naming_it(text: str) -> None:
    with pytest.raises(ConfigError, match="--every"):
        parse_every(text)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((None, None, None), "exactly one"),
        (("1h", "0 2 * * *", None), "exactly one"),
        ((None, "every day", None), "--cron 'every day'.*five fields, as '0 2"),
        ((None, "0 2 * * *", "Europe/Nowhere"), "--timezone 'Europe/Nowhere'"),
        ((None, "0 2 * * *", "europe/berlin"), "--timezone 'europe/berlin'.*did you mean 'Europe/Berlin'"),
        ((None, "0 2 * * *", "UTC+2"), "--timezone 'UTC.2'"),
        ((None, "0 2 * * *", ""), "--timezone ''"),
        (("6h", None, "Europe/Berlin"), "--timezone 'Europe/Berlin': belongs to --cron"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options: tuple[str | None, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        times(*options)


def test_a_name_that_no_run_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--name"):
        serve("../n", "c", tmp_path, times("1h", None, None), 1, [], print)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of runs of which a schedule would be served."""
    names = list[str]()

    def serve(name: str, *_: object) -> int:
        names.append(name)
        return 0

    monkeypatch.setattr("flows.prefect_.schedule.serve", serve)
    return names


def done(root: Path, rounds: int) -> None:
    """A run of tiny.yaml that has so many rounds."""
    experiment = load_experiment(TINY, [f"policy.rounds={rounds}"])
    run = open_run(experiment, "done", root)
    evaluated = {"evaluate": StageState(state="done", seconds=1.0)}
    made = [RoundState(round=n, student_sha256=f"{n}", stages=evaluated) for n in range(rounds + 1)]
    run.save(RunState(name="done", status="finished", rounds=made))


def test_a_run_whose_rounds_are_done_is_not_scheduled(
    tmp_path: Path, served: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done(tmp_path, 2)
    command(TINY, name="done", every="5m", rounds=1, set_=["policy.rounds=2"], root=tmp_path)
    assert served == [] and not (tmp_path / "prefect").exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "done: all 2 rounds are done; for more: --set policy.rounds=3"
    command(TINY, name="done", every="5m", rounds=1, set_=["policy.rounds=3"], root=tmp_path)
    assert served == ["done"]


@pytest.mark.parametrize(
    ("set_", "error", "named"),
    [
        ("trackers=mlflow", ConfigError, r"pip install 'opdflow\[mlflow\]'"),
        ("train.lr=0.5", IdentityMismatch, "run 'done' exists with another identity"),
        ("policy.rounds=two", ConfigError, "policy.rounds"),
    ],
)
def test_what_a_tick_would_refuse_is_refused_before_anything_starts(
    tmp_path: Path, served: list[str], set_: str, error: type[OpdError], named: str
) -> None:
    done(tmp_path, 2)
    with pytest.raises(error, match=named) as caught:
        command(TINY, name="done", every="5m", rounds=1, set_=[set_], root=tmp_path)
    assert caught.value.exit_code == 2 and served == [] and not (tmp_path / "prefect").exists()


def test_cron_means_this_machines_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", ":Europe/Berlin")
    tzlocal.reload_localzone()
    assert times(None, "0 2 * * *", None).timezone == "Europe/Berlin"
    assert times(None, "0 2 * * *", "Asia/Tokyo").timezone == "Asia/Tokyo"
    monkeypatch.undo()
    tzlocal.reload_localzone()
