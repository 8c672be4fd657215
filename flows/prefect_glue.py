"""Prefect around a run: order, states and history to look at. Never the source of truth, never a reason for losing work.

What holds here, whatever Prefect does: a stage's function is called once per try, in the calling thread; its result and its
exceptions (KeyboardInterrupt included) come out unchanged; when the server cannot be started, is locked or dies, a warning
says so and the work goes on without it. Nothing of Prefect is imported before a session begins.
"""

from __future__ import annotations

import contextvars
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flows.prefect_server import (
    EmbeddedServer,
    ServerUnavailable,
    healthy,
    home_of,
    quiet_environment,
    server_environment,
)
from storage.redact import RedactedFormatter, redact

T = TypeVar("T")
Warn = Callable[[str], None]


def _to_stderr(line: str) -> None:
    print(redact(line), file=sys.stderr, flush=True)


@dataclass
class Session:
    """A Prefect API to report to. `active` turns False when Prefect fails; from then on functions are called directly."""

    api_url: str | None
    ui_url: str | None
    warn: Warn = field(default=_to_stderr, repr=False)
    active: bool = True

    def give_up(self, error: BaseException) -> None:
        """Stop using Prefect for the rest of the session, saying so once."""
        if self.active:
            self.active = False
            self.warn(
                f"warning: Prefect failed ({_first_line(error)}); going on without it, nothing of the run is lost"
            )


_session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("prefect_session", default=None)


def current_session() -> Session | None:
    """The session that stages report to now, if one is active."""
    session = _session.get()
    return session if session is not None and session.active else None


@contextmanager
def prefect_session(root: Path, *, warn: Warn = _to_stderr) -> Iterator[Session]:
    """Everything in the block reports to PREFECT_API_URL if that is set, else to the root's embedded server.

    The embedded server is a `prefect server start` on loopback with its database under `<root>/prefect`, shared by all
    commands on this root and stopped with the last of them. Telemetry is off, Prefect's log lines stay out of the terminal
    (warnings go to `<root>/prefect/client.log`). Raises nothing of its own: without a usable server the session is inactive.
    """
    outer = current_session()
    if outer is not None:
        yield outer
        return
    home = home_of(root)
    with ExitStack() as stack:
        session = _open(home, root, stack, warn)
        if session.active:
            stack.callback(_settle, session)
        token = _session.set(session)
        try:
            yield session
        finally:
            _session.reset(token)


def _open(home: Path, root: Path, stack: ExitStack, warn: Warn) -> Session:
    """An active session with its settings and server entered on `stack`, or an inactive one."""
    external = os.environ.get("PREFECT_API_URL") or None
    try:
        home.mkdir(parents=True, exist_ok=True)
        if external:
            environment: Mapping[str, str | None] = quiet_environment()
            url, ui = external, None
        else:
            server = EmbeddedServer(root, warn)
            url = server.ensure()
            stack.callback(server.release)
            environment, ui = server_environment(home) | {"PREFECT_API_URL": url}, server.ui_url
        stack.enter_context(_settings(environment, home / "client.log"))
        if external:
            _check_external()
        return Session(url, ui, warn)
    except Exception as error:
        where = f"PREFECT_API_URL={redact(external)}" if external else f"the store's own server in {home}"
        warn(f"warning: running without Prefect: {where}: {_first_line(error)}")
        if isinstance(error, ServerUnavailable) and not external:
            warn(f"  the run itself needs nothing from {home}; if its database is damaged, delete that folder")
        return Session(None, None, warn, active=False)


def _check_external() -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    retries = min(2, PREFECT_CLIENT_MAX_RETRIES.value())  # a few seconds, not a minute, for a server that is not there
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}), get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise ServerUnavailable(f"it does not answer ({_first_line(error)})")


