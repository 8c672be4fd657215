"""Which artifacts of its rounds a run still needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from pydantic import Field, ValidationError

from storage.errors import ConfigError
from storage.identity import RunPolicy
from storage.runs import RoundState, RunState, StageState
from storage.store import Store

Name = tuple[str, str]
"""Stage and key of an artifact."""

ROLES = {
    "rollout": "rollouts",
    "context": "signals",
    "sampled": "signals",
    "teacher_topk": "signals",
    "student_topk": "signals",
    "mask": "signals",
    "trainer_state": "trainer_state",
    "teacher_ema": "trainer_state",
    "student": "students",
}
"""Stage of an artifact -> the field of `Retention` that it falls under. For other stages the manifest may name a
field; all other artifacts are always kept."""


class Retention(RunPolicy):
    """For how many of a run's last finished rounds `opd gc` keeps what is large; null keeps all. Round 0, evaluations
    and training curves are always kept. What is evicted is made again when it must be read, and must come out equal.
    Replaying the training of round R reads rollouts and signals of R, students and trainer_state of R-1."""

    rollouts: int | None = Field(None, ge=0, description="last rounds whose completions are kept; null: all")
    signals: int | None = Field(
        None, ge=0, description="last rounds whose teacher signals, and contexts of samples, are kept; null: all"
    )
    trainer_state: int | None = Field(
        None,
        ge=1,
        description="last rounds whose optimizer state, and teacher_ema where the teacher is one, is kept; null: all. The next"
        " round reads the last one",
    )
    students: int | None = Field(None, ge=1, description="last rounds whose student is kept; null: all")

    @classmethod
    def of(cls, experiment: dict[str, Any], where: str) -> Retention:
        """The retention in a run's resolved config. ConfigError if it is not valid."""
        try:
            return cls.model_validate((experiment.get("policy") or {}).get("retain") or {})
        except ValidationError as error:
            raise ConfigError(f"{where}: policy.retain: {error}") from error

    def with_changes(self, changes: dict[str, int | None]) -> Retention:
        """The same with some fields replaced. ConfigError for an unknown field or a number out of range."""
        try:
            return type(self).model_validate(self.model_dump() | changes)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"--keep: {problems}; the fields are {', '.join(type(self).model_fields)}") from error


def used(state: RunState) -> set[Name]:
    """All artifacts that the run's state names, also of stages that have yet to be finished."""
    stages = (stage for round in state.rounds for stage in round.stages.values())
    return {name for stage in stages for name in stage.artifacts.items()}


def role_of_stage(name: Name) -> str | None:
    """The field of `Retention` that an artifact falls under by its stage alone; None for no field."""
    return ROLES.get(name[0])


def best_round(state: RunState) -> int | None:
    """The round whose student is best by its evaluation: the highest accuracy, among equals and without a verifier the lowest
    reverse KL, then the earliest. None where no round has either."""
    judged = [r for r in state.rounds if r.metrics.get("accuracy_greedy") is not None]
    compared = judged or [r for r in state.rounds if r.metrics.get("reverse_kl") is not None]
    if not compared:
        return None

    def rank(round: RoundState) -> tuple[float, float, int]:
        accuracy, kl = round.metrics.get("accuracy_greedy"), round.metrics.get("reverse_kl")
        return (-(accuracy or 0.0), math.inf if kl is None else kl, round.round)

    return min(compared, key=rank).round


def droppable(
    state: RunState,
    retain: Retention,
    role: Callable[[Name], str | None] = role_of_stage,
    named: Collection[int] = (),
    forked: Collection[int] = (),
    best: bool = True,
) -> set[Name]:
    """Artifacts whose data this run can do without; `role` gives the field of `Retention` that an artifact falls under.

    Rounds count back from the last finished one. Later rounds are kept, and so is what any kept round uses. Of the rounds `named`
    everything is kept; of those where another run was `forked`, and with `best` of `best_round`, student and trainer_state."""
    finished = [round.round for round in state.rounds if round.student_sha256]
    last = max(finished, default=0)
    models = {*forked, *((best_round(state),) if best else ())}
    drop: set[Name] = set()
    keep: set[Name] = set()
    for round in state.rounds:
        for record in round.stages.values():
            for stage, key in record.artifacts.items():
                field = role((stage, key))
                count = getattr(retain, field) if field is not None else None
                kept = count is None or round.round == 0 or round.round > last - count or round.round in named
                kept = kept or (field in ("students", "trainer_state") and round.round in models)
                kept = kept or record.state not in ("done", "cached")
                (keep if kept else drop).add((stage, key))
    return drop - keep


def evicted_of(store: Store, state: RunState) -> set[Name]:
    """The artifacts of a run whose data was removed."""
    found = ((name, store.get(*name)) for name in used(state))
    return {name for name, artifact in found if artifact is not None and store.evicted(artifact) is not None}


def rebuild_cost(state: RunState, gone: Collection[Name], round: int) -> tuple[list[int], float]:
    """The rounds whose training must be repeated to have the trainer state of `round` again, and the seconds that these took
    (with those of their stages that are `gone` too)."""
    stages = {r.round: r.stages for r in state.rounds}
    rounds: list[int] = []
    while any(name in gone for name in stages.get(round, {}).get("train", StageState()).artifacts.items()):
        rounds.insert(0, round)
        round -= 1
    again = [s for r in rounds for s in stages[r].values() if any(name in gone for name in s.artifacts.items())]
    return rounds, sum(stage.seconds or 0.0 for stage in again)
