"""Executors of the main path: `Planner` resolves keys, `Maker` builds. Both get the same calls in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol, cast

from flows.experiment import Experiment
from flows.run.lineage import Lineage, Origin, Rebuild, artifacts_in, rebuild, require_plugins
from flows.run.warnings import fresh, run_warnings
from storage.disk.redact import redact
from storage.errors import InputError
from storage.query.figures import with_errors
from storage.runs import RoundState, Run, RunState, StageState
from storage.store import Artifact, Builder, Store
from storage.upkeep.stop_rules import StopRules
from tasks.stage import Context, Work
from tasks.workers.metrics import Metrics, StageProgress


def stage_error(error: BaseException) -> str:
    """The error that a failed stage records: one line."""
    return redact(str(error).splitlines()[0] if str(error) else repr(error))


class Pending:
    """Placeholder for an output that is not built yet; its items are pending too."""

    def __getitem__(self, name: str) -> Pending:
        return self


OTHER_PROMPTS = (
    "warning: these are other prompts than this run had (prepare/{then} then, prepare/{now} now), because a prompt file has"
    " changed, or this version reads it otherwise; what depends on them is made again"
)
Made = Mapping[str, Artifact]
"""Outputs of a stage by name. A plan puts `Pending` in their place."""
Teachers = Mapping[str | None, Artifact]
"""The teachers' models by name; None: the only one."""
P = ParamSpec("P")


class RoundScope(Protocol):
    def ends_with(self, student: Artifact) -> None:
        """Record the student at the end of the round."""


class Executor(Protocol):
    store: Store

    def __call__(self, label: str, make: Callable[P, Work], *args: P.args, **inputs: P.kwargs) -> Made:
        """The outputs of the stage that `make(*args, **inputs)` describes: its config first, all else by keyword."""

    def stored(self, label: str, make: Callable[P, Work], *args: P.args, **inputs: P.kwargs) -> Made | None:
        """The same if all of its outputs are in the store; else None, and nothing is built or recorded."""

    def inspect(self, experiment: Experiment, student: Artifact, teachers: Teachers, prompts: Artifact) -> None:
        """Check models and prompts before the first stage that needs a worker runs."""

    def round(self, number: int) -> Any:
        """A context that yields a `RoundScope`."""

    def enough(self, number: int) -> bool:
        """Whether the run ends after this round."""


def resolved(work: Work, store: Store) -> dict[str, Artifact]:
    """The committed outputs of a stage."""
    found = {}
    for name, spec in work.outputs.items():
        artifact = store.get(spec.stage, work.shared.get(name, spec.key)) or store.get(spec.stage, spec.key)
        if artifact is not None:
            found[name] = artifact
    return found


def rows_of(made: Mapping[str, Artifact]) -> int:
    """Total rows of a stage's outputs."""
    return sum(sum(artifact.rows.values()) for artifact in made.values())


def metrics_of(made: Mapping[str, Artifact], store: Store) -> Metrics:
    """The metrics that a stage recorded in its outputs. An evaluation of an earlier version gets its errors from its rows."""
    found: dict[str, float | None] = {}
    for artifact in made.values():
        own = artifact.meta.get("metrics") or {}
        found |= with_errors(store, artifact, own) if artifact.stage == "evaluate" else own
    return found


def round_metrics(label: str, metrics: Metrics) -> dict[str, float | None]:
    """The same metrics by their names in a round: plain for the evaluation, prefixed with the label for other stages."""
    return {name if label == "evaluate" else f"{label}_{name}": value for name, value in metrics.items()}


def refuse_other_model(label: str, work: Work, recorded: StageState | None, store: Store) -> None:
    """InputError, naming the file, if a model's source (weights, tokenizer) differs from what the run's state recorded. The
    folder may move."""
    if work.stage != "model" or recorded is None or "model" not in recorded.artifacts:
        return
    before, spec = store.get("model", recorded.artifacts["model"]), work.outputs["model"]
    if before is None or (before.version, before.identity) != (spec.version, spec.identity):
        return
    then, now = ({k: v for k, v in inputs.items() if k != "place"} for inputs in (before.inputs, spec.inputs))
    if then != now:
        store.materialize(before)  # for a changed folder of the user's this error names the file
        raise InputError(
            f"{label}: its {' and '.join(sorted(now))} differ from those this run began with (model/{before.key} then,"
            f" model/{spec.key} now); restore the old ones, or start a new run under another --name"
        )


