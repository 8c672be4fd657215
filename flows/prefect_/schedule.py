"""A run that goes on by itself: a Prefect deployment, each of whose flow runs (ticks) runs the next rounds of the same run.

Prefect's runner serves it and starts a fresh process for every tick, which can be ended from outside (SIGTERM, then SIGKILL;
the kernel drops the run's lock, the workers see their pipe close). Two things keep ticks from doubling a round, each
sufficient: the deployment's concurrency limit of one with CANCEL_NEW (a tick that comes while one is busy is cancelled, not
queued), and the run's lock (the tick is `Skipped`), which also holds against `opd run` and against another server. A third
keeps schedules apart: one `opd schedule` per name.

Prefect's runner ends after three failed requests in a row. The tick under way goes on, and the schedule begins anew, with a
server of the store's that is started again, until the server has been away for `AWAY_SECONDS`."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.prefect_.outcome import FINISHED, REFUSED, outcome
from flows.prefect_.server import PATIENT, ServerUnavailable
from flows.prefect_.session import asking, first_line, prefect_session
from flows.run.pace import duration
from flows.run.stopping import terminating
from storage.disk import locks
from storage.disk.redact import redact
from storage.errors import InputError, RunBusy
from storage.runs import RUN_NAME, RunState
from storage.text import counted

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.runner import Runner
    from prefect.schedules import Schedule

INTERRUPTED = 130
SILENT_SECONDS = 120.0
"""How long the server may plan no tick (it plans one within 5 seconds, or 60), or not answer, before it counts as away."""
AWAY_SECONDS = 6 * 3600.0
"""How long a server that was there may be away before the schedule ends."""
WAITS = (5.0, 300.0)
"""Seconds before the first attempt to begin anew, doubled from one to the next, and at most."""
STEADY_SECONDS = 60.0
"""A server that was there for that long is no longer one that comes and goes: the waits begin with the first again."""
TICK_SECONDS = 30.0
"""How long a tick has to end after SIGTERM, as Prefect's runner gives it."""


@dataclass
class Contact:
    """When the server was seen to work: it answers, and plans ticks."""

    began: float = field(default_factory=time.monotonic)
    heard: float | None = None


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
    times = f"every {when.interval}" if when.interval else f"at {when.cron!r} ({when.timezone})"
    what = {"config_path": config_path, "name": name, "root": str(root), "rounds": rounds, "overrides": overrides}

    def attempt(contact: Contact) -> int:
        with prefect_session(root, warn=say, required=True) as session:
            seen = f"; seen at {session.server.ui_url}" if session.server else ""
            say(f"{name}: {counted(rounds, 'round')} {times}; Ctrl-C stops it{seen}")
            try:
                # Prefect's loops print the tracebacks of failed requests; the cause comes with `ServerUnavailable`
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), asking("the schedule"):
                    return asyncio.run(_serve(what, when, say, contact))
            except ServerUnavailable:
                session.active = False  # nothing is sent to it any more
                raise

    with locks.locked(root / "prefect" / f"schedule-{name}.lock", busy):
        try:
            return _until_over(attempt, name, say)
        except asyncio.CancelledError:  # stopped by a signal before the first tick
            say(_stopping(name))
            return INTERRUPTED


def _until_over(attempt: Callable[[Contact], int], name: str, say: Callable[[str], None]) -> int:
    """What `attempt` returns; called again, after a wait, when the server that was there is lost."""
    good, wait = None, WAITS[0]
    while True:
        contact = Contact()
        try:
            with terminating():  # the loop of an earlier attempt has taken the handlers away
                return attempt(contact)
        except ServerUnavailable as error:
            if contact.heard is not None and (good is None or contact.heard - contact.began >= STEADY_SECONDS):
                good, wait = time.monotonic(), WAITS[0]  # a tick may have gone on for hours after the loss
            if good is None:
                raise
            if time.monotonic() - good > AWAY_SECONDS:
                raise ServerUnavailable(f"{error}; away for {duration(time.monotonic() - good)}") from error
            say(f"{name}: {first_line(error)}; trying again in {duration(wait)}")
        try:
            with terminating():
                time.sleep(wait)
        except KeyboardInterrupt:
            say(_stopping(name))
            return INTERRUPTED
        wait = min(2 * wait, WAITS[1])


