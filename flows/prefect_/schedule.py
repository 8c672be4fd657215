"""A run that goes on by itself: a Prefect deployment whose every tick runs the next round(s) of the same run.

The tick's work happens inside the flow run's own process, which Prefect's runner starts fresh for every tick. A further
`opd run` subprocess inside it would add nothing: the process can be ended from outside already (SIGTERM, then SIGKILL;
the kernel drops the run's lock, the workers see their pipe close), and in it exceptions keep their types and the run's
flow and tasks appear under the tick in Prefect.

Two things keep ticks from doubling a round, each sufficient: the deployment's concurrency limit of one with CANCEL_NEW (a
tick that comes while one is busy is cancelled, not queued), and the run's lock (RunBusy → the tick is `Skipped`), which
also holds against `opd run` by hand and against another server. A third keeps schedules apart: one `opd schedule` per name.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import wait as wait_for_sentinels
from pathlib import Path
from typing import Any

from flows.prefect_.server import ServerUnavailable
from flows.prefect_.session import prefect_session
from flows.run.hints import with_resume_hint
from storage.disk import locks
from storage.disk.redact import redact
from storage.errors import ConfigError, InputError, OpdError, RunBusy
from storage.runs import RUN_NAME

FLOW_NAME = "opd-schedule"
RUN_ROUNDS = "flows.run.runner:run_rounds"
REPORTS = "OPD_SCHEDULE_REPORTS"
"""Environment variable with the folder where a tick leaves word for the process that serves it."""

ENDED = "ended"
"""File in that folder: a tick has said that there is nothing left to do."""

INTERRUPTED = 130
SCHEDULER_SECONDS = 120.0  # the server plans the ticks of a new deployment within 5 seconds, of any within 60
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Schedule:
    """When to tick (exactly one of `every`, `cron`) and what a tick does."""

    config_path: str
    name: str
    root: str
    every: timedelta | None = None
    cron: str | None = None
    timezone: str | None = None
    rounds: int = 1
    overrides: list[str] = field(default_factory=list)
    run_rounds: str = RUN_ROUNDS
    """`module:function` with the signature of `flows.run.runner.run_rounds`."""

    def __post_init__(self) -> None:
        if (self.every is None) == (self.cron is None):
            raise ConfigError("give exactly one of --every (as 6h, 30m, 45s) and --cron (as '0 2 * * *')")
        if not RUN_NAME.fullmatch(self.name):
            raise InputError(f"--name {self.name!r}: letters, digits, dot, dash and underscore, at most 64")
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds}: a tick runs at least 1 round")

    @property
    def deployment(self) -> str:
        """Name in Prefect: the run's, and a mark of host and root, since a Prefect server may serve many of both."""
        place = f"{socket.gethostname()}:{Path(self.root).resolve()}"
        return f"{self.name}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"

    @property
    def parameters(self) -> dict[str, Any]:
        """What a tick is called with."""
        names = ("config_path", "name", "root", "rounds", "overrides", "run_rounds")
        return {name: getattr(self, name) for name in names}


def parse_every(text: str) -> timedelta:
    """`6h`, `30m`, `45s`, `1d`, `1h30m` as a timedelta of at least a second; ConfigError otherwise."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text.strip()):
        raise ConfigError(f"--every {text!r} is not a duration; write 6h, 30m, 45s, 1d or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", text))
    if not 1 <= seconds <= 366 * 86400:
        raise ConfigError(f"--every {text!r}: between one second and a year, please")
    return timedelta(seconds=seconds)


def local_timezone() -> str:
    """IANA name of this machine's time zone (TZ, /etc/timezone, /etc/localtime), else UTC."""
    from zoneinfo import ZoneInfo

    candidates = [os.environ.get("TZ", "").removeprefix(":")]
    with suppress(OSError):
        candidates.append(Path("/etc/timezone").read_text().strip())
    with suppress(OSError):
        candidates.append(os.readlink("/etc/localtime").partition("zoneinfo/")[2])
    for name in filter(None, candidates):
        with suppress(Exception):
            return str(ZoneInfo(name))
    return "UTC"


