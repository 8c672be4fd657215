"""`opd schedule` and `opd ui`: a run that goes on by itself, and a look at what Prefect knows."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.cli.options import Root, example
from flows.run.hints import DEFAULT_ROOT
from storage.disk.redact import redact

Set = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="override a field, e.g. train.lr=1e-4")]

out = Console(highlight=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd schedule configs/quickstart.yaml --name nightly --cron '0 2 * * *'"))(schedule)
    app.command(epilog=example("opd ui --root opd-store"))(ui)


def schedule(
    config: Annotated[Path, typer.Argument(help="an experiment's YAML", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="the run that every tick goes on with", show_default=False)],
    every: Annotated[str | None, typer.Option("--every", metavar="6h", help="time between ticks: 6h, 30m, 45s")] = None,
    cron: Annotated[str | None, typer.Option("--cron", metavar="'0 2 * * *'", help="when to tick, as cron")] = None,
    timezone: Annotated[str | None, typer.Option("--timezone", help="for --cron (default: this machine's)")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="rounds that one tick runs")] = 1,
    set_: Set = [],  # noqa: B006  typer copies it
    root: Root = DEFAULT_ROOT,
) -> None:
    """Let a run go on by itself: every tick runs its next round(s), until the configured rounds are done.

    Stays in the foreground. With --every the first tick comes at once. A tick that comes while one is busy is skipped, one
    that fails is tried again by the next. Uses PREFECT_API_URL, else starts a Prefect server on the store's own database.

    Exit codes: 0 all rounds are done, 2 bad config or input, 75 scheduled already, 130 stopped (Ctrl-C; all it had
    started is ended, `opd schedule` again goes on), 1 anything else."""
    from flows.experiment import load_experiment
    from flows.prefect_.schedule import Schedule, parse_every, serve

    plan = Schedule(
        config_path=str(config.absolute()),
        name=name,
        root=str(root.absolute()),
        every=None if every is None else parse_every(every),
        cron=cron,
        timezone=timezone,
        rounds=rounds,
        overrides=list(set_),
    )
    load_experiment(config, set_)  # what is wrong with the config is said now, not at 2 in the morning
    code = serve(plan, lambda line: out.print(line, markup=False, soft_wrap=True))
    if code:
        raise typer.Exit(code)


def ui(
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="default: a free one")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Serve Prefect's web interface on this store's history until Ctrl-C; runs that start meanwhile appear in it.

    Loopback only.

    Exit codes: 0 ended, 1 the server could not be started."""
    from flows.prefect_.server import EmbeddedServer, ServerUnavailable

    if url := os.environ.get("PREFECT_API_URL"):
        out.print(f"PREFECT_API_URL is set, runs report to {redact(url)}: open that server's own address")
        return
    server = EmbeddedServer(root, lambda line: out.print(line, markup=False))
    ended = threading.Event()
    old = signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    try:
        server.ensure(port)
        if port is not None and server.port != port:
            out.print(f"this store's server runs on port {server.port} already")
        out.print(f"{server.ui_url}  (Ctrl-C ends it)", soft_wrap=True)
        while not ended.wait(1.0):
            if not server.alive():
                raise ServerUnavailable(f"the Prefect server ended; its log: {server.log_path}")
    except KeyboardInterrupt:
        pass
    finally:
        server.release()
        signal.signal(signal.SIGTERM, old)
