"""`opd deploy`: a run on a Prefect work pool."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.cli.options import Json, Root, Set, example
from flows.cli.schedule import Cron, Every, Timezone, times
from flows.run.hints import DEFAULT_ROOT, program
from storage.errors import ConfigError

Variables = Annotated[
    list[str],
    typer.Option("--job-variable", metavar="KEY=VALUE", help="of the pool's jobs, e.g. image=registry/opdflow:gpu"),
]

out = Console(highlight=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd deploy configs/quickstart.yaml --name demo --pool lab --create-pool"))(deploy)


def deploy(
    config: Annotated[Path, typer.Argument(help="an experiment's YAML, or recipe:NAME", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="the run's and the deployment's name", show_default=False)],
    pool: Annotated[str, typer.Option("--pool", help="a work pool of your Prefect server", show_default=False)],
    every: Every = None,
    cron: Cron = None,
    timezone: Timezone = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="rounds that one flow run makes (default: all that are left)")
    ] = None,
    set_: Set = [],  # noqa: B006  typer copies it
    job_variable: Variables = [],  # noqa: B006
    create_pool: Annotated[
        bool, typer.Option("--create-pool", help="make the pool, of type process, if it is not there")
    ] = False,
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Put a run on a Prefect work pool: its workers start `opd run` as flow runs, by hand, or at the times given here.

    Needs PREFECT_API_URL. Config and store are named by their paths on the worker's machine. Deploying a name again replaces
    its deployment. With --every the first flow run starts after that time.

    Exit codes: 0 deployed, 1 the server does not answer, 2 bad config or input, also a pool that is not there."""
    from flows.experiment import load_experiment
    from flows.prefect_.deploy import deploy as put
    from flows.prefect_.deploy import parse_variables
    from flows.run.runner import has_begun

    if every is None and cron is None and timezone is not None:
        raise ConfigError(f"--timezone {timezone!r}: belongs to --cron")
    when = None if every is None and cron is None else times(every, cron, timezone)
    variables = parse_variables(job_variable)
    load_experiment(
        config, set_, begun=has_begun(name, root)
    )  # what is wrong with the config is said now, not by a worker
    made = put(
        config,
        name,
        root,
        pool,
        when=when,
        rounds=rounds,
        overrides=list(set_),
        job_variables=variables,
        create_pool=create_pool,
    )
    if json_:
        print(json.dumps(dataclasses.asdict(made), indent=2))
        return
    new = ", made now" if made.made_pool else ""
    lines = [f"deployed {made.name} to work pool {made.pool} (type {made.pool_type}{new}) of {made.api_url}"]
    prefect = program("prefect")
    if not made.workers:
        lines.append(f"no worker of this pool is online; start one: {prefect} worker start --pool {made.pool}")
    lines.append(f"start a flow run: {prefect} deployment run {made.name}")
    if when is not None:
        times_ = f"every {when.interval}" if when.interval else f"at {when.cron!r} ({when.timezone})"
        lines.append(f"flow runs start {times_}, until all rounds are done")
    lines.append(f"take it away: {prefect} deployment delete {made.name}")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
