"""A run that goes on by itself: a Prefect deployment, each of whose flow runs (ticks) runs the next rounds of the same run.

Prefect's runner serves it and starts a fresh process for every tick, which can be ended from outside (SIGTERM, then SIGKILL;
the kernel drops the run's lock, the workers see their pipe close). Two things keep ticks from doubling a round, each
sufficient: the deployment's concurrency limit of one with CANCEL_NEW (a tick that comes while one is busy is cancelled, not
queued), and the run's lock (the tick is `Skipped`), which also holds against `opd run` and against another server. A third
keeps schedules apart: one `opd schedule` per name."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.prefect_.outcome import FINISHED, REFUSED, outcome
from flows.prefect_.server import ServerUnavailable
from flows.prefect_.session import prefect_session
from storage.disk import locks
from storage.errors import InputError, RunBusy
from storage.runs import RUN_NAME, RunState

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.schedules import Schedule

INTERRUPTED = 130
SILENT_SECONDS = 120.0
"""How long the server may plan no tick (it plans one within 5 seconds, or 60), or not answer, before the schedule ends."""


def serve(
    name: str,
    config_path: str,
    root: Path,
    when: Schedule,
    rounds: int,
    overrides: list[str],
    say: Callable[[str], None],
) -> int:
    """Serve ticks until the run's configured rounds are done; the exit code: 0 done, 130 stopped by a signal, 2 after an
    error that no further tick could cure (a changed config, a name held by another experiment).

    Raises RunBusy when this run is scheduled already, ServerUnavailable without a usable Prefect API."""

    def busy(holder: str) -> None:
        raise RunBusy(f"run {name!r} is scheduled already, by {holder}; stop that one first", holder)

    if not RUN_NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: letters, digits, dot, dash and underscore, at most 64")
    with ExitStack() as stack:
        stack.enter_context(locks.locked(root / "prefect" / f"schedule-{name}.lock", busy))
        session = stack.enter_context(prefect_session(root, warn=say))
        if not session.active:
            raise ServerUnavailable("a schedule needs a Prefect server, see the warning above")
        times = f"every {when.interval}" if when.interval else f"at {when.cron!r} ({when.timezone})"
        seen = f"; seen at {session.server.ui_url}" if session.server else ""
        say(f"{name}: {rounds} round(s) {times}; Ctrl-C stops it{seen}")
        what = {"config_path": config_path, "name": name, "root": str(root), "rounds": rounds, "overrides": overrides}
        try:
            return asyncio.run(_serve(what, when, say))
        except asyncio.CancelledError:  # stopped by a signal before the first tick
            say(_stopping(name))
            return INTERRUPTED


def _stopping(name: str) -> str:
    return f"stopping; what is finished stays. To go on: opd schedule again, or opd resume {name}"


def _on_signals(call: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, call)


async def _serve(what: dict[str, Any], when: Schedule, say: Callable[[str], None]) -> int:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.runner import Runner

    # An exception from a signal handler would come up in whatever the loop does at that moment, and end as a traceback.
    main = asyncio.current_task()
    assert main is not None
    _on_signals(main.cancel)
    # What `flow.serve` does, with two differences: a tick is not fetched (and does not take the only slot) before its time,
    # and no limit of the runner's, over which a tick would wait: it must reach the server, whose CANCEL_NEW ends it.
    place = hashlib.sha256(f"{socket.gethostname()}:{Path(what['root']).resolve()}".encode()).hexdigest()[:6]
    name = f"{what['name']}-{place}"  # a Prefect server may serve many hosts and roots
    pace = min(10.0, max(1.0, when.interval.total_seconds() / 4)) if when.interval else 10.0
    runner = Runner(name=name, query_seconds=pace, prefetch_seconds=0, limit=None)
    deployment = await runner.aadd_flow(
        flow(name="opd-schedule", flow_run_name="{name} tick", persist_result=False)(tick),
        name=name,
        schedule=when,
        parameters=what,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        description=f"Every tick runs the next {what['rounds']} round(s) of `{what['name']}`.",
        tags=[what["name"]],
    )
    stopping = asyncio.Event()
    async with get_client() as client:
        await _end_old_ticks(client, deployment)
        if when.interval is not None:  # the first tick of an interval comes at once
            await client.create_flow_run_from_deployment(deployment)
        serving = asyncio.ensure_future(runner.start())
        try:
            while not runner.started and not serving.done():
                await asyncio.sleep(0.05)
            _on_signals(stopping.set)  # replaces the runner's own handler too, which blocks the loop
            code = await _watch(client, deployment, what["name"], stopping, serving, say)
        finally:
            if runner.started:
                with suppress(Exception):
                    await runner.astop()
            else:
                serving.cancel()
            with suppress(Exception, asyncio.CancelledError):
                await serving
    return code


async def _watch(
    client: PrefectClient,
    deployment: UUID,
    name: str,
    stopping: asyncio.Event,
    serving: asyncio.Future[None],
    say: Callable[[str], None],
) -> int:
    """Report what ticks came to; return the exit code when one says that there is nothing left to do."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    ours = DeploymentFilter.model_validate({"id": {"any_": [deployment]}})
    ended = FlowRunFilter.model_validate({"end_time": {"after_": datetime.now(UTC)}})
    heard, planned, told = time.monotonic(), False, set()
    while not stopping.is_set():
        if serving.done():
            raise ServerUnavailable(f"Prefect's runner ended: {serving.exception()!r}; start the schedule again")
        try:
            runs = await client.read_flow_runs(
                deployment_filter=ours, flow_run_filter=ended, sort=FlowRunSort.END_TIME_DESC, limit=20
            )
            planned = planned or any(
                run.auto_scheduled for run in await client.read_flow_runs(deployment_filter=ours, limit=20)
            )
        except Exception as error:
            problem, runs = f"does not answer ({error!r})", []
        else:
            problem = "plans no tick: its scheduler is off, or fails (see its log)"
            heard = time.monotonic() if planned else heard
        for run in reversed(runs):
            if run.id in told or run.start_time is None or run.state is None:
                continue
            told.add(run.id)
            state = str(run.state.name)
            say(f"{name}: {run.state.message or f'tick {state.lower()}; what is finished stays'}")
            if state in (FINISHED, REFUSED):
                await client.pause_deployment(deployment)
                while multiprocessing.active_children():  # a tick still on its way out would be cancelled
                    await asyncio.sleep(0.1)
                return 0 if state == FINISHED else 2
        if time.monotonic() - heard > SILENT_SECONDS:
            raise ServerUnavailable(f"the Prefect server at {client.api_url} {problem}")
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), timeout=1.0)
    say(_stopping(name))
    return INTERRUPTED