def serve(schedule: Schedule, say: Callable[[str], None] = print) -> int:
    """Serve the schedule until the run's configured rounds are done; the exit code: 0 done, 130 stopped by a signal,
    else that of the error that no further tick could cure (a changed config, a name held by another experiment).

    Raises RunBusy when this run is scheduled already, ServerUnavailable without a usable Prefect API. With PREFECT_API_URL
    unset it starts the root's own `prefect server start`, and stops it at the end unless another command uses it."""
    root = Path(schedule.root)
    with ExitStack() as stack:
        stack.enter_context(locks.locked(root / "prefect" / f"schedule-{schedule.name}.lock", _busy(schedule)))
        notes: list[str] = []
        session = stack.enter_context(prefect_session(root, warn=lambda line: (notes.append(line), say(line))[0]))
        if not session.active:
            raise ServerUnavailable("a schedule needs a Prefect server: " + (notes[-1] if notes else "none answered"))
        reports = stack.enter_context(tempfile.TemporaryDirectory(prefix="opd-schedule-"))
        os.environ[REPORTS] = reports
        stack.callback(os.environ.pop, REPORTS, None)
        when = f"every {schedule.every}" if schedule.every else f"at {schedule.cron!r} ({_zone(schedule)})"
        say(f"{schedule.name}: {schedule.rounds} round(s) {when}; Ctrl-C stops it" + _seen_at(session.ui_url))
        stack.enter_context(_signal_handlers_kept())
        return asyncio.run(_serve(schedule, Path(reports), say))


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """The event loop and Prefect's runner put their own handlers in; afterwards the caller's hold again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


async def _serve(schedule: Schedule, reports: Path, say: Callable[[str], None]) -> int:
    """Prefect's runner, stopped by a signal or by what the ticks report."""
    import prefect.runner
    from prefect import Flow

    # What `flow.serve` does, with two differences: a tick is not fetched (and does not take the only slot) before its
    # time, and the runner can be stopped from inside. No runner limit: a tick over it would wait and become late; it
    # must reach the server, whose CANCEL_NEW ends it.
    seconds = schedule.every.total_seconds() if schedule.every else 60.0
    runner = prefect.runner.Runner(
        name=schedule.deployment, query_seconds=min(10.0, max(1.0, seconds / 4)), prefetch_seconds=0, limit=None
    )
    flow = Flow(fn=tick, name=FLOW_NAME, flow_run_name=f"{schedule.name} tick", persist_result=False)
    await _clear_old(schedule)
    deployment = await _deploy(schedule, runner, flow)
    if schedule.every is not None:
        await _tick_now(deployment)
    stopping = asyncio.Event()
    serving = asyncio.ensure_future(runner.start())
    checking = asyncio.ensure_future(_check_scheduler(deployment))
    try:
        while not runner.started and not serving.done():
            await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):  # replaces the runner's own handler, which blocks the loop
            loop.add_signal_handler(number, stopping.set)
        code = await _watch(reports, stopping, [serving, checking], say)
        if code == INTERRUPTED:
            say(f"stopping; what is finished stays. To go on: opd schedule again, or opd resume {schedule.name}")
    finally:
        checking.cancel()
        if runner.started:
            with suppress(Exception):
                await runner.astop()
        with suppress(Exception, asyncio.CancelledError):
            await serving
    return code


async def _watch(
    reports: Path, stopping: asyncio.Event, tasks: list[asyncio.Future[None]], say: Callable[[str], None]
) -> int:
    """Say what ticks report; return the exit code when one says that there is nothing left to do."""
    while True:
        for path in sorted(reports.glob("*.json")):
            report = json.loads(path.read_text())
            path.unlink()
            say(report["line"])
            if report["exit"] is not None:
                await _gone(int(report["pid"]))  # its flow run would be cancelled otherwise, a moment before its end
                return int(report["exit"])
        if stopping.is_set():
            return INTERRUPTED
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                if isinstance(error, OpdError):
                    raise error
                raise ServerUnavailable(f"Prefect's runner ended: {error!r}; start the schedule again") from error
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), timeout=0.3)


async def _check_scheduler(deployment: uuid.UUID) -> None:
    """Raise when the server has planned no tick: its scheduler is switched off or broken, and nothing would ever happen."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter
    from prefect.client.schemas.sorting import FlowRunSort

    which = {"deployment_filter": DeploymentFilter(id={"any_": [deployment]}), "limit": 5}
    deadline = time.monotonic() + SCHEDULER_SECONDS
    async with get_client() as client:
        while time.monotonic() < deadline:
            await asyncio.sleep(5)
            runs = await client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, **which)
            if any(run.auto_scheduled for run in runs):
                return
    raise ServerUnavailable(
        f"the Prefect server at {client.api_url} planned no tick in {SCHEDULER_SECONDS:.0f} s: its scheduler is off, or"
        " fails (see the server's log; Prefect 3.7 fails so with SQLAlchemy 2.1)"
    )


async def _gone(pid: int, seconds: float = 20.0) -> None:
    """Wait until a tick's process has ended (Prefect's runner reaps it), at most `seconds`."""
    deadline = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            await asyncio.sleep(0.1)


async def _deploy(schedule: Schedule, runner: Any, flow: Any) -> uuid.UUID:
    """Create or update the deployment with its schedule."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron, Interval

    try:
        if schedule.every is not None:
            when = Interval(schedule.every, anchor_date=datetime.now(UTC) + schedule.every)
        else:
            when = Cron(schedule.cron, timezone=_zone(schedule))
        return await runner.aadd_flow(
            flow,
            name=schedule.deployment,
            schedule=when,
            parameters=schedule.parameters,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            description=f"Every tick runs the next {schedule.rounds} round(s) of `{schedule.name}`.",
            enforce_parameter_schema=False,
        )
    except ValueError as error:
        raise ConfigError(f"--cron {schedule.cron!r} is refused: {error}") from error