@dataclass
class PlanLine:
    """One stage of a plan. `state`: cached (in the store), restore (evicted, but a stage that would run reads it), run (would
    run), pending (depends on a stage that would run)."""

    round: int
    stage: str
    state: str
    keys: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    """outputs that are not in the store (signals, for example)"""
    notes: tuple[str, ...] = ()
    """what the stage has to say before it would run"""


class Planner:
    """Resolves keys up to the first stage that must run; later inputs are unknown."""

    def __init__(self, store: Store) -> None:
        self.store, self.lines, self._round = store, list[PlanLine](), 0
        self.lineage = Lineage(store)

    def __call__(self, label: str, make: Callable[P, Work], *args: P.args, **inputs: P.kwargs) -> Made:
        given = (*args, *inputs.values())
        if any(_is_pending(value) for value in given):
            self.lines.append(PlanLine(self._round, label, "pending"))
            return cast(Made, Pending())
        work = make(*args, **inputs)
        found = resolved(work, self.store)
        keys = {name: spec.key for name, spec in work.outputs.items()}
        missing = tuple(name for name in work.outputs if name not in found)
        state = "run" if missing else "cached"
        self.lines.append(PlanLine(self._round, label, state, keys, missing, work.notes if missing else ()))
        if missing:
            self._mark(self.lineage.to_restore(artifacts_in(given)))
            return cast(Made, Pending())
        self.lineage.note(self._round, label, work, given, found)
        return found

    def stored(self, label: str, make: Callable[P, Work], *args: P.args, **inputs: P.kwargs) -> Made | None:
        if any(_is_pending(value) for value in (*args, *inputs.values())):
            return None
        work = make(*args, **inputs)
        return self(label, make, *args, **inputs) if len(resolved(work, self.store)) == len(work.outputs) else None

    def inspect(self, experiment: Experiment, student: Artifact, teachers: Teachers, prompts: Artifact) -> None:
        """A plan starts nothing, so nothing is checked."""

    def _mark(self, again: list[Rebuild]) -> None:
        places = {(item.origin.round, item.origin.label) for item in again}
        for line in self.lines:
            if (line.round, line.stage) in places:
                line.state = "restore"

    @contextmanager
    def round(self, number: int) -> Iterator[Planner]:
        self._round = number
        yield self

    def ends_with(self, student: Artifact) -> None:
        """Nothing to record in a plan."""

    def enough(self, number: int) -> bool:
        """A plan has all rounds: it knows no metrics of those that are not made."""
        return False


def _is_pending(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_pending(item) for item in value.values())
    return isinstance(value, Pending)


class Reporter(Protocol):
    """Receives a run's events: a terminal, a log, a test."""

    def begins(self, state: RunState, goal: int) -> None:
        """A call of the run begins. `state` goes on changing with the run; `goal`: its last round."""

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        """A stage starts or ends; `metrics` are those of its outputs."""

    def progress(
        self, round: int, label: str, done: int, total: int, unit: str, metrics: Metrics | None = None
    ) -> None: ...

    def note(self, round: int, label: str, text: str) -> None:
        """A message about a stage, for example what was kept of an earlier attempt, or a warning."""

    def waiting(self, label: str, holder: str) -> None: ...

    def round_done(self, state: RoundState) -> None: ...


RunTask = Callable[[str, int, Callable[[], Made], Callable[[Made], bool]], Made]
"""Runs a stage's function as a task: (label, round, function, was it cached?) -> the function's result."""


def directly(label: str, round: int, function: Callable[[], Made], cached: Callable[[Made], bool]) -> Made:
    """Calls the function, without Prefect."""
    return function()


