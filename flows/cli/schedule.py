"""`opd schedule` and `opd ui`: a run that goes on by itself, and a look at what Prefect knows."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zoneinfo import available_timezones

import typer
from rich.console import Console

from flows.cli.options import Root, Set, example
from flows.run.hints import DEFAULT_ROOT
from storage.disk.redact import redact
from storage.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from prefect.schedules import Schedule

Every = Annotated[
    str | None, typer.Option("--every", "--interval", metavar="6h", help="time between two: 6h, 30m, 45s")
]
Cron = Annotated[str | None, typer.Option("--cron", metavar="'0 2 * * *'", help="when, as cron")]
Timezone = Annotated[str | None, typer.Option("--timezone", "--zone", help="for --cron (default: this machine's)")]

out = Console(highlight=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd schedule configs/quickstart.yaml --name nightly --cron '0 2 * * *'"))(schedule)
    app.command(epilog=example("opd ui --root opd-store"))(ui)


def schedule(
    config: Annotated[Path, typer.Argument(help="an experiment's YAML, or recipe:NAME", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="the run that every tick goes on with", show_default=False)],
    every: Every = None,
    cron: Cron = None,
    timezone: Timezone = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="rounds that one tick runs")] = 1,
    set_: Set = [],  # noqa: B006  typer copies it
    root: Root = DEFAULT_ROOT,
) -> None:
    """Let a run go on by itself: every tick runs its next rounds (`--rounds`), until all are done.

    Stays in the foreground. With --every the first tick comes at once. A tick that comes while one is busy is skipped, one
    that fails is tried again by the next. Uses PREFECT_API_URL, else starts a Prefect server on the store's own database.
    When the server is away, the tick under way goes on, and the schedule tries to reach the server again for six hours.

    Exit codes: 0 all rounds are done, 2 bad config or input, 75 scheduled already, 130 stopped (Ctrl-C; all it had
    started is ended, `opd schedule` again goes on), 1 anything else."""
    from flows.config_file import shipped
    from flows.experiment import load_experiment
    from flows.prefect_.schedule import serve
    from flows.run.runner import has_begun, refuse_early

    when = times(every, cron, timezone)
    experiment = load_experiment(config, set_, begun=has_begun(name, root))
    state = refuse_early(experiment, name, root)  # now, not at 2 in the morning
    here = Console(file=sys.stdout, highlight=False)  # Prefect's own lines on standard output are not wanted

    def say(line: str) -> None:
        here.print(redact(line), markup=False, soft_wrap=True)

    goal = experiment.policy.rounds
    if state is not None and state.status == "finished" and state.rounds_done >= goal:
        return say(f"{name}: all {goal} rounds are done; for more: --set policy.rounds={goal + rounds}")
    code = serve(name, str(shipped(config).absolute()), root.absolute(), when, rounds, list(set_), say)
    if code:
        raise typer.Exit(code)


def ui(
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="default: a free one")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Serve Prefect's web interface on this store's history until Ctrl-C; runs that start meanwhile appear in it.

    Loopback only.

    Exit codes: 0 ended, 1 the server could not be started."""
    from flows.prefect_.server import ServerUnavailable, store_server
    from flows.run.stopping import terminating

    if url := os.environ.get("PREFECT_API_URL"):
        out.print(f"PREFECT_API_URL is set, runs report to {redact(url)}: open that server's own address")
        return
    with suppress(KeyboardInterrupt), terminating():
        with store_server(root, lambda line: out.print(line, markup=False), port) as server:
            if port is not None and not server.ui_url.endswith(f":{port}"):
                out.print(f"this store's server runs at another port already (--port {port} has no effect)")
            out.print(f"{server.ui_url}  (Ctrl-C ends it)", soft_wrap=True)
            while server.alive():
                time.sleep(1.0)
        raise ServerUnavailable(f"the Prefect server ended; its log: {server.home / 'server.log'}")


def times(every: str | None, cron: str | None, timezone: str | None) -> Schedule:
    """Prefect's schedule of --every or --cron; ConfigError, naming the option, where it is not one."""
    from prefect.schedules import Cron, Interval
    from tzlocal import get_localzone_name

    if (every is None) == (cron is None):
        raise ConfigError("give exactly one of --every (as 6h, 30m, 45s) and --cron (as '0 2 * * *')")
    if every is not None:
        if timezone is not None:
            raise ConfigError(
                f"--timezone {timezone!r}: belongs to --cron; --every counts from now, whatever the time zone"
            )
        interval = parse_every(every)
        return Interval(interval, anchor_date=datetime.now(UTC) + interval)
    zone = get_localzone_name() if timezone is None else timezone
    if zone not in (zones := available_timezones()):
        hint = next((f"did you mean {name!r}?" for name in zones if name.lower() == zone.lower()), "")
        hint = hint or did_you_mean(zone, zones, "write it as Europe/Berlin or UTC")
        raise ConfigError(f"--timezone {zone!r}: there is no such time zone; {hint}")
    try:
        return Cron(str(cron), timezone=zone)
    except ValueError as error:
        raise ConfigError(
            f"--cron {cron!r} is refused; write five fields, as '0 2 * * *' for 02:00 every day: {error}"
        ) from error


def parse_every(text: str) -> timedelta:
    """`6h`, `30m`, `45s`, `1d`, `1h30m` as a timedelta between one second and a year; ConfigError otherwise."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text.strip()):
        raise ConfigError(f"--every {text!r} is not a duration; write 6h, 30m, 45s, 1d or 1h30m")
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    seconds = sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", text))
    if not 1 <= seconds <= 366 * 86400:
        raise ConfigError(f"--every {text!r}: must be between 1s and 366d")
    return timedelta(seconds=seconds)
