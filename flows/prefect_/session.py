"""A session with Prefect: which API, its settings in this process, and the end of everything that Prefect leaves running.

Nothing of Prefect is imported before a session begins."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from flows.prefect_.server import ServerUnavailable, StoreServer, environment, home_of, store_server
from storage.disk.redact import redact
from storage.errors import OpdError

T = TypeVar("T")
Warn = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(redact(line), file=sys.stderr, flush=True)


@dataclass
class Session:
    """A Prefect API to report to. `active` turns False when Prefect fails; from then on nothing is asked of it."""

    warn: Warn = field(default=to_stderr, repr=False)
    active: bool = True
    server: StoreServer | None = None
    """The store's own; None for PREFECT_API_URL."""

    def give_up(self, error: BaseException) -> None:
        """Stop using Prefect for the rest of the session, with one warning."""
        if self.active:
            self.active = False
            self.warn(
                f"warning: Prefect failed ({first_line(error)}): its record is incomplete; the run goes on without it,"
                " nothing of the run is lost"
            )
        if self.server is not None:
            self.server.patience = 1.0

    def attempt(self, call: Callable[[], T]) -> T | None:
        """What a call to Prefect returns; None, and the end of the session's use of Prefect, where it fails."""
        try:
            return call() if self.active else None
        except Exception as error:
            self.give_up(error)
            return None


@contextmanager
def prefect_session(root: Path, *, warn: Warn = to_stderr, required: bool = False) -> Iterator[Session]:
    """Everything in the block reports to PREFECT_API_URL if that is set, else to the store's own server. Without a usable server
    the session is inactive; if it is `required`, ServerUnavailable is raised."""
    home, external, session = home_of(root), os.environ.get("PREFECT_API_URL"), Session(warn)
    with ExitStack() as stack:
        try:
            values = environment(None, patient=required)
            if not external:
                session.server = stack.enter_context(store_server(root, warn))
                values = environment(home, patient=required, PREFECT_API_URL=session.server.api_url)
            stack.enter_context(prefect_settings(values))
            if external:
                _check_answer()
            stack.callback(_settle, session)
        except Exception as error:
            session.active = False
            where = f"PREFECT_API_URL={redact(external)}" if external else f"the store's own server in {home}"
            problem = f"{where}: {first_line(error)}"
            if required:
                cure = (
                    "start it, correct the address, or unset it for a server of the store's own"
                    if external
                    else "if its database is damaged, delete that folder, from which no run needs anything"
                )
                raise ServerUnavailable(f"a Prefect server is needed: {problem}; {cure}") from error
            warn(f"warning: running without Prefect, which will have no record of this run: {problem}")
            if not external:
                warn(f"  the run itself needs nothing from {home}; if its database is damaged, delete that folder")
        yield session


@contextmanager
def asking(what: str) -> Iterator[None]:
    """What the server refuses, or a connection that breaks, as ServerUnavailable; `what` was asked for."""
    try:
        yield
    except OpdError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("prefect.", "httpx")):
            raise
        raise ServerUnavailable(f"the Prefect server failed or refused {what}: {first_line(error)}") from error


def _check_answer() -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise ServerUnavailable(f"it does not answer ({first_line(error)})")


@contextmanager
def prefect_settings(values: Mapping[str, str]) -> Iterator[None]:
    """Prefect's settings and loggers in the block: in the environment, for a first import and for child processes, and set up
    anew, for Prefect may have been imported long ago. The root logger keeps its handlers."""
    before, handlers, raising = dict(os.environ), list(logging.root.handlers), logging.raiseExceptions
    _set_environment(values)
    try:
        from prefect.context import SettingsContext, get_settings_context
        from prefect.logging.configuration import setup_logging
        from prefect.settings import Settings

        with SettingsContext(profile=get_settings_context().profile, settings=Settings()):
            setup_logging(incremental=False)
            logging.root.handlers[:] = handlers
            logging.raiseExceptions = False  # Prefect prints the log lines that it could not send
            yield
    finally:
        logging.raiseExceptions = raising
        _set_environment(before)


def _set_environment(values: Mapping[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _settle(session: Session) -> None:
    """Send what Prefect's background services still hold while the server lives, and end them: at exit they would try for
    seconds per event, hours for a long run. Prefect has no public way to end one that still holds something."""
    from prefect._internal.concurrency.services import _active_services
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    tasks = [
        (service, service._task, service._done_event, service._loop)
        for service in list(_active_services)
        if service._task is not None and service._done_event is not None and service._loop is not None
    ]
    if session.active:
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=5)
    for service, task, done, loop in tasks:
        if not done.is_set():
            service._stop(at_exit=True)
            loop.call_soon_threadsafe(task.cancel)
    deadline = time.monotonic() + 2.0
    while any(not done.is_set() for _, _, done, _ in tasks) and time.monotonic() < deadline:
        time.sleep(0.01)


def first_line(error: BaseException) -> str:
    """Of its message, without secrets; its type if it has none. With that of its cause, which Prefect's messages leave out."""
    line, cause = _first_line(error), error.__cause__ and _first_line(error.__cause__)
    return f"{line}: {cause}" if cause and cause not in line else line


def _first_line(error: BaseException) -> str:
    return next(iter(redact(str(error)).strip().splitlines()), type(error).__name__)
