"""What of a run's recorded metrics deserves a look: pure functions over its rounds, for `opd status` and the lines of a run.

Each warning is one line that ends with the field to look at. Thresholds are constants here: they decide what is said, never what
a run does (rules that end a run are `policy.stop`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from storage.runs import RoundState, RunState

CLIPPED = 0.8
"""Share of completions that were cut off."""
SAME = 1e-4
"""Reverse KL at round 0, nats per token, below which student and teacher are the same model."""
LOST_MASS, LEAST_MASS = 0.05, 0.9
"""Fall of the teacher's mass on the support since the first round, and the mass above which no fall is told."""
LONGER = 2.0
"""Mean length over that of the first round."""
LATE = 0.05
"""Share of judged completions at which a verifier was stopped at its time limit."""
COLLAPSED, LEAST_ENTROPY = 0.2, 0.05
"""Entropy over that of the first round's training; and the entropy, nats per token, below which it has collapsed."""


def run_warnings(state: RunState) -> list[str]:
    """One line per warning that holds at the last round with the metrics it needs."""
    rounds = sorted(state.rounds, key=lambda round: round.round)
    return [line for check in CHECKS for line in check(rounds)]


def fresh(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Warnings of `after` that `before` did not have, whatever their numbers."""
    known = {_kind(line) for line in before}
    return [line for line in after if _kind(line) not in known]


def _kind(line: str) -> str:
    """What a warning is about, without its numbers."""
    return "".join(character for character in line if not character.isdigit())


def clipped(rounds: Sequence[RoundState]) -> Iterator[str]:
    for name, field, what in (
        ("rollout_clipped_ratio", "rollout.max_completion_length", "rollouts"),
        ("clipped_ratio", "evaluate.max_completion_length", "evaluated completions"),
    ):
        number, share = _last(rounds, name)
        if share is not None and share >= CLIPPED:
            yield (
                f"round {number}: {share:.0%} of the {what} reached the length limit: raise {field}, or check stop_token_ids and"
                " the chat template"
            )


def same_models(rounds: Sequence[RoundState]) -> Iterator[str]:
    kl = next((r.metrics.get("reverse_kl") for r in rounds if r.round == 0), None)
    if kl is not None and abs(kl) < SAME:
        yield f"round 0: the student is the teacher already (reverse KL {kl:.2g}): see teacher.source and student.source"


def no_tokens(rounds: Sequence[RoundState]) -> Iterator[str]:
    number, tokens = _last(rounds, "train_tokens")
    _, empty = _last(rounds, "train_empty_steps")
    if tokens == 0:
        yield f"round {number}: no token was left to learn from: see train.mask_reasons and opd query NAME mask-reasons"
    elif empty:
        yield f"round {number}: {empty:,.0f} steps had no token to learn from: see train.mask_reasons"


def idle_teachers(rounds: Sequence[RoundState]) -> Iterator[str]:
    last = next((r for r in reversed(rounds) if any(name.startswith("train_tokens/") for name in r.metrics)), None)
    for name, tokens in sorted(last.metrics.items()) if last is not None else ():
        if last is not None and name.startswith("train_tokens/") and not tokens:
            teacher = name.partition("/")[2]
            yield (
                f"round {last.round}: no token was trained with the teacher {teacher}: see teachers.{teacher} and teacher_id of"
                " the prompts"
            )


def late_verifiers(rounds: Sequence[RoundState]) -> Iterator[str]:
    number, late = _last(rounds, "judge_timed_out")
    metrics = next((r.metrics for r in rounds if r.round == number), {})
    judged = (metrics.get("judge_reward_n") or 0) + (metrics.get("judge_failed") or 0)
    if late and late >= LATE * judged:
        yield (
            f"round {number}: verifiers were stopped at their limit at {late:,.0f} of {judged:,.0f} completions, which have no"
            " reward: see judge.timeout and the log of the judge"
        )


def falling_mass(rounds: Sequence[RoundState]) -> Iterator[str]:
    first, (number, mass) = _first(rounds, "train_teacher_mass_last"), _last(rounds, "train_teacher_mass_last")
    if first is not None and mass is not None and mass < LEAST_MASS and first - mass > LOST_MASS:
        yield (
            f"round {number}: the teacher's mass outside the list rose from {1 - first:.1%} to {1 - mass:.1%}: see"
            " objective.support (k, kind)"
        )


def running_length(rounds: Sequence[RoundState]) -> Iterator[str]:
    for name, field in (("rollout_mean_length", "rollout.max_completion_length"), ("mean_length", "evaluate")):
        first, (number, length) = _first(rounds, name), _last(rounds, name)
        if first and length is not None and length > LONGER * first:
            yield (
                f"round {number}: the mean length grew from {first:.0f} to {length:.0f} tokens: see {field},"
                " policy.stop.clipped"
            )
            return


def collapsed(rounds: Sequence[RoundState]) -> Iterator[str]:
    name = "train_student_entropy_last"
    first, (number, entropy) = _first(rounds, name), _last(rounds, name)
    if (
        first is not None
        and entropy is not None
        and entropy < first
        and (entropy < LEAST_ENTROPY or entropy < COLLAPSED * first)
    ):
        yield (
            f"round {number}: the student's entropy fell from {first:.2f} to {entropy:.2f} nats per token: see train.lr,"
            " objective.divergence, policy.stop.entropy"
        )


CHECKS: tuple[Callable[[Sequence[RoundState]], Iterator[str]], ...] = (
    clipped, same_models, no_tokens, idle_teachers, late_verifiers, falling_mass, running_length, collapsed,
)  # fmt: skip


def _last(rounds: Sequence[RoundState], name: str) -> tuple[int, float | None]:
    """The newest round with the metric, and its value."""
    return next(((r.round, value) for r in reversed(rounds) if (value := r.metrics.get(name)) is not None), (0, None))


def _first(rounds: Sequence[RoundState], name: str) -> float | None:
    """The metric of the first round after round 0 that has it."""
    return next((value for r in rounds if r.round and (value := r.metrics.get(name)) is not None), None)