@contextmanager
def _settings(environment: Mapping[str, str | None], log_path: Path) -> Iterator[None]:
    """Prefect settings for the block: in the environment (for a first import and for child processes; None: not set) and,
    since Prefect may have been imported long ago, as a fresh settings context."""
    before = {name: os.environ.get(name) for name in environment}
    _set_environment(environment)
    try:
        with _quiet_logging(log_path):
            from prefect.context import SettingsContext, get_settings_context
            from prefect.settings.models.root import Settings

            with SettingsContext(profile=get_settings_context().profile, settings=Settings()):
                yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _quiet_logging(log_path: Path) -> Iterator[None]:
    """Importing Prefect puts its own handler on the root logger: take that off, and send Prefect's warnings to a file."""
    import_root = logging.getLogger()
    level = import_root.level
    import prefect.main  # noqa: F401  (this import sets up logging)
    from prefect.logging.handlers import PrefectConsoleHandler

    for handler in [h for h in import_root.handlers if isinstance(h, PrefectConsoleHandler)]:
        import_root.removeHandler(handler)
    import_root.setLevel(level)
    ours = logging.FileHandler(log_path, delay=True)
    ours.setLevel(logging.WARNING)
    ours.setFormatter(RedactedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = ("prefect", "prefect._internal", "prefect.extra")
    loggers = [logging.getLogger(name) for name in names]
    handlers = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers = [h for h in logger.handlers if not isinstance(h, logging.StreamHandler)] + [ours]
        logger.propagate = False
    try:
        yield
    finally:
        for logger, old, propagate in handlers:
            logger.handlers, logger.propagate = old, propagate
        ours.close()


def _settle(session: Session) -> None:
    """Send what Prefect's background threads still hold while the server lives, and drop what could not be sent: at exit
    they would try for seconds per event, hours for a long run, and print every event that failed."""
    from prefect._internal.concurrency.services import _active_services

    services = [(service, service._task) for service in list(_active_services)]

    def drain() -> None:
        with suppress(Exception):
            from prefect.events.worker import EventsWorker
            from prefect.logging.handlers import APILogWorker

            APILogWorker.drain_all(timeout=5)
            EventsWorker.drain_all(timeout=5)

    if session.active and session.api_url and healthy(session.api_url):
        thread = threading.Thread(target=drain, daemon=True)
        thread.start()
        thread.join(timeout=12)
    for service, task in services:
        with suppress(Exception):
            _abandon(service, task)


def _abandon(service: Any, task: Any) -> None:
    """End one of Prefect's background services now, whatever it still holds. Prefect has no public way to do so."""
    if service._done_event is None or service._done_event.is_set():
        return
    service._stop(at_exit=True)
    with suppress(queue.Empty):
        while True:
            service._queue.get_nowait()
    service._queue.put_nowait(None)
    if task is not None:
        service._loop.call_soon_threadsafe(task.cancel)


# Flows and tasks


def run_as_flow(name: str, function: Callable[[], T], *, run_name: str | None = None, description: str = "") -> T:
    """Call `function` as a Prefect flow run (directly, without a session). Its result and exceptions come out unchanged."""

    def call(session: Session, body: Callable[[], Any]) -> None:
        from prefect import Flow

        Flow(
            fn=_with_signal_handler(body),
            name=name,
            flow_run_name=run_name,
            description=description or None,
            persist_result=False,
            validate_parameters=False,
            log_prints=False,
        )()

    return _guarded(call, function, lambda _: None)


def run_stage_task(
    name: str,
    function: Callable[[], T],
    cached: Callable[[T], bool] = lambda _: False,
    *,
    retries: int = 0,
    retry_delay_seconds: float = 5.0,
    description: str = "",
) -> T:
    """Call a stage's function as a Prefect task of the flow around it; its state is named `Cached` when `cached(result)`.

    `name` reads "rollout · round 3": the part before " · " names the task, the whole names this run of it. Tried again
    up to `retries` times when a worker process died (`is_transient`), with and without Prefect. The task has no Prefect
    cache and no persisted result: the store is both."""
    attempts = _Attempts(function, retries, retry_delay_seconds)

    def call(session: Session, body: Callable[[], Any]) -> None:
        from prefect import Task
        from prefect.cache_policies import NO_CACHE

        Task(
            fn=body,
            name=name.split(" · ")[0],
            task_run_name=_literal(name),
            description=description or None,
            cache_policy=NO_CACHE,
            persist_result=False,
            log_prints=False,
        )()

    def state(result: T) -> Any:
        from prefect.states import Completed

        if cached(result):
            return Completed(name="Cached", message="already in the store")
        return Completed(message=f"tries: {attempts.made}" if attempts.made > 1 else None)

    return _guarded(call, attempts, state)


class _Attempts:
    """Tries again after transient worker failures. Not Prefect's retries, so that `--no-prefect` behaves the same."""

    def __init__(self, function: Callable[[], Any], retries: int, delay_seconds: float) -> None:
        self.function, self.retries, self.delay_seconds, self.made = function, retries, delay_seconds, 0

    def __call__(self) -> Any:
        while True:
            self.made += 1
            try:
                return self.function()
            except Exception as error:
                if self.made > self.retries or not is_transient(error):
                    raise
                session = _session.get()
                warn = session.warn if session else _to_stderr
                warn(f"try {self.made} of {self.retries + 1} failed ({_first_line(error)}); trying again")
                time.sleep(self.delay_seconds)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a worker process died without an answer."""
    from tasks.workers import WorkerDied

    return isinstance(error, WorkerDied)


class _Outcome:
    """What the function really did, kept beside Prefect."""

    called = done = False
    value: Any = None
    error: BaseException | None = None


def _guarded(
    call: Callable[[Session, Callable[[], Any]], None], function: Callable[[], T], state: Callable[[T], Any]
) -> T:
    """Run `function` through Prefect's `call`; take the outcome from the function itself, so Prefect cannot change or lose it."""
    session = current_session()
    if session is None:
        return function()
    outcome = _Outcome()

    def body() -> Any:
        outcome.called = True
        try:
            outcome.value = function()
        except BaseException as error:
            outcome.error = error
            told = _without_secrets(error)
            if told is error:
                raise
            raise told from None
        outcome.done = True
        return state(outcome.value)

    try:
        call(session, body)
    except Exception as error:
        if outcome.error is None:
            session.give_up(error)
    except BaseException as error:
        if outcome.error is None:
            if _is_abort(error):
                raise KeyboardInterrupt("cancelled in Prefect") from error
            raise
    if outcome.error is not None:
        raise outcome.error
    if not outcome.called:  # Prefect failed before it came to the work
        return function()
    return outcome.value


def _without_secrets(error: BaseException) -> BaseException:
    """What Prefect gets to see and to store of an error: the error, or if a secret is in its text a stand-in."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, Exception) or redact(text) == text:
        return error
    return RuntimeError(f"{type(error).__name__}: {redact(str(error))}")


def _is_abort(error: BaseException) -> bool:
    from prefect.exceptions import PrefectSignal

    return isinstance(error, PrefectSignal)


def _with_signal_handler(body: Callable[[], Any]) -> Callable[[], Any]:
    """Prefect replaces the SIGTERM handler around a flow; a handler that the run installed stays in force inside."""
    handler = signal.getsignal(signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(handler):
        return body

    def with_handler() -> Any:
        prefects = signal.signal(signal.SIGTERM, handler)
        try:
            return body()
        finally:
            signal.signal(signal.SIGTERM, prefects)

    return with_handler


# What is nice to see


def show_table(key: str, rows: Sequence[dict[str, Any]], description: str = "") -> None:
    """Put a table (a row per round) beside the flow run in Prefect's UI; best effort, inside `run_as_flow` only.

    `key`: lower-case letters, digits and dashes, as Prefect demands."""
    session = current_session()
    if session is None or not rows:
        return
    try:
        from prefect.artifacts import create_table_artifact

        create_table_artifact(table=list(rows), key=key, description=description or None)
    except Exception as error:
        session.give_up(error)


def _literal(name: str) -> str:
    """Prefect formats run names as templates: braces stay braces."""
    return name.replace("{", "{{").replace("}", "}}")


def _first_line(error: BaseException) -> str:
    text = redact(str(error)).strip()
    return text if isinstance(error, ServerUnavailable) else (text.splitlines()[0] if text else type(error).__name__)
