"""A run as a Prefect deployment on a work pool (`opd deploy`): its workers, on this machine or others, start the flow runs.

The deployment holds the config's path, not the config: every flow run reads the file as `opd run` does. Config and store are
paths as the worker sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config_file import RECIPE, shipped
from flows.prefect_.server import ServerUnavailable, environment
from flows.prefect_.session import asking, first_line, prefect_settings
from flows.run.hints import program
from storage.disk.redact import redact
from storage.errors import ConfigError, InputError, did_you_mean
from storage.runs import RUN_NAME

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool
    from prefect.schedules import Schedule

FLOW = "opd-run"
ENTRYPOINT = "flows.prefect_.deployed.opd_run"
"""What a worker imports; the packages are installed where it runs."""
UNADDRESSED = frozenset("/%&<>#?")
"""Characters that Prefect refuses in a work pool's name, or does not quote in its requests."""


@dataclass(frozen=True)
class Deployed:
    """A deployment as it stands on the server."""

    name: str
    """FLOW/NAME, as Prefect's commands take it."""
    pool: str
    pool_type: str
    api_url: str
    workers: int
    """Workers of the pool that are online."""
    made_pool: bool


def deploy(
    config: Path,
    name: str,
    root: Path,
    pool: str,
    *,
    when: Schedule | None = None,
    rounds: int | None = None,
    overrides: list[str],
    job_variables: Mapping[str, Any],
    create_pool: bool = False,
) -> Deployed:
    """Create or update the deployment FLOW/`name` on the work pool. The config is not read here.

    InputError without PREFECT_API_URL, without the pool, for a job variable that it does not have, and for a deployment of
    that name that works on another store; ServerUnavailable for a server that does not answer."""
    if not RUN_NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: letters, digits, dot, dash and underscore, at most 64")
    if not pool.strip() or set(pool) & UNADDRESSED:
        raise InputError(f"--pool {pool!r}: a name without any of {' '.join(sorted(UNADDRESSED))} is needed")
    with asking("the deployment"), prefect_settings(environment(None)):
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL

        url = PREFECT_API_URL.value()
        if not url:
            raise InputError(
                "opd deploy needs your Prefect server: PREFECT_API_URL is not set. Start one with"
                f" `{program('prefect')} server start`, then export PREFECT_API_URL=http://127.0.0.1:4200/api"
            )
        with get_client(sync_client=True) as client:
            if (error := client.api_healthcheck()) is not None:
                raise ServerUnavailable(
                    f"no Prefect server answers at PREFECT_API_URL={redact(url)} ({first_line(error)}); start it with"
                    f" `{program('prefect')} server start`, or correct the address"
                )
            found, made = _pool(client, pool, create_pool)
            _check_variables(found, job_variables)
            _refuse_others(client, name, root)
            parameters = {
                "config_path": _path_of(config),
                "name": name,
                "root": str(root.absolute()),
                "rounds": rounds,
                "overrides": list(overrides),
                "folder": str(Path.cwd()),
            }
            _apply(name, pool, when, parameters, dict(job_variables))
            workers = client.read_workers_for_work_pool(pool)
        online = sum(worker.status is not None and worker.status.value == "ONLINE" for worker in workers)
    return Deployed(f"{FLOW}/{name}", pool, found.type, url, online, made)


def _path_of(config: Path) -> str:
    """The config as the flow run names it: one that comes with this program by its name, for it lies elsewhere where the worker
    is."""
    if str(config).startswith(RECIPE) or not config.exists():
        return str(config)
    return str(shipped(config).absolute())


def _apply(
    name: str, pool: str, when: Schedule | None, parameters: dict[str, Any], job_variables: dict[str, Any]
) -> None:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from flows.prefect_.deployed import opd_run

    RunnerDeployment.from_flow(
        opd_run,
        name=name,
        schedules=[] if when is None else [when],
        paused=False,
        parameters=parameters,
        description=f"`opd run` of `{name}`. Set up by `opd deploy`.",
        tags=[name],
        work_pool_name=pool,
        job_variables=job_variables,
        entrypoint_type=EntrypointType.MODULE_PATH,
    ).apply(work_pool_name=pool)


def _pool(client: SyncPrefectClient, name: str, create: bool) -> tuple[WorkPool, bool]:
    """The work pool, and whether it was made here (of type process)."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        return client.read_work_pool(name), False
    except ObjectNotFound:
        pass
    if create:
        template = ProcessWorker.get_default_base_job_template()
        return client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template)), True
    there = sorted(pool.name for pool in client.read_work_pools())
    known = f"there are {', '.join(there)}" if there else "there is none"
    raise InputError(
        f"--pool {name!r}: this Prefect server has no such work pool; {known}. Make one for workers that run processes with"
        f" --create-pool, or any with `{program('prefect')} work-pool create {name} --type process`"
    )


def parse_variables(texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` as job variables; a value that is JSON is read as such. ConfigError for anything else."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--job-variable {text!r}: expected KEY=VALUE, for example image=registry/opdflow:gpu")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value
    return found


def _check_variables(pool: WorkPool, given: Mapping[str, Any]) -> None:
    known = (pool.base_job_template.get("variables") or {}).get("properties") or {}
    for name in given:
        if known and name not in known:
            hint = did_you_mean(name, list(known), f"it has {', '.join(sorted(known))}")
            raise InputError(
                f"--job-variable {name}: work pool {pool.name!r} of type {pool.type} has no such variable; {hint}"
            )


def _refuse_others(client: SyncPrefectClient, name: str, root: Path) -> None:
    from prefect.exceptions import ObjectNotFound

    try:
        there = client.read_deployment_by_name(f"{FLOW}/{name}")
    except ObjectNotFound:
        return
    if (other := (there.parameters or {}).get("root")) not in (None, str(root.absolute())):
        raise InputError(
            f"--name {name!r}: this Prefect server has a deployment {FLOW}/{name} for the store {other}; choose another name, or"
            f" remove it with `{program('prefect')} deployment delete {FLOW}/{name}`"
        )
