"""Metrics of a round as text, each with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from flows.run.figures import BY_METRIC, EVALUATED, PAIRED, REWARD, SAMPLED, TRAINED, Shown
from flows.run.pace import configured_rounds, pace
from storage.errors import CorruptArtifact, InputError
from storage.query.figures import PARTS, Figure
from storage.runs import RoundState, Run, RunState, StageState

NOT_EVALUATED = "not evaluated"
"""What is shown for a round that `policy.evaluate_every` left out."""
_UNITS = {"train": "steps", "warmup": "steps"}
_UNITS |= dict.fromkeys(("draft", "rollout", "judge", "context", "supervise", "evaluate"), "samples")


def amount(label: str, stage: StageState) -> str:
    """What a stage made, in its own unit: `640 samples`, of supervision `640 samples, 3 signals` (each has a row per sample);
    empty where it made no rows."""
    rows = stage.rows or 0
    if not rows:
        return ""
    if label.startswith("supervise") and (signals := len(stage.artifacts)) > 1:
        return f"{rows // signals:,} samples, {signals} signals"
    return f"{rows:,} {next((unit for stage, unit in _UNITS.items() if label.startswith(stage)), 'rows')}"


BY_ROUND = (*EVALUATED, SAMPLED, REWARD)
"""Figures of a table with a row per round."""


def cells(rounds: Sequence[RoundState], figures: Iterable[Shown]) -> tuple[list[Shown], list[list[str]]]:
    """The figures that some of the rounds has, and by round their values, each with its error. Where an evaluation was left out,
    the first of its figures says so."""
    shown = [figure for figure in figures if any(round.metrics.get(figure.metric) is not None for round in rounds)]
    rows = [[with_error(round.metrics, figure.metric, figure.form) for figure in shown] for round in rounds]
    if shown and shown[0] in EVALUATED:
        for round, row in zip(rounds, rows, strict=True):
            row[0] = NOT_EVALUATED if round.unevaluated else row[0]
    return shown, rows


def by_round(rounds: Iterable[RoundState]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of a table with a row per round: figures, and the seconds of the stages that were run."""
    rounds = sorted(rounds, key=lambda round: round.round)
    shown, figures = cells(rounds, BY_ROUND)
    rows = []
    for round, own in zip(rounds, figures, strict=True):
        seconds = sum(stage.seconds or 0.0 for stage in round.stages.values() if stage.state == "done")
        rows.append([str(round.round), *own, f"{seconds:,.0f}"])
    return ["round", *(figure.heading for figure in shown), "seconds"], rows


BY_TEACHER = (*PAIRED, *TRAINED)
"""Figures that a teacher has of its own: METRIC/TEACHER."""