def _stopping(name: str) -> str:
    return f"stopping; what is finished stays. To go on: opd schedule again, or opd resume {name}"


def _on_signals(call: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, call)


async def _serve(what: dict[str, Any], when: Schedule, say: Callable[[str], None], contact: Contact) -> int:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.runner import Runner

    # An exception from a signal handler would come up in whatever the loop does at that moment, and end as a traceback.
    main = asyncio.current_task()
    assert main is not None
    _on_signals(main.cancel)
    # What `flow.serve` does, with two differences: a tick is not fetched (and does not take the only slot) before its time,
    # and no limit of the runner's, over which a tick would wait: it must reach the server, whose CANCEL_NEW ends it. It does
    # not pause the deployment itself: where the server is away that fails, and its clean-up is skipped.
    place = hashlib.sha256(f"{socket.gethostname()}:{Path(what['root']).resolve()}".encode()).hexdigest()[:6]
    name = f"{what['name']}-{place}"  # a Prefect server may serve many hosts and roots
    pace = min(10.0, max(1.0, when.interval.total_seconds() / 4)) if when.interval else 10.0
    runner = Runner(name=name, query_seconds=pace, prefetch_seconds=0, limit=None, pause_on_shutdown=False)
    deployment = await runner.aadd_flow(
        flow(name="opd-schedule", flow_run_name="{name} tick", persist_result=False)(tick),
        name=name,
        schedule=when,
        parameters=what,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        description=f"Every tick runs the next {counted(what['rounds'], 'round')} of `{what['name']}`.",
        tags=[what["name"]],
    )
    stopping, others = asyncio.Event(), set(multiprocessing.active_children())
    async with get_client() as client:
        await _end_old_ticks(client, deployment)
        if when.interval is not None:  # the first tick of an interval comes at once
            await client.create_flow_run_from_deployment(deployment)
        serving = asyncio.ensure_future(runner.start())
        try:
            while not runner.started and not serving.done():
                await asyncio.sleep(0.05)
            _on_signals(stopping.set)  # replaces the runner's own handler too, which blocks the loop
            watch = _Watch(client, deployment, what["name"], runner, serving, say, contact, others)
            code = await watch.until(stopping)
        finally:
            with suppress(Exception):
                await asyncio.wait_for(client.pause_deployment(deployment), 3.0)
            try:
                await runner.astop()
            except Exception:  # it has not started, or ends already
                serving.cancel()
            await _end_ticks(others)
            with suppress(Exception, asyncio.CancelledError):
                await serving
    return code


def ticks_alive(others: Collection[BaseProcess]) -> list[BaseProcess]:
    """Processes of ticks. `others`: children of this process that are none."""
    return [process for process in multiprocessing.active_children() if process not in others]


async def _end_ticks(others: Collection[BaseProcess]) -> None:
    """Ends the ticks that the runner has not ended: SIGTERM, then SIGKILL."""
    for end in (BaseProcess.terminate, BaseProcess.kill):
        for process in ticks_alive(others):
            end(process)
        deadline = time.monotonic() + TICK_SECONDS
        while ticks_alive(others) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)


