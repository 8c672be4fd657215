"""A session with Prefect: which API, its settings for this process, and the end of everything that Prefect leaves running.

Nothing of Prefect is imported before a session begins."""

from __future__ import annotations

import contextvars
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.prefect_.server import (
    STOP_TIMEOUT_SECONDS,
    EmbeddedServer,
    ServerUnavailable,
    healthy,
    home_of,
    quiet_environment,
    server_environment,
)
from storage.disk.redact import RedactedFormatter, redact

Warn = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(redact(line), file=sys.stderr, flush=True)


@dataclass
class Session:
    """A Prefect API to report to. `active` turns False when Prefect fails; from then on functions are called directly."""

    api_url: str | None
    ui_url: str | None
    warn: Warn = field(default=to_stderr, repr=False)
    active: bool = True
    server: EmbeddedServer | None = field(default=None, repr=False)
    """The store's own; None for PREFECT_API_URL."""

    def give_up(self, error: BaseException) -> None:
        """Stop using Prefect for the rest of the session, saying so once."""
        if self.active:
            self.active = False
            self.warn(
                f"warning: Prefect failed ({first_line(error)}): its record is incomplete; the run goes on without it,"
                " nothing of the run is lost"
            )

    def takes(self, write: Callable[[Any], object], patience: float, retries: int = 1) -> bool:
        """Whether `write(client)` gets through to Prefect's database, tried for `patience` seconds and once more; gives up
        if not. Asked before Prefect's own calls, which would try for minutes."""
        try:
            if self.server is not None:
                self.server.check_database()
            from prefect.client.orchestration import get_client
            from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

            with (
                temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}),
                get_client(sync_client=True, httpx_settings={"timeout": patience}) as client,
            ):
                write(client)
        except Exception as error:
            self.give_up(error)
        return self.active

    def release(self) -> None:
        """Give the store's own server back; one that failed is not asked twice to end."""
        if self.server is not None:
            self.server.release(STOP_TIMEOUT_SECONDS if self.active else 1.0)


_session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("prefect_session", default=None)


def current_session() -> Session | None:
    """The session that stages report to now, if one is active."""
    session = _session.get()
    return session if session is not None and session.active else None


def innermost_session() -> Session | None:
    """The session around the caller, whether or not Prefect still works."""
    return _session.get()


@contextmanager
def prefect_session(root: Path, *, warn: Warn = to_stderr) -> Iterator[Session]:
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
    session = Session(external, None, warn)
    try:
        home.mkdir(parents=True, exist_ok=True)
        if external:
            environment: Mapping[str, str | None] = quiet_environment()
        else:
            session.server = EmbeddedServer(root, warn)
            session.api_url = session.server.ensure()
            stack.callback(session.release)
            environment = server_environment(home) | {"PREFECT_API_URL": session.api_url}
            session.ui_url = session.server.ui_url
        stack.enter_context(_settings(environment, home / "client.log"))
        if external:
            _check_external()
        return session
    except Exception as error:
        where = f"PREFECT_API_URL={redact(external)}" if external else f"the store's own server in {home}"
        warn(f"warning: running without Prefect, which will have no record of this run: {where}: {first_line(error)}")
        if isinstance(error, ServerUnavailable) and not external:
            warn(f"  the run itself needs nothing from {home}; if its database is damaged, delete that folder")
        return Session(None, None, warn, active=False, server=session.server)


def _check_external() -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    retries = min(2, PREFECT_CLIENT_MAX_RETRIES.value())  # a few seconds, not a minute, for a server that is not there
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}), get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise ServerUnavailable(f"it does not answer ({first_line(error)})")


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
    raising, logging.raiseExceptions = logging.raiseExceptions, False  # what handlers cannot send, they would print
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
            # Prefect's threads may outlive the session; what they say of their end is for nobody
            quiet = logger.name == "prefect._internal"
            logger.handlers, logger.propagate = ([logging.NullHandler()], False) if quiet else (old, propagate)
        logging.raiseExceptions = raising
        with suppress(OSError):  # a full disk does not take its last lines: that must not hide why the run ends
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
    deadline = time.monotonic() + 2.0  # what it says of its end belongs into the session's log
    while not service._done_event.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)


def first_line(error: BaseException) -> str:
    """Of its message, without secrets; its type if it has none."""
    return next(iter(redact(str(error)).strip().splitlines()), type(error).__name__)