async def _end_old_ticks(client: PrefectClient, deployment: UUID) -> None:
    """What a killed `opd schedule` left: ticks that were to come (they must not pile up) and one that seems to run, with its
    slot. Under the schedule's lock no living process serves these. An old tick that still works holds the run's lock."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.states import Cancelled

    states = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]}}
    due = {"before_": datetime.now(UTC)}
    of_old = FlowRunFilter.model_validate({"state": states, "expected_start_time": due})
    ours = DeploymentFilter.model_validate({"id": {"any_": [deployment]}})
    while runs := await client.read_flow_runs(deployment_filter=ours, flow_run_filter=of_old, limit=200):
        for run in runs:
            await client.set_flow_run_state(run.id, Cancelled(message="its schedule was killed"), force=True)


# The tick: runs in a process of its own, started by Prefect's runner.


def tick(config_path: str, name: str, root: str, rounds: int, overrides: list[str]) -> Any:
    """Run the next `rounds` round(s) of run `name` from where it stands; its last state says how it went (`outcome`). After a
    failure that is not REFUSED the next tick tries again."""
    from flows.run.runner import run_rounds

    _end_with_parent()

    def work() -> RunState:
        return run_rounds(config_path, name, root, rounds, overrides)

    try:
        again, over = "the next tick tries again", "the schedule ends here"
        return outcome(work, name, Path(root), who="tick", again=again, over=over, done=", the schedule ends")
    except (KeyboardInterrupt, SystemExit):
        raise SystemExit(INTERRUPTED) from None


def _end_with_parent() -> None:
    """End this process, as SIGTERM does, when the process that serves the schedule is killed."""
    parent = multiprocessing.parent_process()

    def watch(join: Callable[[], None]) -> None:
        join()
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, args=(parent.join,), daemon=True).start()