def by_teacher(rounds: Iterable[RoundState]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of a table with a row per round and teacher; no rows where there is one teacher."""
    rounds = list(rounds)
    known = {
        name.partition("/")[0] for r in rounds for name, value in r.metrics.items() if "/" in name and value is not None
    }
    shown = [figure for figure in BY_TEACHER if figure.metric in known]
    rows = []
    for round in sorted(rounds, key=lambda round: round.round):
        names = {name.partition("/")[2] for name in round.metrics if name.startswith(("eval_tokens/", "train_tokens/"))}
        rows += [
            [
                str(round.round),
                name,
                *(with_error(round.metrics, f"{of.metric}/{name}", of.form) for of in shown),
            ]
            for name in sorted(names)
        ]
    return ["round", "teacher", *(of.heading for of in shown)], rows


def all_with_errors(metrics: Mapping[str, float | None], form: str) -> dict[str, str]:
    """Every metric that has a value as text, its error and number of samples beside it instead of as metrics."""
    beside = {f"{name}_{part}" for name in metrics if f"{name}_n" in metrics for part in PARTS}
    found = {}
    for name in metrics:
        if name not in beside and (text := with_error(metrics, name, form)):
            size = samples(metrics, name)
            found[name] = text + (f" ({size})" if size else "")
    return found


def with_error(metrics: Mapping[str, float | None], name: str, form: str) -> str:
    """`24.5% ± 3.0%`; without ± where no error is known, empty without a value. `form`: a format of one number."""
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return ""
    return form.format(value) + (f" ± {_error(error, form)}" if error is not None else "")


def _error(error: float, form: str) -> str:
    """As the value; an error that would read 0.0000 without being 0 has its own digit: 2e-05."""
    text = form.format(error)
    return f"{error:.0e}" if text == "0.0000" and error > 0 else text


def samples(metrics: Mapping[str, float | None], name: str) -> str:
    """`n 200`, or `n 800 of 200 prompts` where prompts have several samples; empty where it is not known."""
    n, prompts = metrics.get(f"{name}_n"), metrics.get(f"{name}_prompts")
    if n is None:
        return ""
    return f"n {n:,.0f}" + (f" of {prompts:,.0f} prompts" if prompts is not None and prompts != n else "")


def sample_sizes(rounds: Iterable[RoundState], names: Iterable[str]) -> str:
    """`n 200`, or by metric where they differ: `accuracy n 200; reverse KL, length n 128 of 64 prompts`; empty where unknown."""
    rounds, by_size = list(rounds), dict[str, list[str]]()
    for name in names:
        if sizes := dict.fromkeys(size for round in rounds if (size := samples(round.metrics, name))):
            by_size.setdefault(" or ".join(sizes), []).append(BY_METRIC[name].name if name in BY_METRIC else name)
    if len(by_size) == 1:
        return next(iter(by_size))
    return "; ".join(f"{', '.join(metrics)} {size}" for size, metrics in by_size.items())


def apart(found: Figure, form: str) -> str:
    """A paired difference: `-0.0155 ± 0.0040`, and whether the two are told apart."""
    if found.value is None:
        return "no prompt in common"
    sign, error = "+" if found.value >= 0 else "-", "" if found.se is None else f" ± {_error(found.se, form)}"
    text = f"{sign}{form.format(abs(found.value))}{error}"
    return text if found.told_apart else f"{text}, not told apart"


def status_text(state: RunState, root: Path) -> str:
    """The status as `status` and `ls` print it. A run that was asked for fewer rounds than policy.rounds is stored as
    `stopped`; it is shown as `paused at round 1 of 5`."""
    last = state.rounds[-1] if state.rounds else None
    if state.status == "finished" and state.ended:
        return "ended by a rule"
    if state.status != "stopped" or last is None or last.student_sha256 is None or last.round != state.rounds_done:
        return state.status
    goal = goal_of(state, root)
    return f"paused at round {last.round}" + (f" of {goal}" if goal is not None else "")


def goal_of(state: RunState, root: Path) -> int | None:
    """The run's policy.rounds; None where its config cannot be read."""
    try:
        return configured_rounds(Run.open(root, state.name))
    except (InputError, CorruptArtifact):
        return None


def pace_text(state: RunState, root: Path) -> str | None:
    """`round 7 of 25, done at about 03:40` of a run that is going on; None for any other."""
    goal = goal_of(state, root) if state.status == "running" else None
    now = datetime.now().astimezone()
    found = None if goal is None else pace(state, goal, now)
    return None if found is None else found.text(now)


def failure(state: RunState) -> str | None:
    """Why a failed run failed, and in which stage if in one; None for a run that did not fail."""
    if state.status != "failed":
        return None
    failed = failed_stages(state)
    if not failed:
        return state.error or "no reason was recorded; see its logs"
    round, label, stage = failed[-1]
    return f"round {round.round} {label}: {state.error or stage.error or 'no reason was recorded'}"


def failed_stages(state: RunState) -> list[tuple[RoundState, str, StageState]]:
    """(round, label, stage) of the failed ones."""
    return [(r, label, stage) for r in state.rounds for label, stage in r.stages.items() if stage.state == "failed"]