class Maker:
    """Builds what is missing and records every stage in the run's state."""

    def __init__(
        self,
        store: Store,
        run: Run,
        state: RunState,
        context: Callable[[StageProgress], Context],
        reporter: Reporter,
        run_task: RunTask = directly,
        restore: int | None = None,
        after_round: Callable[[int], None] | None = None,
        stop: StopRules | None = None,
    ) -> None:
        """`restore`: a round whose evicted artifacts are rebuilt, whether they are read or not. `after_round` is called
        after every round in which something was built. `stop`: rules that end the run."""
        self.store, self.run, self.state = store, run, state
        self.context, self.reporter, self.run_task = context, reporter, run_task
        self.built = 0
        self.lineage = Lineage(store)
        self._restored_round, self._after_round, self._stop = restore, after_round, stop
        self._round = RoundState(round=0)
        self._unsaved = False
        """Whether `state` has changed since it was last saved."""
        self._inspection: Callable[[], None] | None = None

    @property
    def number(self) -> int:
        """The round that is being made."""
        return self._round.round

    def inspect(self, experiment: Experiment, student: Artifact, teachers: Teachers, prompts: Artifact) -> None:
        """Check models and prompts once, when the first stage that needs a worker is about to run: InputError for what would
        fail. Notes go to the log and the reporter."""

        def inspection() -> None:
            from flows.run.checked import Known
            from flows.run.preflight import any_check, preflight

            if not any_check():
                return
            context = self._context(0, "check")
            known = Known.of(experiment, self.store, student, teachers, prompts)
            preflight(known, lambda text: context.say("check", text))

        self._inspection = inspection

    @contextmanager
    def round(self, number: int) -> Iterator[Maker]:
        known = {r.round: r for r in self.state.rounds}
        if number not in known:
            self.state.rounds.append(RoundState(round=number))
            self.state.rounds.sort(key=lambda r: r.round)
            self._unsaved = True
        self._round = next(r for r in self.state.rounds if r.round == number)
        before = self.built
        yield self
        self._save()
        self.reporter.round_done(self._round)
        if self._after_round is not None and self.built > before:
            self._after_round(number)

    def ends_with(self, student: Artifact) -> None:
        self._unsaved |= self._round.student_sha256 != student.content["weights"]
        self._round.student_sha256 = student.content["weights"]

    def enough(self, number: int) -> bool:
        reached = self.state.model_copy(update={"rounds": [r for r in self.state.rounds if r.round <= number]})
        reason = None if self._stop is None else self._stop.reason(reached)
        self.state.ended = None if reason is None else f"after round {number}: {reason}"
        if reason is not None:
            self.reporter.note(number, "run", f"ends here: {reason}; to go on: --set policy.stop=null")
        return reason is not None

    def __call__(self, label: str, make: Callable[P, Work], *args: P.args, **inputs: P.kwargs) -> Made:
        work, given = make(*args, **inputs), (*args, *inputs.values())
        before, number = self.built, self._round.round
        return self.run_task(label, number, lambda: self._make(label, work, given), lambda _: self.built == before)

    def stored(self, label: str, make: Callable[P, Work], *args: P.args, **inputs: P.kwargs) -> Made | None:
        work = make(*args, **inputs)
        return self(label, make, *args, **inputs) if len(resolved(work, self.store)) == len(work.outputs) else None

    def _make(self, label: str, work: Work, inputs: tuple[Any, ...]) -> dict[str, Artifact]:
        with ExitStack() as held:
            # `opd gc` must not remove them before the run's state names them
            held.enter_context(self.store.using(resolved(work, self.store).values()))
            made = self._resolve(label, work, inputs)
        self.lineage.note(self._round.round, label, work, inputs, made)
        return made

    def _resolve(self, label: str, work: Work, inputs: tuple[Any, ...]) -> dict[str, Artifact]:
        started = time.monotonic()
        context = self._context(self._round.round, label)
        keys = {name: work.shared.get(name, spec.key) for name, spec in work.outputs.items()}
        found = resolved(work, self.store)
        old = self._round.stages.get(label)
        refuse_other_model(label, work, old, self.store)
        if work.stage == "prepare" and old is not None and old.artifacts and old.artifacts != keys:
            context.say(label, OTHER_PROMPTS.format(then=old.artifacts.get("prepare"), now=keys.get("prepare")))
        if len(found) == len(work.outputs):
            if self._round.round == self._restored_round:
                self._restore_own(label, work, inputs, found)
            kept = old is not None and old.artifacts == keys and old.state in ("done", "cached")
            state = old if kept and old is not None else StageState(state="cached", seconds=0.0, artifacts=keys)
            return self._finish(label, state, found, shown="cached")
        for note in work.notes:
            context.say(label, note)
        begun = StageState(state="running", artifacts=keys, started=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self._note(label, begun)
        try:
            with self._whole(artifacts_in(inputs)):
                if self._inspection is not None:
                    inspection, self._inspection = self._inspection, None
                    inspection()
                found |= self._build(label, work, found, context)
        except BaseException as error:
            seconds = time.monotonic() - started
            if isinstance(error, KeyboardInterrupt):
                ended: dict[str, Any] = {"state": "pending", "error": "interrupted"}
            else:
                ended = {"state": "failed", "seconds": seconds, "error": stage_error(error)}
            self._note(label, begun.model_copy(update=ended))
            raise
        self.built += 1
        context.workers.stage_done()
        done = begun.model_copy(update={"state": "done", "seconds": time.monotonic() - started})
        return self._finish(label, done, found)

    def _context(self, round: int, label: str) -> Context:
        context = self.context(
            lambda done, total, unit, metrics=None: self.reporter.progress(round, label, done, total, unit, metrics)
        )
        return replace(context, tell=lambda text: self.reporter.note(round, label, text))

    @contextmanager
    def _whole(self, inputs: Iterable[Artifact]) -> Iterator[None]:
        """In the block the data of the inputs is there; evicted data is rebuilt first."""
        inputs = list(inputs)
        with self.store.using(inputs):  # before rebuilding, so that no collection comes between
            self._restore(self.lineage.to_restore(inputs))
            yield

    def _restore_own(self, label: str, work: Work, inputs: tuple[Any, ...], found: dict[str, Artifact]) -> None:
        lost = {name: artifact for name, artifact in found.items() if self.store.evicted(artifact) is not None}
        if lost:
            origin = Origin(self._round.round, label, work, tuple(artifacts_in(inputs)), found)
            self._restore([*self.lineage.to_restore(origin.inputs), Rebuild(origin, lost)])

    def _restore(self, again: list[Rebuild]) -> None:
        with self.store.using(artifact for item in again for artifact in item.needs):
            for item in again:
                number, label, started = item.origin.round, item.origin.label, time.monotonic()
                context = self._context(number, label)
                names = ", ".join(f"{a.stage}/{a.key}" for a in item.lost.values())
                context.log(f"{label} · round {number}: {names} was evicted and is rebuilt")
                self.reporter.stage(number, label, StageState(state="running"))
                waiting = lambda holder, label=label: self.reporter.waiting(label, holder)  # noqa: E731
                made = rebuild(item.origin.work, item.lost, context, waiting)
                self.built += 1
                context.workers.stage_done()
                seconds = time.monotonic() - started
                self.reporter.stage(number, label, StageState(state="done", seconds=seconds, rows=rows_of(made)))

    def _build(self, label: str, work: Work, found: dict[str, Artifact], context: Context) -> dict[str, Artifact]:
        with ExitStack() as stack:
            builders: dict[str, Builder] = {}
            made: dict[str, Artifact] = {}
            missing = sorted((spec.stage, spec.key, name) for name, spec in work.outputs.items() if name not in found)
            for _, _, name in missing:  # one order of locks for all processes
                waiting = lambda holder: self.reporter.waiting(label, holder)  # noqa: E731
                builder = stack.enter_context(self.store.building(work.outputs[name], waiting))
                if builder.committed is not None:
                    made[name] = builder.committed
                else:
                    builders[name] = builder
            if builders:
                require_plugins(work, builders)
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
        """Records the end of a stage. `shown`: the state to report, if the record keeps the state of an earlier call."""
        state = state.model_copy(update={"key": next(iter(state.artifacts.values()), None), "rows": rows_of(found)})
        metrics = metrics_of(found, self.store)
        before, known = dict(self._round.metrics), run_warnings(self.state)
        self._round.metrics |= round_metrics(label, metrics)
        self._unsaved |= self._round.metrics != before
        self._note(label, state, shown, metrics)
        if shown is None:
            for line in fresh(known, run_warnings(self.state)):
                self._context(self._round.round, label).say(label, f"warning: {line}")
        return found

    def _note(self, label: str, state: StageState, shown: str | None = None, metrics: Metrics | None = None) -> None:
        self._unsaved |= self._round.stages.get(label) != state
        self._round.stages[label] = state
        self._save()
        self.reporter.stage(self._round.round, label, state.model_copy(update={"state": shown or state.state}), metrics)

    def _save(self) -> None:
        """Write the state, unless the file says the same: a run that finds everything in the store writes nothing per stage."""
        if self._unsaved:
            self.run.save(self.state)
            self._unsaved = False
