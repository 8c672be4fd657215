"""The flow that a worker of a work pool runs (`opd deploy`): what `opd run` does, as Prefect imports it by name.

Prefect imports this module in the flow's own process, so it imports Prefect at the top. The run's lock keeps two flow runs, on
whichever hosts, from working on one run; a second one ends as Skipped."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

from flows.prefect_.deploy import FLOW
from flows.prefect_.outcome import FINISHED, REFUSED, outcome
from flows.run.hints import opd_command
from flows.run.stopping import terminating
from storage.runs import RunState


@flow(name=FLOW, flow_run_name="{name} run", persist_result=False)
def opd_run(
    config_path: str,
    name: str,
    root: str,
    rounds: int | None = None,
    overrides: list[str] = [],  # noqa: B006  nothing changes it
    folder: str | None = None,
) -> Any:
    """Run an experiment, or continue it, up to policy.rounds.

    Args:
        config_path: an experiment's YAML as the worker sees it, or recipe:NAME
        name: the run's name
        root: the store's folder as the worker sees it
        rounds: rounds that this flow run makes at most; null: all that are left
        overrides: fields to override, for example train.lr=1e-4
        folder: where relative paths of the overrides start; null: the flow's working directory"""

    def work() -> RunState:
        from flows.experiment import load_experiment
        from flows.run.runner import has_begun, run_experiment

        experiment = load_experiment(config_path, overrides, folder, has_begun(name, root))
        return run_experiment(experiment, name=name, root=root, further=rounds)[0]

    try:
        with terminating():  # from the first line on: Prefect would call the run crashed
            again, over = "retry it, or start another flow run", "another attempt would end the same"
            state = outcome(
                work, name, Path(root), who=f"the flow run on {socket.gethostname()}", again=again, over=over
            )
    except KeyboardInterrupt:
        go_on = opd_command(Path(root), "resume", name)
        return _ends_as(Cancelled(message=f"stopped; what is finished stays. To go on: retry it, or {go_on}"))
    if state.name in (FINISHED, REFUSED):
        _pause()
    return state if state.is_completed() else _ends_as(state)


def _ends_as(state: Any) -> Any:
    """Sets the flow run's last state and ends its process with 0: after an exit with an error Prefect's runner calls the flow run
    crashed, also when somebody has retried it in the meantime. A flow run that is being cancelled is left to the runner,
    which says so when the process is gone. The state, for Prefect to report, where the server does not answer now."""
    try:
        with get_client(sync_client=True) as client:
            now = client.read_flow_run(UUID(flow_run.id)).state
            if now is None or not now.is_cancelling():
                client.set_flow_run_state(UUID(flow_run.id), state, force=True)
    except Exception:
        return state
    raise Abort(state.message)


def _pause() -> None:
    """End the deployment's schedule: no further flow run would do anything."""
    with suppress(Exception), get_client(sync_client=True) as client:
        if deployment.id and client.read_deployment(UUID(deployment.id)).schedules:
            client.pause_deployment(deployment.id)
