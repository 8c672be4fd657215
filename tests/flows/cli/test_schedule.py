"""The options of `opd schedule` say when, or which of them is wrong."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import tzlocal

from flows.cli.schedule import parse_every, times
from flows.prefect_.schedule import serve
from storage.errors import ConfigError, InputError


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
        ((None, "every day", None), "--cron 'every day'"),
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


def test_cron_means_this_machines_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", ":Europe/Berlin")
    tzlocal.reload_localzone()
    assert times(None, "0 2 * * *", None).timezone == "Europe/Berlin"
    assert times(None, "0 2 * * *", "Asia/Tokyo").timezone == "Asia/Tokyo"
    monkeypatch.undo()
    tzlocal.reload_localzone()
