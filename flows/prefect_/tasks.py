"""A run as Prefect shows it: a flow with the experiment as its parameters, a task per stage, log lines, artifacts.

Prefect is never the source of truth, never a reason for losing work. Whatever it does, a stage's function is called once, in
the calling thread; its result and its exceptions (KeyboardInterrupt included) come out unchanged; when the server cannot be
started, is locked, loses its database or dies, a warning is printed and the run goes on, and ends without waiting for it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from flows.distill import distill
from flows.experiment import Experiment
from flows.prefect_.failure import failure
from flows.prefect_.notify import require_blocks
from flows.prefect_.server import ServerUnavailable
from flows.prefect_.session import Session, prefect_session
from flows.prefect_.shown import InPrefect, show_failure, show_summary
from flows.run.executor import Maker
from flows.run.hints import described
from flows.run.stopping import terminating
from storage.disk.redact import redact
from storage.errors import OpdError

T = TypeVar("T")


def distill_in_prefect(
    experiment: Experiment, maker: Maker, rounds: int, evaluated: Callable[[int], bool] | None = None
) -> None:
    """The main path as a Prefect flow; without a usable Prefect, the main path."""
    with prefect_session(maker.store.root) as session:
        if session.active:
            with suppress(ServerUnavailable):  # a server that fails is no reason to refuse a run
                require_blocks(experiment.hooks)
            maker.run_task = partial(run_stage, session)
            maker.reporter = InPrefect(session, maker.run, maker.state, maker.reporter)
        name, root = maker.run.name, maker.store.root

        def run() -> None:
            try:
                student = distill(experiment, maker, rounds, evaluated)
            except Exception as error:
                show_failure(session, error, name, root)
                raise
            show_summary(session, maker.state, root, student, experiment.policy.rounds)

        told = lambda error: failure(error, name, root).message()  # noqa: E731
        run_as_flow(session, experiment, name, rounds, run, told)


def run_as_flow(
    session: Session,
    experiment: Experiment,
    run: str,
    rounds: int,
    function: Callable[[], T],
    told: Callable[[OpdError], str] = described,
) -> T:
    """Call `function` as a flow run, named and tagged after the run, its method and its divergence. `told`: the message of its
    state after an error."""

    def record(body: Callable[[], Any]) -> None:
        from prefect import flow, tags

        @flow(name="distill", flow_run_name=lambda: run, persist_result=False, validate_parameters=False)
        def main_path(experiment: dict[str, Any], run: str, rounds: int) -> Any:
            with _end_in_time(session), terminating():  # Prefect has put a SIGTERM handler of its own in
                return body()

        objective = experiment.objective
        method = [objective.estimator, *([objective.divergence.kind] if hasattr(objective, "divergence") else [])]
        with tags(run, *method):
            main_path(experiment.model_dump(mode="json"), run, rounds)

    return _through(session, record, function, lambda _: None, told)


def run_stage(session: Session, label: str, round: int, function: Callable[[], T], cached: Callable[[T], bool]) -> T:
    """Call a stage's function as a task of the flow around it; its state is named `Cached` when `cached(result)`. It has no
    Prefect cache, no persisted result and no retries: the store is both, and the workers are tried again by their pool."""

    def record(body: Callable[[], Any]) -> None:
        from prefect import task
        from prefect.cache_policies import NO_CACHE

        @task(
            name=label,
            task_run_name=lambda: f"{label} · round {round}",
            tags=[f"round {round}"],
            cache_policy=NO_CACHE,
            persist_result=False,
        )
        def stage() -> object:
            return body()

        stage()

    def state(result: T) -> Any:
        from prefect.states import Completed

        return Completed(name="Cached", message="already in the store") if cached(result) else Completed()

    return _through(session, record, function, state, described)


def _through(
    session: Session,
    record: Callable[[Callable[[], Any]], None],
    work: Callable[[], T],
    state: Callable[[T], Any],
    told: Callable[[OpdError], str],
) -> T:
    """Do the work inside Prefect's `record`; take the outcome from the work itself, for Prefect may fail before it, around
    it and after it. An error of ours is a Failed state with the message `told`; any other is raised, for Prefect's log has its
    traceback then."""
    if not session.active:
        return work()
    done: list[T] = []
    raised: list[BaseException] = []

    def body() -> Any:
        try:
            done.append(work())
        except BaseException as error:
            raised.append(error)
            if isinstance(error, OpdError):
                from prefect.states import Failed

                return Failed(message=redact(told(error)))
            shown = _without_secrets(error)
            if shown is error:
                raise
            raise shown from None
        return state(done[0])

    try:
        record(body)
    except Exception as error:
        if not raised:
            session.give_up(error)
    except BaseException as error:
        from prefect.exceptions import PrefectSignal

        if not raised and not isinstance(error, PrefectSignal):
            raise
        if not raised and session.active:
            raise KeyboardInterrupt("cancelled in Prefect") from error
    if raised:
        raise raised[0]
    return done[0] if done else work()


@contextmanager
def _end_in_time(session: Session) -> Iterator[None]:
    """Leave the flow by Prefect's Abort, which calls nothing, where one small write for its run does not get through (within
    3 seconds when the run is being stopped): Prefect would try for minutes to record its end."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Abort
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    retries, seconds = 1, 8

    def write() -> None:
        if session.server is not None:
            session.server.check_database()
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}),
            get_client(sync_client=True, httpx_settings={"timeout": seconds}) as client,
        ):
            client.update_flow_run(flow_run.id, name=flow_run.name)

    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            retries, seconds = 0, 3
        raise
    finally:
        session.attempt(write)
        if not session.active:
            raise Abort


def _without_secrets(error: BaseException) -> BaseException:
    """What Prefect gets to see and to store of an error: the error, or if a secret is in its text a stand-in."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, Exception) or redact(text) == text:
        return error
    return RuntimeError(f"{type(error).__name__}: {redact(str(error))}")