async def _clear_old(schedule: Schedule) -> None:
    """What a killed `opd schedule` left: ticks that were to come (they must not pile up), one that seems to run, its slot.

    Called under the schedule's lock, so no living process serves these. An old tick that still works holds the run's lock."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    async with get_client() as client:
        try:
            old = await client.read_deployment_by_name(f"{FLOW_NAME}/{schedule.deployment}")
        except ObjectNotFound:
            return
        await client.pause_deployment(old.id)
        which = {"deployment_filter": DeploymentFilter(id={"any_": [old.id]})}
        waiting = FlowRunFilter(state={"type": {"any_": ["SCHEDULED"]}})
        while runs := await client.read_flow_runs(flow_run_filter=waiting, limit=200, **which):
            for run in runs:
                await client.delete_flow_run(run.id)
        begun = FlowRunFilter(state={"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}})
        for run in await client.read_flow_runs(flow_run_filter=begun, limit=200, **which):
            await client.set_flow_run_state(run.id, Crashed(message="its schedule was killed"), force=True)
        with suppress(ObjectNotFound):
            await client.update_global_concurrency_limit(
                f"deployment:{old.id}", GlobalConcurrencyLimitUpdate(active_slots=0)
            )


async def _tick_now(deployment: uuid.UUID) -> None:
    """The first tick of an interval comes at once."""
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        await client.create_flow_run_from_deployment(deployment)


# The tick: runs in a process of its own, started by Prefect's runner.


def tick(
    config_path: str, name: str, root: str, rounds: int, overrides: list[str], run_rounds: str = RUN_ROUNDS
) -> Any:
    """Run the next `rounds` round(s) of run `name` from where it stands, and report how it went.

    Returns nothing, or a state: `Skipped` when the run is busy, Failed when it raised (the next tick tries again, except
    after errors that it could not cure: exit code 2)."""
    from prefect.states import Completed, Failed

    _die_with_parent()
    if (folder := _reports()) and (folder / ENDED).exists():  # started while the last one was still on its way out
        return Completed(name="Skipped", message="the schedule has ended")
    module, _, function = run_rounds.partition(":")
    started = time.monotonic()
    try:
        state = getattr(importlib.import_module(module), function)(config_path, name, root, rounds, overrides)
    except RunBusy as error:
        _report(f"{name}: tick skipped: {error}", None)
        return Completed(name="Skipped", message=str(error))
    except (KeyboardInterrupt, SystemExit):
        _report(f"{name}: tick stopped; what is finished stays", None)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        final = isinstance(error, OpdError) and error.exit_code == 2
        todo = "the schedule ends here" if final else "the next tick tries again"
        text = redact(with_resume_hint(error, name, Path(root)) if isinstance(error, OpdError) else repr(error))
        _report(f"{name}: tick failed: {text} ({todo}; opd logs {name})", error.exit_code if final else None)
        return Failed(message=redact(f"{type(error).__name__}: {error}"))
    last = max((r.round for r in state.rounds if r.student_sha256), default=0)
    finished = state.status == "finished"
    _report(
        f"{name}: at round {last} after {time.monotonic() - started:.0f} s"
        + ("; all configured rounds are done, the schedule ends" if finished else ""),
        0 if finished else None,
    )
    return None


def _report(line: str, exit_code: int | None) -> None:
    """Leave word for `serve`; written whole, then renamed."""
    folder = _reports()
    if folder is None:
        print(line, flush=True)
        return
    if exit_code is not None:
        (folder / ENDED).touch()
    name = f"{time.time_ns():020d}-{os.getpid()}"
    temporary = folder / f".{name}"
    temporary.write_text(json.dumps({"line": line, "exit": exit_code, "pid": os.getpid()}))
    os.replace(temporary, folder / f"{name}.json")


def _reports() -> Path | None:
    """The folder of the process that serves this tick; None when that is gone, or this is no tick of a schedule."""
    folder = os.environ.get(REPORTS)
    return Path(folder) if folder and Path(folder).is_dir() else None


def _die_with_parent() -> None:
    """End this process, as SIGTERM does, when the process that serves the schedule is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for_sentinels([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _zone(schedule: Schedule) -> str:
    return schedule.timezone or local_timezone()


def _seen_at(ui_url: str | None) -> str:
    return f"; seen at {ui_url}" if ui_url else ""


def _busy(schedule: Schedule) -> Callable[[str], None]:
    def busy(holder: str) -> None:
        raise RunBusy(f"run {schedule.name!r} is scheduled already, by {holder}; stop that one first", holder)

    return busy
