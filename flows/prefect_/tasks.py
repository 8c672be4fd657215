"""Prefect around a run: order, states and history to look at. Never the source of truth, never a reason for losing work.

What holds here, whatever Prefect does: a stage's function is called once per try, in the calling thread; its result and its
exceptions (KeyboardInterrupt included) come out unchanged; when the server cannot be started, is locked, loses its database
or dies, a warning says so and the work goes on without it, and ends without waiting for it.
"""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flows.prefect_.session import Session, current_session, first_line, innermost_session, to_stderr
from storage.disk.redact import redact

T = TypeVar("T")

PATIENCE_SECONDS = 8.0
"""How long Prefect may take to note something, twice, before the run goes on without it."""
HURRY_SECONDS = 3.0
"""The same, once, where the run is being stopped."""


# Flows and tasks


def run_as_flow(name: str, function: Callable[[], T], *, run_name: str | None = None, description: str = "") -> T:
    """Call `function` as a Prefect flow run (directly, without a session). Its result and exceptions come out unchanged."""

    def call(session: Session, body: Callable[[], Any]) -> None:
        from prefect import Flow

        if not session.takes(lambda client: client.create_flow_from_name(name), PATIENCE_SECONDS):
            return
        Flow(
            fn=_with_signal_handler(_ending(session, body)),
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
                session = innermost_session()
                warn = session.warn if session else to_stderr
                warn(f"try {self.made} of {self.retries + 1} failed ({first_line(error)}); trying again")
                time.sleep(self.delay_seconds)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a worker process died without an answer."""
    from tasks.workers.pool import WorkerDied

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
        if outcome.error is None and session.active:
            if _is_abort(error):
                raise KeyboardInterrupt("cancelled in Prefect") from error
            raise
    if outcome.error is not None:
        raise outcome.error
    if not outcome.called:  # Prefect failed before it came to the work
        return function()
    return outcome.value


def _ending(session: Session, body: Callable[[], Any]) -> Callable[[], Any]:
    """The body of a flow, which leaves Prefect without another call when Prefect does not take the run's end."""

    def takes_the_end(patience: float, retries: int) -> bool:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        run = context.flow_run if context is not None else None
        if run is None or not session.active:
            return session.active
        return session.takes(lambda client: client.update_flow_run(run.id, name=run.name), patience, retries)

    def call() -> Any:
        from prefect.exceptions import Abort

        try:
            result = body()
        except BaseException as error:
            patience = (PATIENCE_SECONDS, 1) if isinstance(error, Exception) else (HURRY_SECONDS, 0)
            if not takes_the_end(*patience):
                raise Abort from None
            raise
        if not takes_the_end(PATIENCE_SECONDS, 1):
            raise Abort
        return result

    return call


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
