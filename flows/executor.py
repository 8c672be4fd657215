"""Executors walk the main path: one plans it, one makes it. Both see the same calls in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from storage.redact import redact
from storage.runs import RoundState, Run, RunState, StageState
from storage.store import Artifact, Builder, Store
from tasks.stage import Context, Work


class Pending:
    """Stands for what is not made yet; everything taken from it is pending too."""

    def __getitem__(self, name: str) -> Pending:
        return self


Result = Any
"""An `Artifact`, a mapping of them by output name, or `Pending`."""


class RoundScope(Protocol):
    def ends_with(self, student: Result) -> None:
        """Note the student that the round ends with."""


class Executor(Protocol):
    store: Store

    def __call__(self, label: str, make: Callable[..., Work], *inputs: Any) -> Result:
        """The outputs of the stage that `make(*inputs)` describes."""

    def round(self, number: int) -> Any:
        """A context that yields a `RoundScope`."""


def resolved(work: Work, store: Store) -> dict[str, Artifact]:
    """The outputs of a stage that are committed already."""
    found = {}
    for name, spec in work.outputs.items():
        artifact = store.get(spec.stage, work.shared.get(name, spec.key)) or store.get(spec.stage, spec.key)
        if artifact is not None:
            found[name] = artifact
    return found


@dataclass
class PlanLine:
    """One stage of a plan. `state`: cached (in the store), run (would run), pending (waits for a stage that would)."""

    round: int
    stage: str
    state: str
    keys: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    """outputs (signals, say) that are not in the store"""


class Planner:
    """Resolves keys as far as contents are known: up to the first stage that must run."""

    def __init__(self, store: Store) -> None:
        self.store, self.lines, self._round = store, list[PlanLine](), 0

    def __call__(self, label: str, make: Callable[..., Work], *inputs: Any) -> Result:
        if any(_is_pending(value) for value in inputs):
            self.lines.append(PlanLine(self._round, label, "pending"))
            return Pending()
        work = make(*inputs)
        found = resolved(work, self.store)
        keys = {name: spec.key for name, spec in work.outputs.items()}
        missing = tuple(name for name in work.outputs if name not in found)
        state = "run" if missing else "cached"
        self.lines.append(PlanLine(self._round, label, state, keys, missing))
        return found if state == "cached" else Pending()

    @contextmanager
    def round(self, number: int) -> Iterator[Planner]:
        self._round = number
        yield self

    def ends_with(self, student: Result) -> None:
        """A plan does not care."""


def _is_pending(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_pending(item) for item in value.values())
    return isinstance(value, Pending)


class Reporter(Protocol):
    """Who watches: a terminal, a log, a test."""

    def stage(self, round: int, label: str, state: StageState) -> None: ...

    def progress(self, round: int, label: str, done: int, total: int, unit: str) -> None: ...

    def waiting(self, label: str, holder: str) -> None: ...

    def round_done(self, state: RoundState) -> None: ...


RunTask = Callable[[str, Callable[[], Result], Callable[[Result], bool]], Result]
"""Runs a stage's function as a task: (name, function, was it cached?) -> the function's result."""


def directly(name: str, function: Callable[[], Result], cached: Callable[[Result], bool]) -> Result:
    """Without Prefect: call it."""
    return function()


class Maker:
    """Makes what is missing, records every stage in the run's state, and forgets nothing that is committed."""

    def __init__(
        self,
        store: Store,
        run: Run,
        state: RunState,
        context: Callable[[Callable[[int, int, str], None]], Context],
        reporter: Reporter,
        run_task: RunTask = directly,
    ) -> None:
        self.store, self.run, self.state = store, run, state
        self.context, self.reporter, self.run_task = context, reporter, run_task
        self.built = 0
        self._round = RoundState(round=0)

    @contextmanager
    def round(self, number: int) -> Iterator[Maker]:
        known = {r.round: r for r in self.state.rounds}
        if number not in known:
            self.state.rounds.append(RoundState(round=number))
            self.state.rounds.sort(key=lambda r: r.round)
        self._round = next(r for r in self.state.rounds if r.round == number)
        yield self
        self.run.save(self.state)
        self.reporter.round_done(self._round)

    def ends_with(self, student: Result) -> None:
        self._round.student_sha256 = student.content["weights"]

    def __call__(self, label: str, make: Callable[..., Work], *inputs: Any) -> Result:
        work = make(*inputs)
        name = f"{label} · round {self._round.round}"
        before = self.built
        return self.run_task(name, lambda: self._make(label, work), lambda _: self.built == before)

    def _make(self, label: str, work: Work) -> dict[str, Artifact]:
        started = time.monotonic()
        context = self.context(
            lambda done, total, unit: self.reporter.progress(self._round.round, label, done, total, unit)
        )
        keys = {name: work.shared.get(name, spec.key) for name, spec in work.outputs.items()}
        found = resolved(work, self.store)
        old = self._round.stages.get(label)
        if len(found) == len(work.outputs):
            kept = old is not None and old.artifacts == keys and old.state in ("done", "cached")
            state = old if kept and old is not None else StageState(state="cached", seconds=0.0, artifacts=keys)
            return self._finish(label, state, found, shown="cached")
        self._note(label, StageState(state="running", artifacts=keys, started=time.strftime("%Y-%m-%dT%H:%M:%S%z")))
        try:
            found |= self._build(label, work, found, context)
        except BaseException as error:
            seconds = time.monotonic() - started
            text = (
                "stopped"
                if isinstance(error, KeyboardInterrupt)
                else str(error).splitlines()[0]
                if str(error)
                else repr(error)
            )
            self._note(label, StageState(state="failed", artifacts=keys, seconds=seconds, error=redact(text)))
            raise
        self.built += 1
        context.workers.stage_done()
        return self._finish(label, StageState(state="done", seconds=time.monotonic() - started, artifacts=keys), found)

    def _build(self, label: str, work: Work, found: dict[str, Artifact], context: Context) -> dict[str, Artifact]:
        with ExitStack() as stack:
            builders: dict[str, Builder] = {}
            made: dict[str, Artifact] = {}
            missing = sorted((spec.stage, spec.key, name) for name, spec in work.outputs.items() if name not in found)
            for _, _, name in missing:  # locks are taken in one order by everyone
                waiting = lambda holder: self.reporter.waiting(label, holder)  # noqa: E731
                builder = stack.enter_context(self.store.building(work.outputs[name], waiting))
                if builder.committed is not None:
                    made[name] = builder.committed
                else:
                    builders[name] = builder
            if builders:
                work.build(builders, context)
            for name in builders:
                spec = work.outputs[name]
                artifact = self.store.get(spec.stage, spec.key)
                if artifact is None:
                    raise RuntimeError(f"{label}: the stage returned without committing {spec.stage}/{spec.key}")
                made[name] = artifact
        return made

    def _finish(
        self, label: str, state: StageState, found: dict[str, Artifact], shown: str | None = None
    ) -> dict[str, Artifact]:
        """Record the stage's end. `shown` is the state to report where the record keeps that of an earlier call."""
        state.key = next(iter(state.artifacts.values()), None)
        state.rows = sum(sum(artifact.rows.values()) for artifact in found.values())
        for artifact in found.values():
            for name, value in (artifact.meta.get("metrics") or {}).items():
                self._round.metrics[name if label == "evaluate" else f"{label}_{name}"] = value
        self._note(label, state, shown)
        return found

    def _note(self, label: str, state: StageState, shown: str | None = None) -> None:
        self._round.stages[label] = state
        self.run.save(self.state)
        self.reporter.stage(self._round.round, label, state.model_copy(update={"state": shown or state.state}))