@dataclass
class _Watch:
    """Reports what ticks came to, and finds out when nothing is left to do or the server is lost."""

    client: PrefectClient
    deployment: UUID
    name: str
    runner: Runner
    serving: asyncio.Future[None]
    say: Callable[[str], None]
    contact: Contact
    others: Collection[BaseProcess]
    problem: str = ""
    """what the last look at the server found"""
    _planned: bool = False
    _waits: bool = False
    """whether it was reported that the server is lost"""
    _told: set[UUID] = field(default_factory=set)
    _since: datetime = field(default_factory=lambda: datetime.now(UTC))

    async def until(self, stopping: asyncio.Event) -> int:
        """The exit code, once a tick says that there is nothing left to do, or the schedule is stopped. ServerUnavailable once
        the server is lost and no tick is under way."""
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while not stop.done():
                look = asyncio.ensure_future(self._look())
                await asyncio.wait({look, stop}, return_when=asyncio.FIRST_COMPLETED)
                if not look.done():  # a server that hangs does not keep a signal waiting
                    look.cancel()
                    break
                if (code := look.result()) is not None:
                    return code
                if lost := self._lost():
                    if not ticks_alive(self.others):
                        raise ServerUnavailable(lost)
                    if not self._waits:
                        self._waits = True
                        self.say(f"{self.name}: {lost}; the tick under way goes on")
                await asyncio.wait({stop}, timeout=1.0)
        finally:
            stop.cancel()
        self.say(_stopping(self.name))
        return INTERRUPTED

    def _lost(self) -> str:
        """Why no tick will come any more; empty where one will."""
        if time.monotonic() - (self.contact.heard or self.contact.began) > SILENT_SECONDS:
            return f"the Prefect server at {redact(str(self.client.api_url))} {self.problem}"
        if not self.runner.started:
            error = self.serving.exception() if self.serving.done() and not self.serving.cancelled() else None
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            cause = f": the server {self.problem}" if self.problem else f" ({error})" if error is not None else ""
            return f"Prefect's runner ended after failed requests{cause}"
        return ""

    async def _look(self) -> int | None:
        """The exit code where a tick says that there is nothing left to do."""
        from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
        from prefect.client.schemas.sorting import FlowRunSort

        ours = DeploymentFilter.model_validate({"id": {"any_": [self.deployment]}})
        ended = FlowRunFilter.model_validate({"end_time": {"after_": self._since}})
        try:
            runs = await self.client.read_flow_runs(
                deployment_filter=ours, flow_run_filter=ended, sort=FlowRunSort.END_TIME_DESC, limit=20
            )
            if not self._planned:
                newest = await self.client.read_flow_runs(deployment_filter=ours, limit=20)
                self._planned = any(run.auto_scheduled for run in newest)
            if not self.runner.started:  # it ends, waits for the tick under way, and no longer hears of a cancellation
                await self._cancel_ticks(ours)
        except Exception as error:
            self.problem = f"does not answer ({first_line(error)})"
            return None
        self.problem = "plans no tick: its scheduler is off, or fails (see its log)"
        if self._planned:
            self.problem, self.contact.heard = "", time.monotonic()
        for run in reversed(runs):
            if run.id in self._told or run.start_time is None or run.state is None:
                continue
            self._told.add(run.id)
            state = str(run.state.name)
            self.say(f"{self.name}: {run.state.message or f'tick {state.lower()}; what is finished stays'}")
            if state in (FINISHED, REFUSED):
                await self.client.pause_deployment(self.deployment)
                while ticks_alive(self.others):  # a tick still on its way out would be cancelled
                    await asyncio.sleep(0.1)
                return 0 if state == FINISHED else 2
        return None

    async def _cancel_ticks(self, ours: Any) -> None:
        from prefect.client.schemas.filters import FlowRunFilter

        cancelling = FlowRunFilter.model_validate({"state": {"type": {"any_": ["CANCELLING"]}}})
        if await self.client.read_flow_runs(deployment_filter=ours, flow_run_filter=cancelling, limit=1):
            await _end_ticks(self.others)


async def _end_old_ticks(client: PrefectClient, deployment: UUID) -> None:
    """What a killed `opd schedule`, or the time without a server, left: ticks that were to come (they must not pile up) and one
    that seems to run, with its slot. Under the schedule's lock no living process serves these. An old tick that still works
    holds the run's lock."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.states import Cancelled

    states = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]}}
    due = {"before_": datetime.now(UTC)}
    of_old = FlowRunFilter.model_validate({"state": states, "expected_start_time": due})
    ours = DeploymentFilter.model_validate({"id": {"any_": [deployment]}})
    while runs := await client.read_flow_runs(deployment_filter=ours, flow_run_filter=of_old, limit=200):
        for run in runs:
            await client.set_flow_run_state(
                run.id, Cancelled(message="its schedule was killed, or lost this server"), force=True
            )


# The tick: runs in a process of its own, started by Prefect's runner.


def tick(config_path: str, name: str, root: str, rounds: int, overrides: list[str]) -> Any:
    """Run the next `rounds` rounds of run `name` from where it stands; its last state says how it went (`outcome`). After a
    failure that is not REFUSED the next tick tries again."""
    from flows.run.runner import run_rounds

    _end_with_parent()
    for limit, value in PATIENT.items():  # the schedule's; the run in this process has its own, or the user's
        if os.environ.get(limit) == value:
            del os.environ[limit]

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
